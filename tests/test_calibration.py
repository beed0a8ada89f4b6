"""Calibration: the statistical tests are exact, the search keeps the bound, and `mtp-trl calibrate` writes the result."""

import importlib.util
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binom, multinomial
from transformers import AutoModelForCausalLM

from mtp_trl.cli import main
from mtp_trl.evaluation.calibration import (
    BY_POSITION,
    _score,
    calibrate,
    check_size,
    compare,
    even,
    loss_p_value,
    net_loss_p_value,
    problems_needed,
)
from mtp_trl.evaluation.commands import run_calibrate
from mtp_trl.evaluation.sweep import Record
from mtp_trl.evaluation.tasks import load_task
from mtp_trl.modeling.files import PROVENANCE_FILE
from mtp_trl.publishing.calibration_file import CALIBRATION_FILE, Calibration, Counts
from mtp_trl.publishing.card import read_evidence, render_card
from mtp_trl.publishing.provenance import run_facts
from mtp_trl.publishing.repository import write_decoding_defaults

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("bound", [0.05, 0.2])
def test_the_paired_test_is_wrong_no_more_often_than_its_level(bound):
    """Sum over every outcome, at a loss of exactly the bound: P(p <= level) <= level."""
    problems = 24
    outcomes = [
        (lost, gained) for lost, gained in itertools.product(range(problems + 1), repeat=2) if lost + gained <= problems
    ]
    p_values = np.array([net_loss_p_value(lost, gained, problems, bound=bound) for lost, gained in outcomes])
    counts = np.array([[lost, gained, problems - lost - gained] for lost, gained in outcomes])
    for gained_rate in (0.0, 0.003, 0.02, 0.07, 0.15, 0.31, 0.399):
        rates = [bound + gained_rate, gained_rate, 1 - bound - 2 * gained_rate]
        probabilities = multinomial.pmf(counts, problems, rates)
        assert probabilities.sum() == pytest.approx(1)
        for level in (0.01, 0.05, 0.2):
            assert probabilities[p_values <= level].sum() <= level + 1e-6


def test_the_paired_test_equals_a_naive_maximum():
    """The maximum, over the unknown rate of gains, of the probability of an outcome whose score is at most the observed one."""

    def score(lost, gained, n, bound):
        # search for the most likely rate of gains, given a net loss of exactly the bound
        rates = np.linspace(1e-9, (1 - bound) / 2 - 1e-9, 40001)
        likelihood = lost * np.log(rates + bound) + gained * np.log(rates) + (n - lost - gained) * np.log(1 - bound - 2 * rates)
        rate = rates[likelihood.argmax()]
        return (lost - gained - n * bound) / math.sqrt(n * (2 * rate + bound * (1 - bound)))

    n, bound, seen = 12, 0.3, (2, 3)
    outcomes = [(lost, gained) for lost in range(n + 1) for gained in range(n + 1 - lost)]
    extreme = [o for o in outcomes if score(*o, n, bound) <= score(*seen, n, bound) + 1e-6]
    counts = [[lost, gained, n - lost - gained] for lost, gained in extreme]
    naive = max(
        multinomial.pmf(counts, n, [bound + rate, rate, 1 - bound - 2 * rate]).sum() for rate in np.linspace(0, 0.349, 500)
    )
    assert net_loss_p_value(*seen, n, bound=bound) == pytest.approx(naive, rel=2e-3)


@pytest.mark.parametrize(("lost", "gained", "problems"), [(0, 3, 100), (0, 8, 100), (4, 16, 50), (33, 45, 200)])
def test_the_paired_test_equals_the_maximum_on_a_grid_a_hundred_times_as_fine(lost, gained, problems):
    """In the first three cases, a coarse grid of rates missed 5 to 11 percent; in the last, the maximum is near the end."""
    bound, most_lost = 0.01, []
    seen = _score(lost, gained, problems, bound)
    for count in range(problems + 1):
        extreme = [n for n in range(problems - count + 1) if _score(n, count, problems, bound) <= seen + 1e-9]
        most_lost.append(max(extreme, default=-1))
    gains = np.arange(problems + 1)
    rates = np.linspace(0, (1 - bound) / 2, 20001)[:, None]
    chances = binom.pmf(gains, problems, rates) * binom.cdf(most_lost, problems - gains, (bound + rates) / (1 - rates))
    assert net_loss_p_value(lost, gained, problems, bound=bound) == pytest.approx(chances.sum(1).max(), rel=1e-5)


def test_without_an_answer_key_the_test_is_binomial():
    counts = Counts(problems=300, lost=4, gained=0, tokens_per_pass=2.0)
    assert loss_p_value(counts, bound=0.05, measure="agreement") == pytest.approx(binom.cdf(4, 300, 0.05))


@pytest.mark.parametrize("measure", ["accuracy", "agreement"])
@pytest.mark.parametrize(("max_drop", "confidence"), [(0.01, 0.95), (0.05, 0.9), (0.3, 0.99)])
def test_problems_needed_is_the_smallest_number_accepted(measure, max_drop, confidence):
    needed = problems_needed(max_drop=max_drop, confidence=confidence, measure=measure)
    options = {"max_drop": max_drop, "confidence": confidence, "measure": measure}
    check_size(needed, **options)
    with pytest.raises(ValueError, match=f"at least {needed} are needed"):
        check_size(needed - 1, **options)
    nothing_lost = (1 - max_drop) ** needed
    assert nothing_lost <= 1 - confidence + 1e-12


@pytest.mark.parametrize(("name", "value"), [("max_drop", 0.0), ("max_drop", 1.0), ("confidence", 1.0), ("confidence", -1)])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a fraction in"):
        check_size(1000, **{"max_drop": 0.1, "confidence": 0.9, "measure": "accuracy"} | {name: value})


def test_the_search_goes_from_strict_to_loose_and_stops_at_the_first_that_fails():
    lost = {0.99: 0, 0.9: 2, 0.8: 60, 0.5: 0}
    tested = []

    def count(threshold):
        tested.append(threshold)
        return Counts(1000, lost[threshold], 0, 2.0)

    options = {"measure": "accuracy", "max_drop": 0.02, "confidence": 0.95}
    chosen, steps = calibrate(count, thresholds=[0.5, 0.9, 0.99, 0.8], **options)
    assert tested == [0.99, 0.9, 0.8]  # 0.5 would pass, but is not tested
    assert chosen == 0.9
    assert [step.accepted for step in steps] == [True, True, False]
    assert calibrate(count, thresholds=[0.8], **options)[0] is None


def test_the_bound_is_broken_no_more_often_than_stated():
    """Draw losses repeatedly with known rates. The bound is between the losses of the third and the fourth threshold."""
    rng = np.random.default_rng(0)
    rates = {0.99: (0.002, 0.001), 0.95: (0.01, 0.004), 0.9: (0.06, 0.02), 0.8: (0.125, 0.02)}
    problems, repetitions, broken, chosen_at_all = 100, 150, 0, 0
    for _ in range(repetitions):
        draws = {t: rng.multinomial(problems, [lost, gained, 1 - lost - gained]) for t, (lost, gained) in rates.items()}
        chosen, _steps = calibrate(
            lambda t, draws=draws: Counts(problems, int(draws[t][0]), int(draws[t][1]), 2.0),
            measure="accuracy",
            max_drop=0.1,
            confidence=0.9,
            thresholds=list(rates),
        )
        chosen_at_all += chosen is not None
        broken += chosen == 0.8
    assert broken / repetitions <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / repetitions)
    assert chosen_at_all > 0.9 * repetitions


def test_the_fastest_accepted_shape_is_chosen_and_each_shape_is_tested_at_its_share():
    lost = {0.9: 0, 0.5: 3, (0.0, 0.9): 3, (0.0, 0.5): 60}
    speed = {0.9: 2.0, 0.5: 2.5, (0.0, 0.9): 4.0, (0.0, 0.5): 5.0}

    def calibrated(shapes, problems):
        return calibrate(
            lambda threshold: Counts(problems, lost[threshold], 0, speed[threshold]),
            measure="agreement", max_drop=0.02, confidence=0.95, thresholds=[0.5, 0.9], shapes=shapes,
        )  # fmt: skip

    chosen, steps = calibrated(BY_POSITION, 600)
    assert chosen == (0.0, 0.9)
    assert [(step.threshold, step.accepted) for step in steps] == [
        (0.9, True), (0.5, True), ((0.0, 0.9), True), ((0.0, 0.5), False)
    ]  # fmt: skip
    problems = next(n for n in range(100, 600) if binom.cdf(3, n, 0.02) <= 0.05)  # enough for one shape, but not for two
    assert calibrated([even], problems)[0] == 0.5
    assert calibrated(BY_POSITION, problems)[0] == 0.9


def test_the_bound_holds_for_the_fastest_of_several_shapes():
    """The worst case for a search: the loosest threshold of every shape loses exactly the bound and is fast."""
    rng = np.random.default_rng(1)
    shapes = [lambda t, tail=tail: (0.0, t, tail) for tail in (0.1, 0.2, 0.3, 0.4)]
    problems, bound, confidence, repetitions = 150, 0.1, 0.9, 300
    broken = naive = 0
    for _ in range(repetitions):
        lost = {shape(0.5): int(rng.binomial(problems, bound)) for shape in shapes}
        lost |= {shape(0.9): 0 for shape in shapes}
        options = {"measure": "agreement", "max_drop": bound, "thresholds": [0.9, 0.5]}

        def count(threshold, lost=lost):
            return Counts(problems, lost[threshold], 0, 3.0 - threshold[1])

        broken += calibrate(count, confidence=confidence, shapes=shapes, **options)[0][1] == 0.5
        naive += any(calibrate(count, confidence=confidence, shapes=[one], **options)[0][1] == 0.5 for one in shapes)
    error = 3 * math.sqrt(0.1 * 0.9 / repetitions)
    assert broken / repetitions <= 1 - confidence + error
    assert naive / repetitions > 1 - confidence + error  # without the Bonferroni shares, the bound is broken too often


def record(ids, *, correct, passes=1):
    return Record("", tuple(ids), (len(ids),), passes, 0.1, correct)


def test_answers_are_compared_problem_by_problem():
    own = [record([1, 2], correct=True), record([3], correct=True), record([4], correct=False), record([5], correct=False)]
    answers = [record([1, 2], correct=True), record([9], correct=False), record([8], correct=True), record([7], correct=False)]
    assert compare(answers, own) == Counts(4, 1, 1, 5 / 4)
    unscored = [record(one.token_ids, correct=None) for one in own]
    assert compare([record(one.token_ids, correct=None) for one in answers], unscored) == Counts(4, 3, 0, 5 / 4)


@pytest.fixture
def folder(tmp_path, write_student):
    """A random model. It is never confident, so strict thresholds give the same text as k=1, and whole blocks do not."""
    facts = {"base_model": "org/base", "mask_token": "<|mtp|>", "objective": "hard", "k_min": 2, "k_max": 4, "settings": {}}
    return write_student(tmp_path / "model", confadapt=0.25, verify=True, provenance=facts | run_facts())


def write_prompts(path, count):
    path.write_text("".join(json.dumps({"prompt": f"Tom has {i} pens"}) + "\n" for i in range(count)))


def calibrate_command(folder, data, *options):
    limits = ["--max-new-tokens", "4", "--batch-size", "64", "--max-drop", "0.2", "--confidence", "0.8"]
    return main(["calibrate", str(folder), "--data", str(data), *limits, *options])


def test_calibrate_writes_the_threshold_into_the_folder_and_the_evidence_onto_the_card(folder, tmp_path, capsys):
    write_prompts(tmp_path / "data.jsonl", 40)
    assert calibrate_command(folder, tmp_path / "data.jsonl") == 0
    found = Calibration.read(folder / CALIBRATION_FILE)
    assert found.measure == "agreement"
    assert found.steps[0].counts.problems == 40
    assert found.provenance["data"] == "data.jsonl"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert (model.generation_config.confadapt, model.generation_config.verify) == (found.threshold, False)
    facts = json.loads((folder / PROVENANCE_FILE).read_text())
    card = render_card(facts, model_name="x", evidence=read_evidence(folder))
    assert found.promise in card
    assert f"confadapt={found.threshold:g}, max_new_tokens" in card
    assert f"{found.threshold:g}" in capsys.readouterr().out


def test_thresholds_by_position_are_written_to_generation_config_and_card_and_used_by_generate(folder, tmp_path):
    write_prompts(tmp_path / "data.jsonl", 40)
    assert calibrate_command(folder, tmp_path / "data.jsonl", "--per-place") == 0
    found = Calibration.read(folder / CALIBRATION_FILE)
    assert {type(step.threshold) for step in found.steps} == {float, tuple}
    speeds = {step.threshold: step.counts.tokens_per_pass for step in found.steps if step.accepted}
    assert speeds[found.threshold] == max(speeds.values())
    chosen = replace(found, threshold=(0.0, 0.5))
    chosen.write(folder / CALIBRATION_FILE)
    assert Calibration.read(folder / CALIBRATION_FILE) == chosen
    write_decoding_defaults(folder, confadapt=chosen.threshold, verify=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert model.generation_config.confadapt == [0.0, 0.5]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.generate(ids, max_new_tokens=12), model.generate(ids, max_new_tokens=12, confadapt=[0.0, 0.5]))
    card = render_card(json.loads((folder / PROVENANCE_FILE).read_text()), model_name="x", evidence=read_evidence(folder))
    assert "confadapt=[0, 0.5], max_new_tokens" in card
    assert "With confadapt=[0, 0.5], the loss of agreement" in card
    assert "| 0.99/0.999 |" in card


def test_calibrate_reports_that_a_folder_no_longer_verifies(folder, tmp_path, capsys):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mtp_k": "auto"}))
    write_prompts(tmp_path / "data.jsonl", 40)
    assert calibrate_command(folder, tmp_path / "data.jsonl") == 0
    assert "no longer verifies by default" in " ".join(capsys.readouterr().out.split())
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)  # raises if mtp_k is still "auto"
    assert calibrate_command(folder, tmp_path / "data.jsonl") == 0
    assert "by default" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["calibrate", "--help"])
    assert "verify=False becomes the folder's default" in " ".join(capsys.readouterr().out.split())


def test_too_few_problems_or_no_accepted_threshold_leave_the_folder_unchanged(folder, tmp_path, capsys):
    before = (folder / "generation_config.json").read_text()
    data = tmp_path / "data.jsonl"
    write_prompts(data, 7)
    assert calibrate_command(folder, data) == 2
    assert "at least 8 are needed" in capsys.readouterr().err
    data.write_text(data.read_text() * 20)  # the same 7 problems, repeated
    assert calibrate_command(folder, data) == 2
    assert "7 different problems" in capsys.readouterr().err
    assert calibrate_command(tmp_path / "nowhere", data) == 2
    assert "is not a folder" in capsys.readouterr().err
    write_prompts(data, 20)
    options = {"max_drop": 0.2, "confidence": 0.8, "batch_size": 20, "max_new_tokens": 4}
    with pytest.raises(ValueError, match="is unchanged: even threshold 0 was not shown to lose less than"):
        run_calibrate(str(folder), load_task(str(data)), thresholds=[0.0], **options)
    assert (folder / "generation_config.json").read_text() == before
    assert not (folder / CALIBRATION_FILE).exists()


@pytest.mark.parametrize("name", ["calibration", "calibration_by_position"])
def test_the_published_thresholds_keep_the_bound_on_fresh_problems(name):
    """In the committed results, at least 34 of 40 repetitions keep the bound at a confidence of 95 %."""
    results = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    assert {row["measure"] for row in results["rows"]} == {"accuracy", "agreement"}
    for row in results["rows"]:
        assert row["repetitions"] == 40
        assert row["kept"] >= 34
        assert row["without_threshold"] + sum(row["thresholds"].values()) == 40


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmarks/calibration.py`, with decoding replaced by a stand-in that appends its prompts to `decoded`."""
    spec = importlib.util.spec_from_file_location("calibration_benchmark", ROOT / "benchmarks" / "calibration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.decoded = []

    def decode(model, tokenizer, prompts, *, settings, **options):
        module.decoded += prompts
        records = [Record("", (int(prompt),), (1,), 1, 1.0, correct=True) for prompt in prompts]
        return SimpleNamespace(records=dict.fromkeys(settings, records))

    monkeypatch.setattr(module, "load_student", lambda name: (None, None))
    monkeypatch.setattr(module, "evaluate_decoding", decode)
    monkeypatch.setattr(module, "CHUNK", 4)
    return module


def test_the_benchmarks_pool_resumes_and_has_no_duplicate_problems(benchmark, write_student, tmp_path):
    problems = [SimpleNamespace(prompt=f"{i}", result=i) for i in range(10)]
    settings = benchmark.decodings((even,), (0.9,))
    student = str(write_student(tmp_path / "student", confadapt=0.9, verify=False))
    for count in (6, 6, 10):
        benchmark.decode_pool(student, tmp_path / "pool", problems[:count], settings)
    assert [int(prompt) for prompt in benchmark.decoded] == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9]  # the short chunk (4, 5) again
    assert len(benchmark.read_pool(tmp_path / "pool", 10, settings)["ConfAdapt 0.9"]["tokens"]) == 10
    assert len(benchmark.read_pool(tmp_path / "pool", 5, settings)["ConfAdapt 0.9"]["tokens"]) == 5


def test_a_pool_with_other_settings_is_refused_before_anything_is_decoded(benchmark, write_student, tmp_path, monkeypatch):
    problems = [SimpleNamespace(prompt=f"{i}", result=i) for i in range(6)]
    settings = benchmark.decodings((even,), (0.9,))
    student = write_student(tmp_path / "student", confadapt=0.9, verify=False)
    benchmark.decode_pool(str(student), tmp_path / "pool", problems, settings)
    benchmark.decoded.clear()
    shutil.copytree(student, tmp_path / "other")
    with pytest.raises(ValueError, match="another pool, with another model; name another --pool"):
        benchmark.decode_pool(str(tmp_path / "other"), tmp_path / "pool", problems, settings)
    with pytest.raises(ValueError, match="with another list of settings;"):
        benchmark.decode_pool(str(student), tmp_path / "pool", problems, benchmark.decodings((even,), (0.8,)))
    monkeypatch.setattr(benchmark, "CHUNK", 3)
    with pytest.raises(ValueError, match="with another chunk size;"):
        benchmark.decode_pool(str(student), tmp_path / "pool", problems, settings)
    (tmp_path / "pool" / "000000.json").write_text("{}")  # a pool from before its settings were recorded
    with pytest.raises(ValueError, match="with another model, list of settings, chunk size;"):
        benchmark.decode_pool(str(student), tmp_path / "pool", problems, settings)
    assert benchmark.decoded == []

"""`eval` and `show` on an adapted folder decode the same text as a naive loop over the model."""

import json
import os
import shutil
import sys

import pytest
import torch
from transformers import AutoTokenizer

from mtp_trl.cli import main
from mtp_trl.evaluation import commands
from mtp_trl.evaluation.commands import run_eval
from mtp_trl.evaluation.loading import load_base, load_student
from mtp_trl.evaluation.tasks import load_task
from mtp_trl.modeling.files import LORA_CONFIG
from mtp_trl.publishing.report import from_json, markdown

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_student):
    """A random tiny base, and a student with the same weights, a mask token and the decoder."""
    root = tmp_path_factory.mktemp("models")
    write_student(root / "student", base=root / "base", confadapt=0.9, verify=False)
    return root


def evaluate(folders, output, **changes):
    arguments = {
        "base": str(folders / "base"),
        "ks": [2],
        "thresholds": [0.0],
        "verify": True,
        "batch_size": 2,
        "max_new_tokens": NEW_TOKENS,
        "output": output,
    }
    run_eval(str(folders / "student"), load_task("word_problems", limit=3), **arguments | changes)


def naive_greedy(folder, prompt, *, barred):
    """Decode one token per pass and read the whole text in every pass."""
    model, tokenizer = load_base(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    while ids.shape[1] < start + NEW_TOKENS:
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        logits[barred] = -torch.inf
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return ids[0, start:].tolist()


def test_every_exact_decoding_equals_a_naive_greedy_loop(folders, tmp_path):
    evaluate(folders, tmp_path / "out", blocks=3)
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    exact = [answer for answer in answers if answer["decoding"] in ("base, k=1", "student, k=1", "verified 0", "3 blocks 0")]
    assert len(exact) == 12
    barred = load_student(folders / "student")[0].config.mtp["barred_token_ids"]
    prompts = load_task("word_problems", limit=3).prompts
    for answer in exact:
        reference = naive_greedy(folders / "base", prompts[answer["problem"]], barred=barred)
        assert answer["token_ids"] == reference, answer["decoding"]


def test_defaults_of_the_folder_do_not_change_any_row(folders, tmp_path):
    evaluate(folders, tmp_path / "without", blocks=3)
    student = shutil.copytree(folders / "student", tmp_path / "student")
    for name, value in (("mtp_blocks", 3), ("mtp_k", 2), ("mtp_k", "auto")):
        config = json.loads((folders / "student" / "generation_config.json").read_text()) | {name: value}
        (student / "generation_config.json").write_text(json.dumps(config))
        evaluate(tmp_path, tmp_path / f"{name}_{value}", base=str(folders / "base"), blocks=3)
    first, *others = (
        [(row.setting, row.tokens_per_pass) for row in from_json(path.read_text()).rows]
        for path in (tmp_path / name / "results.json" for name in ("without", "mtp_blocks_3", "mtp_k_2", "mtp_k_auto"))
    )
    assert all(other == first for other in others)


def test_eval_prints_and_writes_one_table(folders, tmp_path, capsys):
    evaluate(folders, tmp_path)
    report = from_json((tmp_path / "results.json").read_text())
    assert (tmp_path / "results.md").read_text() == markdown(report)
    assert [row.setting.label for row in report.rows] == [
        "base, k=1",
        "student, k=1",
        "static k=2",
        "ConfAdapt 0",
        "verified 0",
    ]
    by_label = {row.setting.label: row for row in report.rows}
    assert by_label["verified 0"].same_as_plain == by_label["student, k=1"].same_as_base == 1.0
    assert by_label["static k=2"].tokens_per_pass == 2.0
    printed = capsys.readouterr().out
    assert all(row.setting.label in printed for row in report.rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "pareto.png", "results.json", "results.md"]


def test_without_matplotlib_the_plot_is_omitted_and_a_message_is_printed(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluate(folders, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "results.json", "results.md"]
    assert "no pareto.png: it needs matplotlib, which is not installed; pip install 'mtp-trl[eval]'" in capsys.readouterr().err


def test_finished_parts_are_used_only_for_the_same_model(folders, tmp_path, monkeypatch):
    """If a model is retrained into the same folder after an interrupted evaluation, parts of the old model must not be used."""
    student = tmp_path / "student"
    shutil.copytree(folders / "student", student)
    parts = [commands._parts_folder(tmp_path, str(student), None, asked) for asked in ([1], [1], [2])]
    os.utime(student / "model.safetensors", ns=(1, 1))
    parts.append(commands._parts_folder(tmp_path, str(student), None, [1]))
    (student / "custom_generate" / "generate.py").write_text("# another decoder\n")
    parts.append(commands._parts_folder(tmp_path, str(student), None, [1]))
    adapter, tokenizer = student / "custom_generate" / "mtp_adapter.safetensors", student / "tokenizer.json"
    adapter.write_bytes(b"")
    parts.append(commands._parts_folder(tmp_path, str(student), None, [1]))
    for file in (adapter, tokenizer):
        os.utime(file, ns=(1, 1))
        parts.append(commands._parts_folder(tmp_path, str(student), None, [1]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parts.append(commands._parts_folder(tmp_path, str(student), None, [1]))
    assert parts[0] == parts[1]
    assert len(set(parts)) == len(parts) - 1
    assert {path.parent for path in parts} == {tmp_path / "parts"}


def test_a_repository_at_another_commit_is_another_model(tmp_path, monkeypatch):
    """A push to an adapter on the Hub, or to the base that it names, must not reuse parts finished before."""
    commits = {"me/adapter": "1", "org/base": "1"}
    files = {"me/adapter": {LORA_CONFIG: '{"base_model_name_or_path": "org/base"}'}, "org/base": {"config.json": "{}"}}

    def cached(name, file, revision=None):
        path = tmp_path / name / commits[name] / file
        if file in files[name]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[name][file])
        return str(path) if path.is_file() else None

    monkeypatch.setattr("mtp_trl.evaluation.loading.repository_file", cached)
    monkeypatch.setattr("mtp_trl.modeling.lora.repository_file", cached)
    monkeypatch.setattr("mtp_trl.publishing.decoder_check.repository_file", cached)
    parts = [commands._parts_folder(tmp_path, "me/adapter", None, []) for _ in range(2)]
    for name in commits:
        commits[name] = "2"
        parts.append(commands._parts_folder(tmp_path, "me/adapter", None, []))
    assert parts[0] == parts[1]
    assert len(set(parts)) == 3


def test_parts_of_other_evaluations_are_kept(folders, tmp_path):
    (tmp_path / "parts" / "other").mkdir(parents=True)
    (tmp_path / "parts" / "other" / "0.json").write_text("{}")
    evaluate(folders, tmp_path)
    assert [path.name for path in (tmp_path / "parts").rglob("*")] == ["other", "0.json"]


def test_without_a_base_nothing_is_compared_with_it(folders, tmp_path):
    evaluate(folders, tmp_path, base=None, verify=False)
    rows = from_json((tmp_path / "results.json").read_text()).rows
    assert [row.setting.kind for row in rows] == ["plain", "static", "confadapt"]
    assert {row.versus_base for row in rows} == {None}


@pytest.mark.parametrize(("name", "value"), [("thresholds", [1.5]), ("ks", [1])])
def test_bad_values_are_refused_before_a_model_loads(tmp_path, name, value):
    with pytest.raises(ValueError, match=str(value[0])):
        evaluate(tmp_path / "nowhere", None, **{name: value})


def test_show_refuses_a_bad_threshold_before_a_model_loads(tmp_path, capsys):
    assert main(["show", str(tmp_path / "nowhere"), "3 + 4 =", "--confadapt", "1.5"]) == 2
    assert "got 1.5" in capsys.readouterr().err


def test_a_model_that_was_not_adapted_is_refused(folders):
    with pytest.raises(ValueError, match="no mask token"):
        load_student(folders / "base")


def test_show_prints_the_answer_and_writes_it_as_html(folders, tmp_path, capsys):
    prompt = load_task("word_problems", limit=1).prompts[0]
    page = tmp_path / "answer.html"
    options = ["--confadapt", "0", "--verify", "--max-new-tokens", str(NEW_TOKENS), "--html", str(page)]
    assert main(["show", str(folders / "student"), prompt, *options]) == 0
    assert f"{NEW_TOKENS} tokens in " in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")


def test_the_command_line_options_select_the_decodings(folders, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"q": "3 + 4 =", "a": "7"}\n{"q": "5 + 4 ="}\n')
    options = ["--data", str(data), "--prompt-column", "q", "--completion-column", "a", "--thresholds", "0.5,0"]
    limits = ["--static", "2,3", "--max-new-tokens", "4", "--batch-size", "2", "--output", str(tmp_path / "out")]
    assert main(["eval", str(folders / "student"), *options, *limits]) == 0
    report = from_json((tmp_path / "out" / "results.json").read_text())
    labels = [row.setting.label for row in report.rows]
    assert labels == ["student, k=1", "static k=2", "static k=3", "ConfAdapt 0.5", "ConfAdapt 0"]
    assert {row.accuracy for row in report.rows} == {None}
    assert (report.batch_size, report.max_new_tokens, report.rows[0].problems) == (2, 4, 2)
    assert "data.jsonl" in capsys.readouterr().out


def test_the_command_line_reports_user_errors_without_a_traceback(capsys):
    assert main(["eval", "nowhere", "--data", "no_such_file.jsonl"]) == 2
    assert "no_such_file.jsonl" in capsys.readouterr().err

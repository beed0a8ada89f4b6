"""Does the bound of `mtp-trl calibrate` hold on fresh problems? Decodes a pool of word problems that no training run has read,
once per threshold. Then repeatedly calibrates on a random part of the pool and measures the loss on the rest.

    python benchmarks/calibration.py runs/tiny_exact_long --pool runs/calibration_pool --output docs/results/calibration.json
    python benchmarks/calibration.py models/tiny_exact_long --per-place --problems 1250 --pool runs/calibration_by_position \\
        --output docs/results/calibration_by_position.json

The pool is decoded once and kept in its folder. An interrupted run resumes where it stopped, and a pool of another model or of
other thresholds is refused. Every repetition draws new parts, which share no problem. With `--per-place`, each case is searched
twice on the same parts: for one threshold, and for thresholds by position.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from mtp_trl.evaluation.calibration import BY_POSITION, Shape, calibrate, even
from mtp_trl.evaluation.loading import identity, load_student
from mtp_trl.evaluation.sweep import evaluate_decoding
from mtp_trl.evaluation.tasks import result
from mtp_trl.modeling.files import write_atomically
from mtp_trl.publishing.calibration_file import Counts, Measure, argument
from mtp_trl.publishing.provenance import run_facts
from mtp_trl.publishing.report import Setting, Threshold
from mtp_trl.word_problems import Problem, train_problems

THRESHOLDS = (0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.92, 0.9, 0.87)
GRID_BY_POSITION = THRESHOLDS[2:]
POOL_SEED = 2026
TRAINED_ON = {0: 84_500, 1: 40_000}  # by seed, the number of problems that training the base and adapting it have read
CHUNK = 250
CONFIDENCE = 0.95
REPETITIONS = 40
# measure, bound, number of problems calibrated on
CASES: list[tuple[Measure, float, int]] = [
    ("accuracy", 0.01, 500),
    ("accuracy", 0.01, 1500),
    ("accuracy", 0.02, 500),
    ("accuracy", 0.02, 1500),
    ("accuracy", 0.05, 500),
    ("agreement", 0.02, 1500),
    ("agreement", 0.05, 500),
]
CASES_BY_POSITION: list[tuple[Measure, float, int]] = [
    ("accuracy", 0.02, 500),
    ("accuracy", 0.05, 500),
    ("agreement", 0.05, 500),
    ("agreement", 0.1, 500),
]

Pool = dict[str, dict[str, np.ndarray]]


def fresh_problems(count: int) -> list[Problem]:
    """Return distinct problems from a separate seed, without any that a training run may have read."""
    seen = {problem.question for seed, size in TRAINED_ON.items() for problem in train_problems(size, seed=seed)}
    unique: dict[str, Problem] = {}
    for problem in train_problems(2 * count, seed=POOL_SEED):
        if problem.question not in seen:
            unique.setdefault(problem.question, problem)
    return list(unique.values())[:count]


def decodings(shapes: Sequence[Shape], grid: Sequence[float]) -> list[Setting]:
    """Return the settings with which every problem is decoded."""
    return [Setting("plain"), *(Setting("confadapt", threshold=shape(one)) for shape in shapes for one in grid)]


def decode_pool(model_name: str, folder: Path, problems: list[Problem], settings: Sequence[Setting]) -> None:
    """Decode the pool, and write one file per chunk of problems.

    For every setting, a file records which answers are correct, which equal those of one-token-at-a-time decoding, and their
    tokens and passes.

    Raises:
        ValueError: the folder has a pool of another model, with other settings or with another chunk size.
    """
    made_with = {
        "model": identity(model_name, None),
        "list of settings": [setting.label for setting in settings],
        "chunk size": CHUNK,
    }
    check_pool(folder, made_with)
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_student(model_name)
    for start in track(range(0, len(problems), CHUNK), "decoding the pool"):
        path = folder / f"{start:06d}.json"
        part = problems[start : start + CHUNK]
        if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["problems"] >= len(part):
            continue
        sweep = evaluate_decoding(
            model,
            tokenizer,
            [problem.prompt for problem in part],
            settings=settings,
            batch_size=250,
            max_new_tokens=192,
            scorer=lambda i, text, part=part: result(text) == str(part[i].result),
            progress=False,
        )
        plain = [record.token_ids for record in sweep.records[Setting("plain")]]
        answers: dict[str, Any] = {
            setting.label: {
                "correct": [int(bool(record.correct)) for record in records],
                "same": [int(record.token_ids == ids) for record, ids in zip(records, plain, strict=True)],
                "tokens": [len(record.token_ids) for record in records],
                "passes": [record.passes for record in records],
            }
            for setting, records in sweep.records.items()
        }
        write_atomically(path, json.dumps({"made_with": made_with, "problems": len(part), "answers": answers}) + "\n")


def check_pool(folder: Path, made_with: dict[str, Any]) -> None:
    """Raise ValueError if the folder has a chunk that was not made with `made_with`."""
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8")).get("made_with", {})
        if different := [name for name, value in made_with.items() if found.get(name) != value]:
            raise ValueError(
                f"{path} belongs to another pool, with another {', '.join(different)}; name another --pool or remove the "
                "folder."
            )


def read_pool(folder: Path, problems: int, settings: Sequence[Setting]) -> Pool:
    """Read the chunks and join them: for each decoding, arrays over all problems, as `decode_pool` writes them."""
    paths = [folder / f"{start:06d}.json" for start in range(0, problems, CHUNK)]
    chunks = [json.loads(path.read_text(encoding="utf-8"))["answers"] for path in paths]
    labels = [setting.label for setting in settings]
    return {
        label: {name: np.concatenate([chunk[label][name] for chunk in chunks])[:problems] for name in chunks[0][label]}
        for label in labels
    }


def count(pool: Pool, threshold: Threshold, measure: Measure, part: np.ndarray) -> Counts:
    """Compare a threshold with one-token-at-a-time decoding, on the problems with the indices `part`."""
    plain, answers = pool["student, k=1"], pool[Setting("confadapt", threshold=threshold).label]
    right, plain_right = answers["correct"][part], plain["correct"][part]
    speed = float(answers["tokens"][part].sum() / answers["passes"][part].sum())
    if measure == "agreement":
        return Counts(len(part), int((1 - answers["same"][part]).sum()), 0, speed)
    return Counts(len(part), int((plain_right * (1 - right)).sum()), int((right * (1 - plain_right)).sum()), speed)


def repeat(
    pool: Pool,
    measure: Measure,
    bound: float,
    problems: int,
    *,
    seed: int,
    grid: Sequence[float] = THRESHOLDS,
    shapes: Sequence[Shape] = (even,),
) -> dict[str, Any]:
    """Calibrate on random problems and measure the loss on all other problems, `REPETITIONS` times."""
    total = len(pool["student, k=1"]["correct"])
    chosen: list[Threshold | None] = []
    losses, speeds = [], []
    for repetition in track(range(REPETITIONS), f"{measure}, {bound:g}, {problems}"):
        order = np.random.default_rng([seed, repetition]).permutation(total)
        part, fresh = order[:problems], order[problems:]
        threshold, _ = calibrate(
            lambda threshold, part=part: count(pool, threshold, measure, part),
            measure=measure,
            max_drop=bound,
            confidence=CONFIDENCE,
            thresholds=grid,
            shapes=shapes,
        )
        chosen.append(threshold)
        if threshold is not None:
            counts = count(pool, threshold, measure, fresh)
            losses.append((counts.lost - counts.gained) / counts.problems)
            speeds.append(counts.tokens_per_pass)
    return {
        "measure": measure,
        "max_drop": bound,
        "confidence": CONFIDENCE,
        "calibrated_on": problems,
        "fresh": total - problems,
        "repetitions": REPETITIONS,
        "without_threshold": chosen.count(None),
        "kept": sum(loss <= bound for loss in losses) + chosen.count(None),
        "thresholds": dict(sorted(Counter(argument(t) for t in chosen if t is not None).items(), reverse=True)),
        "largest_loss": max(losses, default=0.0),
        "mean_loss": float(np.mean(losses)) if losses else 0.0,
        "tokens_per_pass": float(np.mean(speeds)) if speeds else 1.0,
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| loss of | bound, points | calibrated on | thresholds found | tokens per pass | loss on fresh data, points | kept |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    searches = any("search" in row for row in results["rows"])
    if searches:
        lines = ["| search " + lines[0], "| --- " + lines[1]]
    for row in results["rows"]:
        found = [f"{threshold} ({times})" for threshold, times in row["thresholds"].items()]
        found += [f"none ({row['without_threshold']})"] if row["without_threshold"] else []
        lines.append(
            (f"| {row['search']} " if searches else "")
            + f"| {row['measure']} | {100 * row['max_drop']:g} | {row['calibrated_on']} | {', '.join(found)} | "
            f"{row['tokens_per_pass']:.2f} | mean {100 * row['mean_loss']:.2f}, largest {100 * row['largest_loss']:.2f} | "
            f"{row['kept']} of {row['repetitions']} |"
        )
    facts, model = results["provenance"], results["model"]
    grid = f"{len(results['grid'])} thresholds" + (" and as many by position" if searches else "")
    caption = (
        f"{model}; {results['problems']} problems decoded once at {grid}, "
        f"{100 * CONFIDENCE:g} % confidence. {facts['date']}, {facts['hardware']}, torch {facts['versions']['torch']}; "
        f"`{facts['command']}`"
    )
    return "\n".join([*lines, "", caption]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pool", type=Path, required=True, help="folder of the decoded pool")
    parser.add_argument("--problems", type=int, default=3500)
    parser.add_argument("--per-place", action="store_true", help="also search thresholds by position, not only one threshold")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    grid, shapes = (GRID_BY_POSITION, BY_POSITION) if options.per_place else (THRESHOLDS, (even,))
    settings = decodings(shapes, grid)
    decode_pool(options.model, options.pool, fresh_problems(options.problems), settings)
    pool = read_pool(options.pool, options.problems, settings)
    if options.per_place:
        searches = {"one threshold": (even,), "by position": BY_POSITION}
        rows = [
            {"search": search} | repeat(pool, *case, seed=seed, grid=grid, shapes=along)
            for seed, case in enumerate(CASES_BY_POSITION)
            for search, along in searches.items()
        ]
    else:
        rows = [repeat(pool, *case, seed=seed) for seed, case in enumerate(CASES)]
    name = Path(options.model).name
    results = {"rows": rows, "model": name, "problems": options.problems, "grid": grid, "provenance": run_facts()}
    print(table(results))
    if options.output is not None:
        write_atomically(options.output, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

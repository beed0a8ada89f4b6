"""Does the promise of `mtp-trl calibrate` hold on fresh problems? Decodes a pool of word problems that no training run saw,
once per threshold, then calibrates on one random part of it and measures the loss on another, again and again.

    python benchmarks/calibration.py runs/tiny_exact_long --pool runs/calibration_pool --output docs/results/calibration.json

The pool is decoded once and kept in its folder; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.progress import track

from mtp_trl.evaluation.calibration import THRESHOLDS
from mtp_trl.evaluation.models import load_student
from mtp_trl.evaluation.sweep import Setting, evaluate_decoding
from mtp_trl.evaluation.tasks import result
from mtp_trl.hub import write_atomically
from mtp_trl.word_problems import Problem, train_problems

POOL_SEED = 2026
TRAINED_ON = {0: 84_500, 1: 40_000}  # streams of the bundled base and of its adaptations, and how far they were read
CHUNK = 500


def fresh_problems(count: int) -> list[Problem]:
    """Problems of a stream of their own: no question twice, none that a training run may have read."""
    seen = {problem.question for seed, size in TRAINED_ON.items() for problem in train_problems(size, seed=seed)}
    unique: dict[str, Problem] = {}
    for problem in train_problems(2 * count, seed=POOL_SEED):
        if problem.question not in seen:
            unique.setdefault(problem.question, problem)
    return list(unique.values())[:count]


def decode_pool(model_name: str, folder: Path, problems: list[Problem]) -> None:
    """One file per chunk of problems: of every threshold which answers are right and which are the model's own."""
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_student(model_name)
    settings = [Setting("plain"), *(Setting("confadapt", threshold=threshold) for threshold in THRESHOLDS)]
    for start in track(range(0, len(problems), CHUNK), "decoding the pool"):
        path = folder / f"{start:06d}.json"
        if path.is_file():
            continue
        part = problems[start : start + CHUNK]
        sweep = evaluate_decoding(
            model,
            tokenizer,
            [problem.prompt for problem in part],
            settings=settings,
            batch_size=100,
            max_new_tokens=192,
            scorer=lambda i, text, part=part: result(text) == str(part[i].result),
            progress=False,
        )
        own = [record.token_ids for record in sweep.records[Setting("plain")]]
        answers: dict[str, Any] = {
            setting.label: {
                "correct": [int(bool(record.correct)) for record in records],
                "same": [int(record.token_ids == ids) for record, ids in zip(records, own, strict=True)],
                "tokens": [len(record.token_ids) for record in records],
                "passes": [record.passes for record in records],
            }
            for setting, records in sweep.records.items()
        }
        write_atomically(path, json.dumps(answers) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pool", type=Path, required=True, help="folder that keeps the decoded pool")
    parser.add_argument("--problems", type=int, default=8000)
    options = parser.parse_args()
    decode_pool(options.model, options.pool, fresh_problems(options.problems))


if __name__ == "__main__":
    main()

"""Training time until the student's blocks agree with the teacher, on real text, for each way of training in train.py.

All ways train the bundled base on word problems with a hard teacher, Muon at a constant learning rate, and no warm-up on ground
truth. They differ only in the regions and in the trained parameters. One way is added to those of train.py: full fine-tuning
with a separate embedding row of the mask token for each position of a block.

Agreement is measured on held-out texts and is not timed. For each of the positions 2 to k_max of a block, it takes the share of
blocks in which the student's token is the teacher's most probable one; the agreement is the mean of these shares.

Each way runs until it reaches `--target` or has trained for `--seconds`. The ways alternate, so that other load on the machine
affects all of them equally.

    python benchmarks/agreement.py --target 0.5 --output docs/results/agreement.json
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from train import WAYS, Way
from transformers import AutoTokenizer

from mtp_trl.evaluation.loading import load_base
from mtp_trl.modeling.files import write_atomically
from mtp_trl.modeling.mask_token import add_mask_token
from mtp_trl.publishing.provenance import run_facts
from mtp_trl.training.data import prepare_dataset
from mtp_trl.training.optimizer import muon_adamw
from mtp_trl.training.readers import WholeRowReader
from mtp_trl.training.regions import Layout, Regions
from mtp_trl.training.step import Batch, Tokens, distillation_pass
from mtp_trl.word_problems import load_dataset

BASE = "mtp_trl/word_problems/base"
TRAINED = WAYS | {"position rows": "full fine-tuning, a mask row for each position"}


@dataclass
class RowForEachPosition(WholeRowReader):
    """Reads regions in which slot s holds the s-th of `mask_ids`, whose rows start as copies of the mask token's row."""

    mask_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def read_student(self, layout: Layout) -> torch.Tensor:
        slots_BRS = layout.drawn_BRK[..., 1:]
        index_BRS = torch.arange(slots_BRS.shape[-1]).expand_as(slots_BRS)
        ids = layout.ids_XT.clone()
        ids.view(-1)[layout.read_BRK[..., 1:][slots_BRS]] = self.mask_ids[index_BRS[slots_BRS]]
        return super().read_student(replace(layout, ids_XT=ids))


@dataclass
class Row:
    """The result of one way: the median seconds per step, and (optimizer steps, agreement) after every measurement."""

    way: str
    seconds_per_step: float = 0.0
    history: list[tuple[int, float]] = field(default_factory=list)

    def seconds_to(self, target: float) -> float | None:
        """Return steps times the median step time, which other load on the machine affects less than the elapsed time."""
        return next((step * self.seconds_per_step for step, agreement in self.history if agreement >= target), None)


class Run:
    """One way of training, in progress."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.options = options
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        model = load_base(BASE).float()
        add_mask_token(model, tokenizer, mask_token="<|mtp|>", k_max=options.k_max, seed=0)
        mask_id, rows = model.config.mtp["mask_token_id"], model.config.vocab_size
        mask_ids = torch.tensor([mask_id, *range(rows, rows + options.k_max - 2)])
        if name == "position rows":
            model.resize_token_embeddings(rows + options.k_max - 2, mean_resizing=False)
            with torch.no_grad():
                model.get_input_embeddings().weight[rows:] = model.get_input_embeddings().weight[mask_id]
        tokens = Tokens(
            mask_id=mask_id,
            pad_id=tokenizer.pad_token_id,
            barred=mask_ids if name == "position rows" else torch.tensor(model.config.mtp["barred_token_ids"]),
            eos=torch.tensor([tokenizer.eos_token_id]),
        )
        trained_as = "full" if name == "position rows" else name
        self.way = Way(trained_as, model, tokens, k_max=options.k_max, slots=options.slots, rank=options.rank)
        if name == "position rows":
            reader = self.way.reader
            self.way.reader = RowForEachPosition(reader.student, reader.teacher, reader.run_teacher, mask_ids=mask_ids)
        self.optimizer = muon_adamw(model, lr=options.learning_rate, weight_decay=0.0)
        self.train = _texts(tokenizer, "train", 200 * options.rows, seed=1)
        self.held_out = _collate(_texts(tokenizer, "test", 64, seed=0), tokens.pad_id)
        self.row, self.step = Row(TRAINED[name]), 0
        self.seconds: list[float] = []  # of each step

    @property
    def is_done(self) -> bool:
        reached = bool(self.row.history) and self.row.history[-1][1] >= self.options.target
        return reached or sum(self.seconds) >= self.options.seconds

    def train_and_measure(self) -> None:
        """Make `--every` optimizer steps, then measure the agreement on held-out text."""
        rows = self.options.rows
        for _ in range(self.options.every):
            first = self.step * rows % len(self.train)
            clean, prompts, lengths = _collate(self.train[first : first + rows], self.way.tokens.pad_id)
            batch = Batch(clean, prompts, lengths, self.way.regions(lengths, prompts, self.step))
            started = time.perf_counter()
            loss, _ = self.way.loss(batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.seconds.append(time.perf_counter() - started)
            self.step += 1
        self.row.seconds_per_step = round(median(self.seconds), 4)
        self.row.history.append((self.step, round(self._agreement(), 4)))

    @torch.no_grad()
    def _agreement(self) -> float:
        clean, prompts, lengths = self.held_out
        k_max = self.options.k_max
        number = self.options.slots // (k_max - 1)  # blocks of k_max positions, evenly spaced over each answer
        share = (torch.arange(number) + 0.5) / number
        anchors = (prompts[:, None] - 1 + share * (lengths - 1 - prompts)[:, None]).long()
        batch = Batch(clean, prompts, lengths, Regions(anchors, torch.full_like(anchors, k_max)))
        sums = distillation_pass(self.way.reader, batch, self.way.tokens, self.way.args, objective="hard").sums
        return float((sums["agree_K"][1:] / sums["positions_K"][1:].clamp(min=1)).mean())


def _texts(tokenizer: Any, split: str, count: int, *, seed: int) -> list[dict[str, list[int]]]:
    texts = prepare_dataset(
        load_dataset(split, count, seed), tokenizer, column_map=None, max_length=256, mask_token="<|mtp|>", desc=split
    )
    return list(texts)


def _collate(texts: list[dict[str, list[int]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = [torch.tensor(text["prompt_ids"] + text["completion_ids"]) for text in texts]
    clean = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id)
    prompts = torch.tensor([len(text["prompt_ids"]) for text in texts])
    return clean, prompts, torch.tensor([len(text) for text in ids])


def measure(options: argparse.Namespace) -> list[Row]:
    runs = [Run(name, options) for name in TRAINED]
    console = Console(stderr=True)
    while unfinished := [run for run in runs if not run.is_done]:
        for run in unfinished:
            run.train_and_measure()
            step, agreement = run.row.history[-1]
            elapsed = f"{sum(run.seconds):.0f} s"
            console.print(f"{run.row.way}: step {step}, {elapsed}, agreement {agreement:.3f}", highlight=False)
    return [run.row for run in runs]


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table.

    It shows the time to the target, or to the largest multiple of 0.05 that every way has reached if that is lower.
    """
    rows, facts = [Row(**row) for row in results["rows"]], results["provenance"]
    reached_by_all = min(max(agreement for _, agreement in row.history) for row in rows)
    target = min(results["target"], int(20 * reached_by_all) / 20)
    first, common = rows[0].seconds_to(target), min(row.history[-1][0] for row in rows)
    lines = [
        f"| training | s per step | agreement after {common} steps | s to {target:g} | speed |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        agreement = dict(row.history)[common]
        reached = row.seconds_to(target)
        times = f"{reached:.0f}" if reached is not None else f"not within {row.history[-1][0] * row.seconds_per_step:.0f}"
        speed = f"{first / reached:.2f}x" if first is not None and reached is not None else "-"
        lines.append(f"| {row.way} | {row.seconds_per_step:.3f} | {agreement:.3f} | {times} | {speed} |")
    lines += ["", f"{facts['date']}, {facts['hardware']}, torch {facts['versions']['torch']}; `{facts['command']}`"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.5, help="agreement to reach, from 0 to 1 (default: 0.5)")
    parser.add_argument("--seconds", type=float, default=300.0, help="largest training time of each way (default: 300)")
    sizes = {"rows": 8, "k_max": 8, "slots": 40, "rank": 64, "every": 20}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    results = {"target": options.target, "rows": [asdict(row) for row in measure(options)], "provenance": run_facts()}
    print(table(results))
    if options.output is not None:
        write_atomically(options.output, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

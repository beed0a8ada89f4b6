"""Cost of a training step with the paper's interleaved layout, with full fine-tuning and in exact mode, on one model.

The ways of training alternate, one optimizer step each, on the same texts, so that other load on the machine affects all ways
equally; the table shows medians. Peak memory is measured in a separate process for each way.

    python benchmarks/train.py                          # 17M parameters, for a CPU
    python benchmarks/train.py --hidden 2048 --layers 16 --heads 32 --vocabulary 128256 --length 512 --dtype bfloat16

All layouts fill the same number of mask slots per clean token. The paper's layout spaces its regions evenly over the whole text
and uses one k per step. Ours places each region anywhere in the completion and draws a k for each region.

The paper's layout is measured twice: with the logits of `model(...)`, which are computed at every position for the student and
the teacher, and with logits only at the positions read, as everywhere else in this project.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mtp_trl import MTPDistillConfig
from mtp_trl.modeling.exact import add_gated_adapter
from mtp_trl.modeling.files import write_atomically
from mtp_trl.publishing.provenance import run_facts
from mtp_trl.training.objective import bar_tokens
from mtp_trl.training.readers import ExactReader, Reader, WholeRowReader, masks_of
from mtp_trl.training.regions import Regions, row_generator, sample_regions, student_forced_ids
from mtp_trl.training.step import Batch, Tokens, build_layout, distillation_pass

WAYS = {
    "plain": "full, the paper's interleaved layout, logits everywhere",
    "interleaved": "full, the paper's interleaved layout",
    "full": "full fine-tuning",
    "exact": "exact mode",
}


@dataclass(frozen=True)
class Row:
    """A result. Positions are those supervised by the loss; `peak_mb` excludes memory used before the model was built."""

    way: str
    seconds: float
    clean_per_second: float
    positions_per_second: float
    peak_mb: float
    trainable: int


class Way:
    """One way to train `model`.

    Args:
        slots: number of mask slots after each text.
    """

    def __init__(self, name: str, model: PreTrainedModel, tokens: Tokens, *, k_max: int, slots: int, rank: int) -> None:
        self.name, self.model, self.tokens = name, model, tokens
        self.args = MTPDistillConfig(
            "unused", k_max=k_max, slots_per_row=slots, use_cpu=model.device.type == "cpu", bf16=False, report_to="none"
        )
        self.reader: Reader
        if name == "exact":
            add_gated_adapter(model, rank=rank, alpha=2 * rank)
            self.reader = ExactReader(model, with_teacher=True)
        else:
            teacher = copy.deepcopy(model).requires_grad_(False).eval()
            self.reader = WholeRowReader(model, teacher, torch.no_grad()(lambda read: read(teacher)))
        model.train()
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def regions(self, lengths_B: Tensor, prompt_lengths_B: Tensor, step: int) -> Regions:
        """Return the paper's evenly spaced regions with one k, or independent regions; both fill the same number of slots."""
        rows, k_max, slots = len(lengths_B), self.args.k_max, self.args.slots_per_row
        if self.name in ("full", "exact"):
            generators = [row_generator(0, step, row) for row in range(rows)]
            first, last = (prompt_lengths_B - 1).tolist(), (lengths_B - 2).tolist()
            return sample_regions(first, last, k_min=2, k_max=k_max, slots=slots, generators=generators)
        rng = np.random.default_rng(step)
        size = int(rng.integers(2, k_max + 1))
        number = slots // (size - 1)
        share_R = (torch.arange(number) + rng.random()) / number
        anchor_BR = (share_R * (lengths_B - 1)[:, None].cpu()).long()
        return Regions(anchor_BR, torch.full_like(anchor_BR, size))

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the mean loss and the number of positions it averages over, in exact mode without the first of each block."""
        if self.name == "plain":
            return self._plain_loss(batch)
        output = distillation_pass(self.reader, batch, self.tokens, self.args, objective="hard")
        return output.loss / output.weight, int(output.weight)

    def _plain_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Compute the loss from two plain forward passes with logits at every position, of the student and of the teacher."""
        layout = build_layout(self.model, batch, self.tokens, self.args)
        masks = masks_of(self.model, layout)

        read_P = layout.read_BRK[layout.drawn_BRK]

        def read_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
            inputs = {"input_ids": ids, "attention_mask": masks, "position_ids": layout.positions_XT, "use_cache": False}
            return bar_tokens(model(**inputs).logits.flatten(0, 1)[read_P], self.tokens.barred)

        student_PV = read_logits(self.model, layout.ids_XT)
        rollout_BRK = layout.read_BRK.new_zeros(layout.drawn_BRK.shape)
        rollout_BRK[layout.drawn_BRK] = student_PV.argmax(-1)
        with torch.no_grad():
            target_P = read_logits(self.reader.teacher, student_forced_ids(layout, rollout_BRK)).argmax(-1)
        return torch.nn.functional.cross_entropy(student_PV, target_P), len(read_P)


class Costs:
    """Optimizer steps of one way on random texts."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.options = options
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        config = LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            intermediate_size=options.hidden * 8 // 3,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            tie_word_embeddings=True,
            max_position_embeddings=4 * options.length,
        )
        model = LlamaForCausalLM(config).to(device, getattr(torch, options.dtype))
        model.config.mtp = {"mask_token_id": options.vocabulary - 1, "k_max": options.k_max, "barred_token_ids": []}
        if options.checkpointing:
            model.gradient_checkpointing_enable()
        tokens = Tokens(
            mask_id=options.vocabulary - 1,
            pad_id=0,
            barred=torch.tensor([options.vocabulary - 1], device=device),
            eos=torch.tensor([1], device=device),
        )
        slots = options.length // (2 * options.k_max) * (options.k_max // 2)
        self.way = Way(name, model, tokens, k_max=options.k_max, slots=slots, rank=options.rank)
        self.optimizer = torch.optim.AdamW(self.way.parameters, lr=1e-5)
        self.count = 0

    def step(self) -> tuple[float, int]:
        """Make one optimizer step; return its seconds and its number of supervised positions."""
        generator = torch.Generator().manual_seed(self.count)
        rows, length = self.options.rows, self.options.length
        clean = torch.randint(3, self.options.vocabulary - 1, (rows, length), generator=generator).to(self.way.model.device)
        lengths = torch.full((rows,), length, device=clean.device)
        prompts = lengths // 3
        batch = Batch(clean, prompts, lengths, self.way.regions(lengths, prompts, self.count))
        self._synchronise()
        started = time.perf_counter()
        loss, positions = self.way.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._synchronise()
        self.count += 1
        return time.perf_counter() - started, positions

    def _synchronise(self) -> None:
        if self.way.model.device.type == "cuda":
            torch.cuda.synchronize()


def peak_mb(name: str, options: argparse.Namespace) -> float:
    """Return the peak memory of three steps, without memory used before: allocated on CUDA, resident on a CPU."""
    before = resident_mb()
    costs = Costs(name, options)
    for _ in range(3):
        costs.step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_mb() - before


def resident_mb() -> float:
    """Return the peak resident memory of this process. On Linux, the value of getrusage would start from the parent's peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def measure(options: argparse.Namespace) -> list[Row]:
    ways = {name: Costs(name, options) for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    positions: dict[str, list[int]] = {name: [] for name in WAYS}
    for step in range(options.steps + 2):
        for name, costs in ways.items():
            duration, count = costs.step()
            if step >= 2:  # the first steps allocate memory
                seconds[name].append(duration)
                positions[name].append(count)
            print(f"\rstep {step + 1} of {options.steps + 2}, {WAYS[name]:<60}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = []
    for name, costs in ways.items():
        median = statistics.median(seconds[name])
        peak_output = subprocess.run(
            [sys.executable, *sys.argv, "--peak", name], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        rows.append(
            Row(
                way=WAYS[name],
                seconds=median,
                clean_per_second=options.rows * options.length / median,
                positions_per_second=statistics.median(positions[name]) / median,
                peak_mb=float(peak_output.split()[-1]),
                trainable=sum(p.numel() for p in costs.way.parameters),
            )
        )
    return rows


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    rows, facts = [Row(**values) for values in results["rows"]], results["provenance"]
    lines = [
        "| training | s per step | clean tokens per s | supervised positions per s | speed | peak memory, MB | trainable |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.way} | {row.seconds:.3f} | {row.clean_per_second:,.0f} | {row.positions_per_second:,.0f} | "
        f"{rows[0].seconds / row.seconds:.2f}x | {row.peak_mb:,.0f} | {row.trainable / 1e6:.2f}M |"
        for row in rows
    ]
    lines += ["", f"{facts['date']}, {facts['hardware']}, torch {facts['versions']['torch']}; `{facts['command']}`"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rows": 8, "length": 160, "k_max": 16, "hidden": 384, "layers": 6, "heads": 6, "vocabulary": 16384, "rank": 32}
    for name, value in {**sizes, "steps": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--peak", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_mb(options.peak, options))
        return
    results = {"rows": [asdict(row) for row in measure(options)], "provenance": run_facts()}
    print(table(results))
    if options.output is not None:
        write_atomically(options.output, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

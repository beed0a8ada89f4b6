"""Exact mode on real text: what an adapter does for SmolLM2-135M-Instruct on prompts of many kinds.

    python benchmarks/real_text.py --prompts FOLDER --minutes 60    # measures what is missing; started again, it goes on
    python benchmarks/real_text.py                                  # prints every number from docs/results/real_text.json

FOLDER is that of `benchmarks/real_model.py`, with `gsm8k/test.jsonl` and `prompts/eval_*.jsonl`. The adapters are folders
written by recipes/smollm2_exact.yaml: `--adapter mixed=runs/smollm2/exact --adapter math=runs/smollm2/exact_math`.

Every measurement is a *cell* with a name such as `text/gsm8k/mixed/float32/1/0.3`. A cell is written as soon as it is finished,
with its date, and is measured again only if the adapter's weights have changed.

    text      tokens per pass and the share of texts equal to the base's greedy text, at a number of blocks and a threshold
    speed     tokens per second of several ways to decode, which alternate on the same prompts
    loss      ConfAdapt without verification: share of texts equal to the base's
    context   tokens per pass after contexts of 512 to 4,096 tokens
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from real_model import FOLDER, Messages, read_prompts
from rich.console import Console
from rich.markdown import Markdown
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from mtp_trl.custom_generate.adapter import adapter_of
from mtp_trl.custom_generate.adapter_file import ADAPTER_FILE
from mtp_trl.custom_generate.generate import attach_decoder
from mtp_trl.custom_generate.repository import attach_adapter
from mtp_trl.evaluation.loading import load_tokenizer
from mtp_trl.evaluation.sweep import answer_length, end_of_text_ids
from mtp_trl.modeling.files import write_atomically
from mtp_trl.publishing.provenance import run_facts

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "real_text.json"
# The sets of ../prompts and their sizes; the last two are made here.
SETS = {
    "gsm8k": ("gsm8k/test", 100),
    "mt_bench": ("prompts/eval_mt_bench", 80),
    "humaneval": ("prompts/eval_humaneval", 80),
    "mbpp": ("prompts/eval_mbpp", 100),
    "math500": ("prompts/eval_math500", 100),
    "summaries": ("prompts/eval_summaries", 100),
    "counting": ("", 10),
    "repeating": ("", 10),
}
SIX = list(SETS)[:6]
THRESHOLDS, BLOCKS = (0.5, 0.3, 0.1), (1, 8)
LOSSES = (0.95, 0.9, 0.7, 0.5)
CONTEXTS = (512, 1024, 2048, 4096)
# Prompts and new tokens of each batch size in the measurements of speed.
SPEED_PROMPTS, SPEED_TOKENS = {1: 6, 4: 8, 16: 16}, 96
LONGEST_ANSWER, BATCH = 128, 16
DEFAULT_THRESHOLD = 0.3


def prompts_of(name: str, folder: Path) -> list[Messages]:
    """Return the prompts of a set as messages."""
    file, count = SETS[name]
    if file:
        return read_prompts(file, folder)[:count]
    if name == "counting":
        texts = [f"Count from {start} to {start + 30}, separated by commas." for start in range(1, 101, 10)]
    else:
        words = ("sun", "river", "blue sky", "open door", "green hill", "old clock", "red car", "small boat", "cold tea", "owl")
        texts = [f"Repeat the words '{word}' twenty times." for word in words]
    return [[{"role": "user", "content": text}] for text in texts[:count]]


class Bench:
    """The models and the cells measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder, self.prompts = options.base, options.prompts
        self.adapters: dict[str, Path] = dict(options.adapter)
        self.results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"cells": {}}
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.folder)
        self.loaded: tuple[Any, Any] = (None, None)
        self.ends = time.monotonic() + 60 * options.minutes

    # ---- models and prompts ----

    def model(self, adapter: str | None, dtype: str = "float32") -> PreTrainedModel:
        """Return the base with an adapter, or without one. One model is in memory at a time."""
        if self.loaded[0] != (adapter, dtype):
            self.loaded = (None, None)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, dtype)).to(device).eval()
            if adapter is not None:
                attach_adapter(attach_decoder(model), str(self.adapters[adapter]))
            self.loaded = ((adapter, dtype), model)
        found: PreTrainedModel = self.loaded[1]
        return found

    def encode(self, messages: Messages) -> list[int]:
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(
        self, model: PreTrainedModel, prompts: Sequence[list[int]], new: int, *, ours: bool, **options: Any
    ) -> tuple[list[list[int]], int, float, list[list[int]]]:
        """Return the answers through EOS, the passes of all rows, the seconds, and the tokens of each pass of each row."""
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt").to(model.device)
        generate: Callable[..., Any] = model.generate if ours else lambda **inputs: GenerationMixin.generate(model, **inputs)
        adapter = adapter_of(model)
        if adapter is not None:  # without its hooks, the model is the bare base
            adapter.hook(model, ours)
        started = time.perf_counter()
        output = generate(
            **batch,
            max_new_tokens=new,
            do_sample=False,
            return_dict_in_generate=True,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        generated = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
        seconds = time.perf_counter() - started
        answers = [row[: answer_length(row, end_of_text_ids(model))] for row in generated]
        lengths = output.block_lengths if ours else [[1] * len(answer) for answer in answers]
        return answers, sum(map(len, lengths)), seconds, lengths

    def base_texts(self, name: str, dtype: str = "float32") -> list[list[int]]:
        """Return the base's greedy answers to a set, by transformers' own generate. They are kept in the base's folder."""
        path = self.folder.parent / "measured" / f"{name}_{dtype}.json"
        if not path.is_file():
            model, texts = self.model(None, dtype), []
            prompts = list(map(self.encode, prompts_of(name, self.prompts)))
            for start in range(0, len(prompts), BATCH):
                texts += self.decode(model, prompts[start : start + BATCH], LONGEST_ANSWER, ours=False)[0]
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(texts))
        recorded: list[list[int]] = json.loads(path.read_text(encoding="utf-8"))
        return recorded

    # ---- cells ----

    def cells(self) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
        """Yield name, adapter and measurement of every cell, the most important ones first."""
        first, *others = self.adapters
        for name in SETS:
            for blocks in BLOCKS:
                yield self.text_cell(name, first, "float32", blocks, DEFAULT_THRESHOLD)
        for size, name in itertools.product(SPEED_PROMPTS, SIX):
            yield f"speed/{name}/{first}/{size}", first, lambda n=name, s=size: self.speed(n, first, s)  # type: ignore[misc]
        for other, name in itertools.product(others, SETS):  # transfer
            yield self.text_cell(name, other, "float32", 1, DEFAULT_THRESHOLD)
        for length in CONTEXTS:
            yield f"context/{first}/{length}", first, lambda n=length: self.context(first, n)  # type: ignore[misc]
        for name in SIX:
            yield self.text_cell(name, first, "bfloat16", 1, DEFAULT_THRESHOLD)
        for threshold in LOSSES:
            yield f"loss/gsm8k/{first}/{threshold}", first, lambda t=threshold: self.loss(first, t)  # type: ignore[misc]
        for threshold, blocks, name in itertools.product(THRESHOLDS, BLOCKS, SIX):
            if threshold != DEFAULT_THRESHOLD:
                yield self.text_cell(name, first, "float32", blocks, threshold)

    def text_cell(
        self, name: str, adapter: str, dtype: str, blocks: int, threshold: float
    ) -> tuple[str, str, Callable[[], dict[str, Any]]]:
        measure = lambda: self.text(name, adapter, dtype, blocks, threshold)  # noqa: E731
        return f"text/{name}/{adapter}/{dtype}/{blocks}/{threshold}", adapter, measure

    def text(self, name: str, adapter: str, dtype: str, blocks: int, threshold: float) -> dict[str, Any]:
        """Decode a set with verification; compare its texts with the base's in the same dtype."""
        expected = self.base_texts(name, dtype)
        model, k_max = self.model(adapter, dtype), self.k_max(adapter)
        prompts = list(map(self.encode, prompts_of(name, self.prompts)))
        options = {"verify": True, "confadapt": threshold, "mtp_k": k_max, "mtp_blocks": blocks}
        texts: list[list[int]] = []
        passes = 0
        for start in range(0, len(prompts), BATCH):
            found, count, *_ = self.decode(model, prompts[start : start + BATCH], LONGEST_ANSWER, ours=True, **options)
            texts, passes = texts + found, passes + count
        same = sum(a == b for a, b in zip(texts, expected, strict=True))
        return {"prompts": len(texts), "identical": same, "tokens": sum(map(len, texts)), "passes": passes}

    def speed(self, name: str, adapter: str, size: int) -> dict[str, Any]:
        """Time the ways to decode, in turn on each batch, after one untimed batch; return tokens per second of each."""
        model, k_max = self.model(adapter), self.k_max(adapter)
        verified = {"verify": True, "confadapt": DEFAULT_THRESHOLD}
        ways: dict[str, tuple[bool, dict[str, Any]]] = {
            "transformers, greedy": (False, {}),
            "k=1": (True, {"mtp_k": 1}),
            "verified, one block": (True, {**verified, "mtp_k": k_max}),
            "verified, default": (True, verified),
        }
        if size == 1:
            ways["transformers, prompt lookup"] = (False, {"prompt_lookup_num_tokens": 10})
        prompts = list(map(self.encode, prompts_of(name, self.prompts)[: SPEED_PROMPTS[size] + size]))
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for start in range(0, len(prompts) - size + 1, size):
            for way, (ours, options) in ways.items():
                texts, _, seconds, _ = self.decode(model, prompts[start : start + size], SPEED_TOKENS, ours=ours, **options)
                if start:
                    speeds[way].append(sum(map(len, texts)) / seconds)
        return {"tokens_per_second": {way: statistics.median(values) for way, values in speeds.items()}}

    def loss(self, adapter: str, threshold: float) -> dict[str, Any]:
        """Decode GSM8K with ConfAdapt, without verification."""
        expected, model = self.base_texts("gsm8k"), self.model(adapter)
        prompts = list(map(self.encode, prompts_of("gsm8k", self.prompts)))
        texts: list[list[int]] = []
        passes = 0
        for start in range(0, len(prompts), BATCH):
            options = {"verify": False, "confadapt": threshold}
            found, count, *_ = self.decode(model, prompts[start : start + BATCH], LONGEST_ANSWER, ours=True, **options)
            texts, passes = texts + found, passes + count
        same = sum(a == b for a, b in zip(texts, expected, strict=True))
        return {"prompts": len(texts), "identical": same, "tokens": sum(map(len, texts)), "passes": passes}

    def context(self, adapter: str, length: int) -> dict[str, Any]:
        """Decode after a context of solved problems that fills `length` tokens; return tokens and passes."""
        model, k_max = self.model(adapter), self.k_max(adapter)
        questions, answers = prompts_of("gsm8k", self.prompts), self.base_texts("gsm8k")
        texts = [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        tokens = passes = 0
        for row in range(4):
            messages: Messages = [questions[row]][0]
            for other in range(4, len(questions)):
                turn = [*questions[other], {"role": "assistant", "content": texts[other]}]
                if len(self.encode([*turn, *messages])) > length:
                    break
                messages = [*turn, *messages]
            options = {"verify": True, "confadapt": DEFAULT_THRESHOLD, "mtp_k": k_max}
            found, count, *_ = self.decode(model, [self.encode(messages)], LONGEST_ANSWER, ours=True, **options)
            tokens, passes = tokens + len(found[0]), passes + count
        return {"tokens": tokens, "passes": passes}

    def k_max(self, adapter: str) -> int:
        return int(self.model(adapter).mtp_adapter.mtp["k_max"])

    def run(self) -> None:
        """Measure the missing cells until the time is over."""
        console = Console(stderr=True)
        digests = {
            name: hashlib.sha256((folder / ADAPTER_FILE).read_bytes()).hexdigest()[:16]
            for name, folder in self.adapters.items()
        }
        for name, adapter, measure in self.cells():
            if self.results["cells"].get(name, {}).get("adapter") == digests[adapter]:
                continue
            if time.monotonic() > self.ends:
                console.print("The time is over; start again to go on.")
                return
            started = time.monotonic()
            cell = measure()
            facts = run_facts()
            self.results["cells"][name] = {**cell, "adapter": digests[adapter], "date": facts["date"]}
            self.results["provenance"] = facts
            write_atomically(RESULTS, json.dumps(self.results, indent=1) + "\n")
            console.print(f"{name}: {cell} ({time.monotonic() - started:.0f} s)", highlight=False)


def table(results: dict[str, Any]) -> str:
    """Return all measurements as Markdown tables."""
    cells: dict[str, dict[str, Any]] = results["cells"]
    by_kind: dict[str, list[tuple[list[str], dict[str, Any]]]] = {}
    for name, cell in cells.items():
        kind, *parts = name.split("/")
        by_kind.setdefault(kind, []).append((parts, cell))
    lines = [
        "| adapter | dtype | blocks | threshold | " + " | ".join(SETS) + " | mean of six | identical texts |",
        "| --- | --- | ---: | ---: |" + " ---: |" * (len(SETS) + 2),
    ]
    settings = sorted({tuple(parts[1:]) for parts, _ in by_kind.get("text", [])}, key=str)
    for setting in settings:
        found = {parts[0]: cell for parts, cell in by_kind["text"] if tuple(parts[1:]) == setting}
        rates = {name: cell["tokens"] / cell["passes"] for name, cell in found.items()}
        mean = f"{statistics.mean(rates[name] for name in SIX):.2f}" if set(SIX) <= set(rates) else "-"
        same = f"{sum(cell['identical'] for cell in found.values())} of {sum(cell['prompts'] for cell in found.values())}"
        columns = [f"{rates[name]:.2f}" if name in rates else "-" for name in SETS]
        lines.append("| " + " | ".join([*setting, *columns, mean, same]) + " |")
    if "speed" in by_kind:
        ways = list(dict.fromkeys(way for _, cell in by_kind["speed"] for way in cell["tokens_per_second"]))
        lines += ["", "| batch | set | " + " | ".join(ways) + " |", "| ---: | --- |" + " ---: |" * len(ways)]
        for parts, cell in by_kind["speed"]:
            speeds = cell["tokens_per_second"]
            greedy = speeds["transformers, greedy"]
            values = [f"{speeds[way]:.1f} ({speeds[way] / greedy:.2f})" if way in speeds else "-" for way in ways]
            lines.append(f"| {parts[2]} | {parts[0]} | " + " | ".join(values) + " |")
    if "loss" in by_kind:
        lines += ["", "| ConfAdapt, unverified | tokens per pass | identical texts |", "| ---: | ---: | ---: |"]
        for parts, cell in by_kind["loss"]:
            rate = cell["tokens"] / cell["passes"]
            lines.append(f"| {parts[2]} | {rate:.2f} | {cell['identical']} of {cell['prompts']} |")
    if "context" in by_kind:
        lines += ["", "| context, tokens | tokens per pass |", "| ---: | ---: |"]
        lines += [f"| {parts[1]} | {cell['tokens'] / cell['passes']:.2f} |" for parts, cell in by_kind["context"]]
    facts = results["provenance"]
    dates = sorted({cell["date"] for cell in cells.values()})
    versions = f"torch {facts['versions']['torch']}, transformers {facts['versions']['transformers']}"
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return "\n".join([*lines, "", f"{span}, {facts['hardware']}, {versions}; `python benchmarks/real_text.py`"]) + "\n"


def main() -> None:
    """Measure what is missing, if the prompts are given, and print the tables."""

    def named(text: str) -> tuple[str, Path]:
        name, _, folder = text.partition("=")
        return name, Path(folder)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="folder of the prompts; without it, only the tables are printed")
    parser.add_argument("--base", type=Path, default=FOLDER / "base")
    parser.add_argument("--adapter", type=named, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--minutes", type=float, default=60, help="begin no cell after this time (default: 60)")
    options = parser.parse_args()
    if options.prompts is not None:
        options.adapter = options.adapter or [("mixed", FOLDER / "exact")]
        Bench(options).run()
    if not RESULTS.is_file():
        parser.error(f"{RESULTS.name} does not exist yet; measure with --prompts")
    Console().print(Markdown(table(json.loads(RESULTS.read_text(encoding="utf-8")))))


if __name__ == "__main__":
    main()

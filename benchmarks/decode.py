"""Compares the speed of several ways of decoding in one process, with the same weights and prompts.

    python benchmarks/decode.py models/tiny_exact_long --base mtp_trl/word_problems/base --output docs/results/decode.json

Step efficiency is the speed-up over transformers' greedy decoding of the base, divided by the tokens per forward pass. It is 1
if a pass over a block takes as long as a pass over one token.

If no trained model is available, `--llama 1b` or `8b` builds a model of that size with random weights in bfloat16, and
`--accepted FILE` replays the number of tokens that each step accepts (a JSON list, such as `block_lengths` of a trained model).
The cost of a step is then real, but the text is not.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, CompileConfig, GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mtp_trl.custom_generate.choice import Choice, Chosen
from mtp_trl.custom_generate.generate import attach_decoder
from mtp_trl.evaluation.loading import load_tokenizer
from mtp_trl.evaluation.tasks import load_task
from mtp_trl.modeling.files import write_atomically
from mtp_trl.publishing.provenance import run_facts

LLAMAS = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
Encoded = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Way:
    """One way to decode.

    Attributes:
        ours: whether this project's `generate` decodes the student; otherwise transformers' `generate` decodes the base.
        single_row: whether it supports only batches of one row.
    """

    name: str
    ours: bool
    arguments: dict[str, Any]
    single_row: bool = False


@dataclass(frozen=True)
class Row:
    way: str
    batch_size: int
    tokens: int
    seconds: float
    tokens_per_pass: float | None
    same_as_greedy: float


def ways(threshold: float, k_max: int, *, compiled: bool) -> list[Way]:
    shapes = {"cache_implementation": "static", "compile_config": compile_config()}
    verified = {"verify": True, "confadapt": threshold, "mtp_k": k_max}
    listed = [
        Way("transformers, greedy", False, {}),
        Way("transformers, prompt lookup", False, {"prompt_lookup_num_tokens": 10}, single_row=True),
        Way("k=1", True, {"mtp_k": 1, "verify": False}),
        Way(f"static k={k_max // 2}", True, {"mtp_k": k_max // 2, "confadapt": 0.0, "verify": False}),
        Way("ConfAdapt 0.9", True, {"confadapt": 0.9, "verify": False}),
        Way(f"verified {threshold:g}", True, verified),
        Way(f"verified {threshold:g}, {k_max} blocks", True, {**verified, "mtp_blocks": k_max}),
        Way(f"verified {threshold:g}, auto", True, {**verified, "mtp_k": "auto"}),
    ]
    if compiled:
        # With a fixed cache length, transformers does not recompile for every prompt length. Ours rounds the length itself.
        listed.insert(1, Way("transformers, compiled static cache", False, {**shapes, "max_cache_len": 512}))
        listed.append(Way(f"verified {threshold:g}, compiled static cache", True, {**verified, **shapes}))
    return listed


def compile_config() -> CompileConfig:
    """Return a config that also compiles on CPUs; by default, transformers compiles only on accelerators."""
    config = CompileConfig(dynamic=False, mode=None if not torch.cuda.is_available() else "reduce-overhead")
    config._compile_all_devices = True
    return config


@contextmanager
def replayed(accepted: list[int] | None) -> Iterator[None]:
    """Make verified steps accept the listed numbers of tokens, in a cycle, instead of comparing drafts with the model."""
    if accepted is None:
        yield
        return
    lengths, choose = itertools.cycle(accepted), Choice.__call__

    def scripted(self: Any, logits: Any, alive: Any, k: int, blocks: int, *, masks: int) -> Iterator[Any]:
        for row, _ in zip(alive, list(choose(self, logits, alive, k, blocks, masks=masks)), strict=True):
            count = min(next(lengths) - 1, len(row.drafts))
            chosen = [token if position < count else token + 1 for position, token in enumerate(row.drafts)]
            yield Chosen([*chosen, 7], {end: [7] * (k - 1) for end in range(len(row.drafts) + 1)})

    Choice.__call__ = scripted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Choice.__call__ = choose  # type: ignore[method-assign]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Tally:
    tokens: int = 0
    seconds: float = 0.0
    passes: int | None = 0
    texts: list[list[int]] | None = None


def measure(
    base: PreTrainedModel, student: PreTrainedModel, batches: list[Encoded], listed: list[Way], *, new: int, pad: int
) -> dict[str, Tally]:
    """Decode every batch in every way, alternating between the ways. A first, untimed call of each way warms it up."""
    tallies = {way.name: Tally(texts=[]) for way in listed}
    eos = base.generation_config.eos_token_id
    eos = {eos} if isinstance(eos, int) else set(eos or [])
    barred = {"suppress_tokens": student.config.mtp["barred_token_ids"]}

    def call(way: Way, batch: Encoded) -> Any:
        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": pad, "return_dict_in_generate": True}
        if way.ours:
            return student.generate(**batch, **options, **way.arguments)
        return GenerationMixin.generate(base, **batch, **options, **barred, **way.arguments)

    for way in listed:
        call(way, batches[0])
    for batch in track(batches, f"batch {len(batches[0]['input_ids'])}"):
        for way in listed:
            gc.collect()  # so that garbage of another way is not collected while this one is timed
            synchronise()
            started = time.perf_counter()
            output = call(way, batch)
            synchronise()
            tally = tallies[way.name]
            tally.seconds += time.perf_counter() - started
            answers = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
            lengths = [next((i + 1 for i, token in enumerate(a) if token in eos), len(a)) for a in answers]
            tally.tokens += sum(lengths)
            tally.texts += [answer[:length] for answer, length in zip(answers, lengths, strict=True)]
            passes = int(output.forward_passes.sum()) if way.ours else None if way.single_row else sum(lengths)
            tally.passes = None if passes is None or tally.passes is None else tally.passes + passes
    return tallies


def rows_of(tallies: dict[str, Tally], size: int) -> Iterator[Row]:
    greedy = tallies["transformers, greedy"].texts or []
    for name, tally in tallies.items():
        same = sum(a == b for a, b in zip(tally.texts or [], greedy, strict=True)) / len(greedy)
        per_pass = None if tally.passes is None else tally.tokens / tally.passes
        yield Row(name, size, tally.tokens, tally.seconds, per_pass, same)


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| batch | decoding | tokens per pass | tokens per s | times transformers' greedy | step efficiency | same text, % |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = [Row(**values) for values in results["rows"]]
    for row in rows:
        greedy = next(other for other in rows if other.batch_size == row.batch_size)
        speed = row.tokens / row.seconds
        ratio = speed / (greedy.tokens / greedy.seconds)
        per_pass = "-" if row.tokens_per_pass is None else f"{row.tokens_per_pass:.2f}"
        efficiency = "-" if row.tokens_per_pass is None else f"{ratio / row.tokens_per_pass:.2f}"
        same = "-" if results["accepted"] else f"{100 * row.same_as_greedy:.1f}"
        lines.append(f"| {row.batch_size} | {row.way} | {per_pass} | {speed:,.0f} | {ratio:.2f} | {efficiency} | {same} |")
    facts = results["provenance"]
    versions = f"torch {facts['versions']['torch']}, transformers {facts['versions']['transformers']}"
    lines += ["", f"{results['title']}. {facts['date']}, {facts['hardware']}, {versions}; `{facts['command']}`"]
    return "\n".join(lines) + "\n"


def models(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return the base and the student on the device: from two folders, or one model with random weights for both."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.llama is None:
        base = AutoModelForCausalLM.from_pretrained(options.base or options.model)
        student = attach_decoder(AutoModelForCausalLM.from_pretrained(options.model))  # not the decoder in the folder
        return base.to(device).eval(), student.to(device).eval()
    sizes = {"vocab_size": 128_256, "num_key_value_heads": LLAMAS[options.llama]["num_attention_heads"] // 4}
    config = LlamaConfig(**{**sizes, **LLAMAS[options.llama]}, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    config.mtp = {"mask_token": "<|mtp|>", "mask_token_id": 3, "k_max": 8, "barred_token_ids": [3]}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model, attach_decoder(model)


def prompts(options: argparse.Namespace) -> tuple[str, Callable[[int], list[Encoded]], int]:
    """Return a title, a function that splits the prompts into batches of a size, and the pad token."""
    if options.llama is not None:
        ids = torch.randint(4, 100_000, (options.problems, 128), generator=torch.Generator().manual_seed(0))
        new = options.max_new_tokens
        return (
            f"Llama of {options.llama} size, random weights, 128 prompt tokens, {new} new tokens, accepted lengths replayed",
            lambda size: [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)],
            2,
        )
    task, tokenizer = load_task("word_problems", limit=options.problems), load_tokenizer(options.model)

    def batches(size: int) -> list[Encoded]:
        parts = [task.prompts[start : start + size] for start in range(0, len(task.prompts), size)]
        return [dict(tokenizer(part, padding=True, padding_side="left", return_tensors="pt")) for part in parts]

    return (
        f"{len(task.prompts)} held-out word problems, up to {options.max_new_tokens} new tokens",
        batches,
        tokenizer.pad_token_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or Hub id of an adapted model")
    parser.add_argument("--base", help="model that transformers decodes (default: the adapted model)")
    parser.add_argument("--llama", choices=LLAMAS, help="decode a Llama of this size with random weights instead")
    parser.add_argument("--accepted", type=Path, help="JSON list of accepted lengths to replay in verified decoding")
    parser.add_argument("--problems", type=int, default=48)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--threshold", type=float, default=0.5, help="threshold of verified decoding")
    parser.add_argument("--compiled", action="store_true", help="also measure torch.compile with static caches")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    if (options.model is None) == (options.llama is None):
        parser.error("give either a model or a --llama size.")
    if (options.accepted is None) != (options.llama is None):
        parser.error("--accepted is required with --llama, and not allowed with a trained model, which accepts its own drafts.")

    base, student = models(options)
    title, batches_of, pad = prompts(options)
    accepted = None if options.accepted is None else json.loads(options.accepted.read_text(encoding="utf-8"))
    listed = ways(options.threshold, student.config.mtp["k_max"], compiled=options.compiled)
    if accepted is not None:  # replayed lengths make sense only for verified decoding with one block
        listed = [way for way in listed if not way.ours or (way.arguments["verify"] and "mtp_blocks" not in way.arguments)]
    rows: list[Row] = []
    for size in options.batches:
        batches = [{name: ids.to(student.device) for name, ids in batch.items()} for batch in batches_of(size)]
        supported = [way for way in listed if size == 1 or not way.single_row]
        with torch.inference_mode(), replayed(accepted):
            rows += rows_of(measure(base, student, batches, supported, new=options.max_new_tokens, pad=pad), size)
    results = {"title": title, "accepted": accepted, "rows": [asdict(row) for row in rows], "provenance": run_facts()}
    print(table(results))
    if options.output is not None:
        write_atomically(options.output, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Is verified decoding of an exact-mode model the base's own text? Compares token by token with transformers' greedy
decoding of the base; where bfloat16 differs, says how near a tie the first different token was.

    python benchmarks/exactness.py demo_out/model mtp_trl/word_problems/base --problems 500 --batches 1,16
    python benchmarks/exactness.py demo_out/model mtp_trl/word_problems/base --data gsm8k/test.jsonl --problems 200 \
        --prompt-column question --template "Question: {}\\nAnswer:" --dtypes float32,bfloat16 --output docs/results/x.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, PreTrainedModel

from mtp_trl.evaluation.models import load_tokenizer
from mtp_trl.evaluation.tasks import load_task
from mtp_trl.hub import run_facts, write_atomically

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Difference:
    """Where two texts part: the base's float32 logits of the two tokens, and the step of bfloat16 at their size."""

    problem: int
    token: int
    gap: float
    step: float


@dataclass(frozen=True)
class Row:
    dtype: str
    batch_size: int
    blocks: int
    threshold: float
    problems: int
    identical: int
    tokens: int
    tokens_per_pass: float
    differences: list[Difference]


def decode(model: PreTrainedModel, tokenizer: Any, prompts: list[str], new: int, **options: Any) -> tuple[list[list[int]], int]:
    """Generated tokens of each prompt up to its end of text, and forward passes."""
    encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    output = model.generate(
        **encoded,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    answers = output.sequences[:, encoded["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    texts = [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]
    return texts, int(output.forward_passes.sum()) if hasattr(output, "forward_passes") else 0


@torch.no_grad()
def difference(
    base: PreTrainedModel, tokenizer: Any, problem: int, prompt: str, own: list[int], other: list[int]
) -> Difference:
    """How the base in float32 ranks the two tokens at which the texts part."""
    place = next(i for i, pair in enumerate(zip([*own, -1], [*other, -1], strict=False)) if pair[0] != pair[1])
    ids = torch.tensor([tokenizer(prompt)["input_ids"] + own[:place]], device=base.device)
    logits = base(input_ids=ids).logits[0, -1].float()
    first, second = (logits[text[place]].item() if place < len(text) else -torch.inf for text in (own, other))
    step = torch.finfo(torch.bfloat16).eps * 2.0 ** torch.tensor(abs(first)).log2().floor().item()
    return Difference(problem, place, first - second, step)


def load(name: str, dtype: str, **options: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], **options)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def compare(options: argparse.Namespace, prompts: list[str], dtype: str) -> Iterator[Row]:
    """Verified decoding in every batch size and with every number of blocks, against the base one by one."""
    tokenizer, new = load_tokenizer(options.model), options.max_new_tokens
    judge, base = load(options.base, "float32"), load(options.base, dtype)
    student = load(options.model, dtype, trust_remote_code=True)
    barred = {"suppress_tokens": student.config.mtp["barred_token_ids"]}
    own = [decode(base, tokenizer, [prompt], new, **barred)[0][0] for prompt in track(prompts, f"base, {dtype}")]
    for size, blocks in itertools.product(options.batches, options.blocks):
        texts, passes = [], 0
        settings = {"confadapt": options.threshold, "verify": True, "mtp_blocks": blocks}
        for start in track(range(0, len(prompts), size), f"verified, {dtype}, batch {size}, {blocks} block(s)"):
            found, count = decode(student, tokenizer, prompts[start : start + size], new, **settings)
            texts, passes = texts + found, passes + count
        differences = [
            difference(judge, tokenizer, i, prompts[i], own[i], text) for i, text in enumerate(texts) if text != own[i]
        ]
        tokens, same = sum(map(len, texts)), len(texts) - len(differences)
        yield Row(dtype, size, blocks, options.threshold, len(texts), same, tokens, tokens / passes, differences)


def table(results: dict[str, Any]) -> str:
    """Markdown, of what the JSON holds."""
    lines = [
        "| dtype | batch | blocks of masks | tokens per pass | identical texts | gap where they part, bfloat16 steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in (Row(**values) for values in results["rows"]):
        gaps = [abs(d["gap"]) / d["step"] for d in map(dict, row.differences)]
        apart = f"median {statistics.median(gaps):.2f}, largest {max(gaps):.2f}" if gaps else "-"
        lines.append(
            f"| {row.dtype} | {row.batch_size} | {row.blocks} | {row.tokens_per_pass:.2f} | "
            f"{row.identical} of {row.problems} | {apart} |"
        )
    facts = results["provenance"]
    lines += ["", f"{facts['date']}, {facts['hardware']}, torch {facts['versions']['torch']}; `{facts['command']}`"]
    return "\n".join(lines) + "\n"


def main() -> None:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("base")
    parser.add_argument("--data", default="word_problems", help="word_problems or a JSON Lines file")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--template", default="{}", help="what a prompt is put into")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--batches", type=integers, default=[1, 16])
    parser.add_argument("--blocks", type=integers, default=[1], help="mtp_blocks")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()

    task = load_task(options.data, limit=options.problems, prompt=options.prompt_column)
    template = options.template.replace("\\n", "\n")
    prompts = [template.format(prompt) for prompt in task.prompts]
    rows = []
    for dtype in options.dtypes.split(","):
        for row in compare(options, prompts, dtype):
            rows.append(asdict(row))
            print(f"{task.title}: {row.identical} of {row.problems} texts identical ({dtype})", flush=True)
    results = {"rows": rows, "provenance": run_facts()}
    print(table(results))
    if options.output is not None:
        write_atomically(options.output, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

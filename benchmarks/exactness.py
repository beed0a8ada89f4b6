"""Does verified decoding of an exact-mode model return the base's own text? Compares it token by token with transformers'
greedy decoding of the base. If texts differ in bfloat16, reports how close to a tie the first different tokens are.

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

from mtp_trl.evaluation.loading import load_tokenizer
from mtp_trl.evaluation.tasks import load_task
from mtp_trl.modeling.files import write_atomically
from mtp_trl.publishing.provenance import run_facts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Difference:
    """The first position at which two texts differ.

    Attributes:
        problem: index of the problem.
        token: position in the generated text.
        gap: difference between the base's float32 logits of the two tokens.
        rounding: change of that gap in the dtype under test.
    """

    problem: int
    token: int
    gap: float
    rounding: float


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
    """Return the generated tokens of each prompt, up to and including EOS, and the number of forward passes."""
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
    eos = model.generation_config.eos_token_id
    eos = {eos} if isinstance(eos, int) else set(eos or [])
    lengths = [next((i + 1 for i, token in enumerate(answer) if token in eos), len(answer)) for answer in answers]
    texts = [answer[:length] for answer, length in zip(answers, lengths, strict=True)]
    return texts, int(output.forward_passes.sum()) if hasattr(output, "forward_passes") else 0


@torch.no_grad()
def difference(
    float32_base: PreTrainedModel, base: PreTrainedModel, ids: list[int], problem: int, expected: list[int], found: list[int]
) -> Difference:
    """Compare the base's logits of the first two tokens that differ, in float32 and in the dtype under test.

    If one text is a prefix of the other, the gap is infinite.
    """
    position = next(i for i, pair in enumerate(zip([*expected, -1], [*found, -1], strict=False)) if pair[0] != pair[1])
    text = torch.tensor([ids + expected[:position]], device=base.device)
    if position in (len(expected), len(found)):
        return Difference(problem, position, float("inf"), 0.0)
    gaps = []
    for model in (float32_base, base):
        logits = model(input_ids=text).logits[0, -1].float()
        gaps.append((logits[expected[position]] - logits[found[position]]).item())
    return Difference(problem, position, gaps[0], gaps[1] - gaps[0])


def load(name: str, dtype: str, **options: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], **options)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def compare(options: argparse.Namespace, prompts: list[str], dtype: str) -> Iterator[Row]:
    """Yield a row for every batch size and number of blocks. The base, with which they are compared, decodes single prompts."""
    tokenizer, new = load_tokenizer(options.model), options.max_new_tokens
    float32_base, base = load(options.base, "float32"), load(options.base, dtype)
    student = load(options.model, dtype, trust_remote_code=True)
    barred = {"suppress_tokens": student.config.mtp["barred_token_ids"]}
    expected = [decode(base, tokenizer, [prompt], new, **barred)[0][0] for prompt in track(prompts, f"base, {dtype}")]
    for size, blocks in itertools.product(options.batches, options.blocks):
        texts, passes = [], 0
        settings = {"confadapt": options.threshold, "verify": True, "mtp_blocks": blocks}
        for start in track(range(0, len(prompts), size), f"verified, {dtype}, batch {size}, {blocks} block(s)"):
            found, count = decode(student, tokenizer, prompts[start : start + size], new, **settings)
            texts, passes = texts + found, passes + count
        differences = [
            difference(float32_base, base, tokenizer(prompts[i])["input_ids"], i, expected[i], text)
            for i, text in enumerate(texts)
            if text != expected[i]
        ]
        tokens, same = sum(map(len, texts)), len(texts) - len(differences)
        yield Row(dtype, size, blocks, options.threshold, len(texts), same, tokens, tokens / passes, differences)


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| dtype | batch | blocks of masks | tokens per pass | identical texts | gap where they differ | changed by rounding |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in (Row(**values) for values in results["rows"]):
        parts = [
            f"median {statistics.median(sizes):.3f}, largest {max(sizes):.3f}" if sizes else "-"
            for sizes in ([abs(d[name]) for d in map(dict, row.differences)] for name in ("gap", "rounding"))
        ]
        lines.append(
            f"| {row.dtype} | {row.batch_size} | {row.blocks} | {row.tokens_per_pass:.2f} | "
            f"{row.identical} of {row.problems} | {parts[0]} | {parts[1]} |"
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
    parser.add_argument("--template", default="{}", help="template of a prompt; {} is replaced by the prompt column")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--batches", type=integers, default=[1, 16])
    parser.add_argument("--blocks", type=integers, default=[1], help="values of mtp_blocks, separated by commas")
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

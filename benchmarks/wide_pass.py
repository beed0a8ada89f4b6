"""Cost of exact mode's adapter in a decoding pass: a pass over text and masks with the adapter, against the bare base's.

    python benchmarks/wide_pass.py runs/smollm2/base --rank 32 --output docs/results/wide_pass.json

Both passes alternate, so that other load on the machine affects both equally. The ratio of a shape is the median over all
pairs, with its quartiles. An adapter with random weights is used: its cost does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from mtp_trl.modeling.exact import add_gated_adapter
from mtp_trl.modeling.files import write_atomically
from mtp_trl.publishing.provenance import run_facts

# Rows, columns and masks of a pass.
SHAPES = [(1, 4, 3), (1, 8, 7), (1, 15, 7), (1, 16, 12), (4, 8, 7), (16, 8, 7)]
CONTEXT = 128  # tokens in the cache


@torch.no_grad()
def seconds_of_pairs(model: PreTrainedModel, shape: tuple[int, int, int], pairs: int) -> list[tuple[float, float]]:
    """Return the seconds of bare and adapted passes of one shape (rows, columns, masks)."""
    rows, columns, masks = shape
    cache = DynamicCache(config=model.config)
    ids = torch.randint(10, 1000, (rows, CONTEXT + columns), device=model.device)
    model(ids[:, :CONTEXT], past_key_values=cache, use_cache=True, logits_to_keep=1)
    taken = []
    for _ in range(pairs + 2):
        pair = []
        for gate in (0, masks):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            with model.mtp_adapter.acting_on(gate):
                model(ids[:, CONTEXT:], past_key_values=cache, use_cache=True, logits_to_keep=columns)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pair.append(time.perf_counter() - started)
            cache.crop(-columns)
        taken.append((pair[0], pair[1]))
    return taken[2:]  # the first passes warm up


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| dtype | rows | columns | masks | bare pass, ms | with adapter, ms | ratio | middle half |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        low, ratio, high = row["overhead"]
        lines.append(
            f"| {row['dtype']} | {row['batch']} | {row['columns']} | {row['masks']} | {1e3 * row['bare']:.0f} | "
            f"{1e3 * row['adapted']:.0f} | {ratio:.2f} | {low:.2f} to {high:.2f} |"
        )
    facts = results["provenance"]
    versions = f"torch {facts['versions']['torch']}, transformers {facts['versions']['transformers']}"
    lines += ["", f"{results['title']}. {facts['date']}, {facts['hardware']}, {versions}; `{facts['command']}`"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every shape in both dtypes, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the base")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of passes of each shape (default: 20)")
    parser.add_argument("--output", type=Path, metavar="FILE")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
        model.config.mtp = {"mask_token_id": 3, "k_max": 8, "barred_token_ids": [3]}
        for update in add_gated_adapter(model, rank=options.rank, alpha=2 * options.rank).updates:
            torch.nn.init.normal_(update.lora_B, std=0.01)
        for shape in track(SHAPES, str(dtype)):
            pairs = seconds_of_pairs(model, shape, options.pairs)
            low, ratio, high = statistics.quantiles([adapted / bare for bare, adapted in pairs], n=4)
            bare, adapted = (statistics.median(column) for column in zip(*pairs, strict=True))
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    **dict(zip(("batch", "columns", "masks"), shape, strict=True)),
                    "bare": bare,
                    "adapted": adapted,
                    "overhead": [low, ratio, high],
                }
            )
    title = f"One pass of {options.model} with an adapter of rank {options.rank}, {CONTEXT} tokens in the cache"
    results = {"title": title, "rows": rows, "provenance": run_facts()}
    print(table(results))
    if options.output is not None:
        write_atomically(options.output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

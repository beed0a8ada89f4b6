"""GPU memory of training: estimates of `mtp-trl estimate` for three sizes of Llama and Qwen and several ways of training.

    python benchmarks/memory.py --output docs/results/memory.json

Nothing is trained or downloaded. The models are built on the meta device from the config values below.
`tests/test_estimate.py` compares such estimates with measured peaks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mtp_trl.estimate import Setup, estimate
from mtp_trl.modeling.files import write_atomically
from mtp_trl.publishing.provenance import run_facts

CONFIGS = {
    "Llama-3.1-8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "Qwen3-32B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "head_dim": 128,
        "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "Llama-3.1-70B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
}  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WAYS: dict[str, dict[str, Any]] = {
    "full, ZeRO-3": {"mode": "full", "zero_stage": 3},
    "LoRA 64, ZeRO-3": {"mode": "lora", "zero_stage": 3, "target_modules": PROJECTIONS},
    "exact 64, ZeRO-2": {"mode": "exact", "zero_stage": 2},
    "exact 64, ZeRO-3": {"mode": "exact", "zero_stage": 3},
}
PARTS = ("parameters", "gradients", "optimizer", "teacher", "activations", "total")


def rows(processes: list[int], memory: float) -> list[dict[str, Any]]:
    """Return a row for every model and way of training, on the smallest number of GPUs that suffices, else on the largest."""
    found = []
    for model, values in CONFIGS.items():
        config = AutoConfig.for_model(**values)
        for way, options in WAYS.items():
            for count in processes:
                setup = Setup(
                    rows=16, length=160, slots=40, positions=16 * 45, master=True, checkpointing=True, rank=64, processes=count,
                    **options,
                )  # fmt: skip
                gib = estimate(config, setup).in_gib()
                if gib["total"] <= memory:
                    break
            fits = gib["total"] <= memory
            found.append({"model": model, "training": way, "gpus": count, "fits": fits, "gib": {p: gib[p] for p in PARTS}})
    return found


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    facts = results["provenance"]
    lines = [
        f"| model | training | GPUs of {results['memory']:g} GB | {' | '.join(PARTS)} |",
        f"| --- | --- | ---: |{' ---: |' * len(PARTS)}",
    ]
    for row in results["rows"]:
        numbers = " | ".join(f"{row['gib'][part]:.1f}" for part in PARTS)
        gpus = str(row["gpus"]) if row["fits"] else f"more than {row['gpus']}"
        lines.append(f"| {row['model']} | {row['training']} | {gpus} | {numbers} |")
    lines += ["", f"GiB on each GPU, estimated; {facts['date']}, torch {facts['versions']['torch']}; `{facts['command']}`"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="numbers of GPUs to try")
    parser.add_argument("--memory", type=float, default=80.0, help="GB of each GPU")
    parser.add_argument("--reserve", type=float, default=8.0, help="GB left to CUDA, communication and fragmentation")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    usable = (options.memory - options.reserve) * 1e9 / 2**30
    results = {"rows": rows(options.gpus, usable), "memory": options.memory, "provenance": run_facts()}
    print(table(results))
    if options.output is not None:
        write_atomically(options.output, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

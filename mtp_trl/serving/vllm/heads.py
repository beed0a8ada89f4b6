"""Pad attention heads without changing what the model computes: vLLM's CPU attention supports only a few head sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...custom_generate.adapter_file import ADAPTER_FILE
from ...modeling.files import write_atomically

_ROTATED = ("q_proj", "k_proj")


def pad_heads(source: Path, target: Path, *, head_dim: int) -> Path:
    """Copy a Llama folder, including exact mode's adapter, with its attention heads padded by zeros to `head_dim` features.

    The copy computes the same function. Attention divides scores by the square root of the head size, so the queries are
    scaled up. Rotary frequencies depend on the head size, so `rope_theta` is adjusted.

    Raises:
        ValueError: the model is not a Llama with default RoPE, or its heads are not smaller than `head_dim`.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    old = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters", {})
    if config["model_type"] != "llama" or rope.get("rope_type") != "default" or old >= head_dim:
        raise ValueError(
            f"{source.name} ({config['model_type']}, {old} features per head) cannot be padded to {head_dim} features: "
            "only Llama models with default RoPE and smaller heads can."
        )
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja"):
            shutil.copy(file, target)
    rope["rope_theta"] = rope["rope_theta"] ** (head_dim / old)
    write_atomically(target / "config.json", json.dumps(config | {"head_dim": head_dim}, indent=2) + "\n")
    weights = {name: _padded(name, tensor, old, head_dim) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    if (source / ADAPTER_FILE).is_file():
        (target / ADAPTER_FILE).parent.mkdir(exist_ok=True)
        with safe_open(source / ADAPTER_FILE, framework="pt") as file:
            metadata = file.metadata() | {"base_fingerprint": ""}
        updates = load_file(source / ADAPTER_FILE)
        save_file({n: _padded(n, t, old, head_dim) for n, t in updates.items()}, target / ADAPTER_FILE, metadata=metadata)
    return target


def _padded(name: str, tensor: Tensor, old: int, new: int) -> Tensor:
    """Pad a weight, or the A or B of an update, if one of its dimensions holds the heads; return other tensors unchanged."""
    layer = next((part for part in ("q_proj", "k_proj", "v_proj", "o_proj") if f".{part}." in name), None)
    if layer is None or (name.endswith("lora_A.weight") != (layer == "o_proj") and "lora_" in name):
        return tensor
    if layer == "o_proj":
        return _insert(tensor.T, old, new, halves=False).T.contiguous()
    padded = _insert(tensor, old, new, halves=layer in _ROTATED)
    return padded * (new / old) ** 0.5 if layer == "q_proj" else padded


def _insert(rows: Tensor, old: int, new: int, *, halves: bool) -> Tensor:
    """Insert zero rows, from `old` to `new` rows per head. Rotary embeddings pair the halves of a head, so each half grows."""
    parts = 2 if halves else 1
    heads = rows.view(-1, parts, old // parts, rows.shape[1])
    zeros = heads.new_zeros(heads.shape[0], parts, (new - old) // parts, rows.shape[1])
    return torch.cat([heads, zeros], 2).flatten(0, 2).contiguous()

"""Bases in GGUF files: the weights are dequantised while they load, so the model is an ordinary float model."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel

from ..argument_types import require


def gguf_argument(gguf_file: str | None) -> dict[str, str]:
    """Return the argument of `from_pretrained` that reads a config or a tokenizer from a GGUF file; none for None.

    Raises:
        ValueError: the package that reads GGUF files is not installed.
    """
    if gguf_file is None:
        return {}
    require("gguf", f"Reading {gguf_file}", extra="gguf")
    return {"gguf_file": gguf_file}


def gguf_options(gguf_file: str | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load a model from a GGUF file with dequantised weights; none for None.

    Raises:
        ValueError: as in `gguf_argument`.
    """
    options: dict[str, Any] = gguf_argument(gguf_file)
    # Early releases of transformers 5 have no GgufConfig and always dequantise.
    if options and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model. If it is from a GGUF file, it is no longer marked as quantised.

    Without `GgufConfig(dequantize=True)`, transformers marks every model from a GGUF file as quantised, even if it dequantises
    the weights, as it does for most architectures and devices. A marked model can be neither trained nor saved.

    Raises:
        ValueError: weights are kept as GGUF blocks. transformers' layers then pass no gradient to an input of 8 rows or fewer,
            and the mask token's row cannot be written into a table of blocks.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.quantization_config.quant_method != "gguf":
        return model
    if blocks := [name for name, module in model.named_modules() if type(module).__name__.startswith("Gguf")]:
        raise ValueError(
            f"{blocks[0]} and {len(blocks) - 1} other layers keep their weights as GGUF blocks, through which gradients are "
            "incomplete; load the model with quantization_config=GgufConfig(dequantize=True)."
        )
    quantizer.remove_quantization_config(model)
    return model


def base_label(base: str, gguf_file: str | None) -> str:
    """Return the name of a base for people to read: its GGUF file is appended if it has one."""
    return base if gguf_file is None else f"{base}/{gguf_file}"

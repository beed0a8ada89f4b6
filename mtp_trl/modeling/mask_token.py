"""Choose or add the mask token, initialise its embedding row, and record it in `config.mtp`."""

# Shapes: H hidden features, V vocabulary

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..custom_generate.mtp_config import check_mtp_config
from .parallelism import gathered

MASK_TOKEN = "<|mtp|>"
_ROW_MULTIPLE = 64  # tensor cores are fast if the number of rows is a multiple of this
_RESERVED = re.compile(r"<\|reserved_special_token_(\d+)\|>|<unused(\d+)>")


def add_mask_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_token: str = MASK_TOKEN,
    k_max: int = 16,
    seed: int = 0,
) -> int:
    """Add the mask token to `model` and `tokenizer`, and write `config.mtp`. A second call changes only `k_max`.

    The token uses a spare embedding row if there is one: a row beyond the tokenizer's last token (Qwen3), or the row of a
    reserved special token (Llama 3, Gemma), which keeps its string. Otherwise, the embedding matrix grows to the next multiple
    of 64 rows. The token's row and any added rows are drawn from a normal distribution with the per-dimension mean and
    standard deviation of the rows in use, in the input embedding and, if untied, in the output embedding. The same `seed` gives
    the same rows. Works under DeepSpeed ZeRO-3.

    Args:
        model: a causal LM; for a PEFT model, pass its `get_base_model()`.
        tokenizer: extended in place.
        mask_token: string of the mask token, if a token has to be added.
        k_max: largest trained block size, recorded as the default for decoding.
        seed: seed of these rows.

    Returns:
        The id of the mask token.

    Raises:
        ValueError: if the model's existing `config.mtp` is broken.
    """
    if (recorded := getattr(model.config, "mtp", None)) is not None:
        _register(tokenizer, _recorded_token(recorded))
        recorded["k_max"] = k_max
        return int(recorded["mask_token_id"])

    rows, tokens = _embedding_height(model), len(tokenizer)
    mask_token = _choose_token(rows, tokenizer, mask_token)
    mask_id = _register(tokenizer, mask_token)
    if mask_id >= rows:
        model.resize_token_embeddings(mask_id + 1, pad_to_multiple_of=_ROW_MULTIPLE, mean_resizing=False)
    barred = sorted({mask_id, *range(rows, _embedding_height(model))})
    in_use = [row for row in range(min(tokens, rows)) if row != mask_id]  # equal for tokenizers with and without the token
    _initialise_rows(model, barred, torch.tensor(in_use), seed=seed)
    model.config.mtp = {
        "mask_token": mask_token,
        "mask_token_id": mask_id,
        "k_max": k_max,
        "barred_token_ids": barred,
        "base_vocab_size": rows,
    }
    return mask_id


def chosen_mask_token(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, *, mask_token: str = MASK_TOKEN) -> str:
    """Return the string of the token that `add_mask_token` will use. Needs no weights and changes nothing."""
    if (recorded := getattr(config, "mtp", None)) is not None:
        return _recorded_token(recorded)
    return _choose_token(config.get_text_config().vocab_size, tokenizer, mask_token)


def _recorded_token(mtp: Any) -> str:
    check_mtp_config(mtp)
    if "mask_token" not in mtp:
        raise ValueError("config.mtp has no mask_token; add it to config.json, or load another revision.")
    return str(mtp["mask_token"])


def _choose_token(rows: int, tokenizer: PreTrainedTokenizerBase, mask_token: str) -> str:
    if len(tokenizer) >= rows and mask_token not in tokenizer.get_vocab():
        return _reserved_token(tokenizer) or mask_token
    return mask_token


def _reserved_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the highest-numbered reserved token, such as `<|reserved_special_token_247|>` or `<unused98>`, or None."""
    reserved = {token: int(m[1] or m[2]) for token in tokenizer.get_vocab() if (m := _RESERVED.fullmatch(token))}
    return max(reserved, key=reserved.__getitem__, default=None)


def _register(tokenizer: PreTrainedTokenizerBase, mask_token: str) -> int:
    tokenizer.add_special_tokens({"extra_special_tokens": [mask_token]}, replace_extra_special_tokens=False)
    return int(tokenizer.convert_tokens_to_ids(mask_token))


def _embedding_height(model: PreTrainedModel) -> int:
    with gathered([model.get_input_embeddings().weight]):
        return int(model.get_input_embeddings().weight.shape[0])


@torch.no_grad()
def _initialise_rows(model: PreTrainedModel, new: list[int], in_use: Tensor, *, seed: int) -> None:
    source, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [source.weight]
    if head is not None and head.weight is not source.weight:
        weights.append(head.weight)
    with gathered(weights):
        for weight in weights:
            weight[new] = _sample_row(weight[in_use.to(weight.device)], seed).to(weight.dtype)


def _sample_row(rows_VH: Tensor, seed: int) -> Tensor:
    """Draw a row from a normal with the per-dimension mean and standard deviation of the given rows, float32 [H].

    The noise is drawn on the CPU, so it is equal on all ranks.
    """
    rows_VH = rows_VH.float()
    noise_H = torch.randn(rows_VH.shape[1], generator=torch.Generator().manual_seed(seed))
    return rows_VH.mean(0) + noise_H.to(rows_VH.device) * rows_VH.std(0)


def set_decoding_defaults(model: PreTrainedModel, *, confadapt: float | Sequence[float], verify: bool | None) -> None:
    """Set the defaults of `generate` that are saved in generation_config.json."""
    config = model.generation_config
    config.confadapt, config.verify = confadapt, verify
    config._from_model_config = False  # otherwise transformers drops custom fields when it reads the file

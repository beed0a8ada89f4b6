"""Validation of `config.mtp` and of the decoding arguments, before anything is built from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPER_K_MAX = 16  # block size with which checkpoints without `config.mtp` were trained
LARGEST_BLOCK = 1024  # limit of a block, and so of the masks that a block adds to a pass; no model is trained for more
PAPER_MASK_TOKENS = "<|mtp_special_token_"  # prefix of the paper's mask tokens, of which the first one is fed
BROKEN_REPOSITORY = "the repository is broken, load another revision."

_ANY_VOCABULARY = 2**31  # limit of token ids if the vocabulary is not known yet


def check_mtp_config(mtp: Any, *, rows: int = _ANY_VOCABULARY, where: str = "config.mtp") -> None:
    """Raise ValueError unless `mtp` is a valid `config.mtp`. It comes from a repository, so it can hold anything.

    Args:
        mtp: the value to check.
        rows: number of rows of the embedding matrix.
        where: name of the value in error messages.
    """
    if not isinstance(mtp, dict):
        raise ValueError(f"{where} must be a dictionary, got {shortened(mtp)}; {BROKEN_REPOSITORY}")
    barred = mtp.get("barred_token_ids")
    valid = {
        "mask_token_id": is_whole_number(mtp.get("mask_token_id"), 0, rows - 1),
        "k_max": is_whole_number(mtp.get("k_max"), 1, LARGEST_BLOCK),
        "barred_token_ids": isinstance(barred, list)
        and len(barred) < rows
        and all(is_whole_number(token, 0, rows - 1) for token in barred),
        "base_vocab_size": is_whole_number(mtp.get("base_vocab_size", 1), 1, _ANY_VOCABULARY),
        "mask_token": isinstance(mtp.get("mask_token", ""), str),
        "exact": isinstance(mtp.get("exact", False), bool),
    }
    for name, is_valid in valid.items():
        if not is_valid:
            raise ValueError(
                f"{where} has {name}={shortened(mtp.get(name))}: token ids must be 0 to {rows - 1} and not all barred, k_max 1 "
                f"to {LARGEST_BLOCK}, base_vocab_size a whole number >= 1, mask_token a string, exact true or false; "
                f"{BROKEN_REPOSITORY}"
            )


def mtp_config_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return the model's `config.mtp`, or None if it has none.

    Raises:
        ValueError: `config.mtp` is invalid.
    """
    mtp = getattr(model.config, "mtp", None)
    if mtp is None:
        return None
    check_mtp_config(mtp, rows=model.config.get_text_config().vocab_size)
    return dict(mtp)


def is_whole_number(value: Any, low: int, high: int) -> bool:
    """Whether a value is an integer from `low` to `high`. Booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def shortened(value: Any) -> str:
    """Shorten a value from a repository for an error message."""
    return repr(str(value)[:50])


def within_vocabulary(mtp: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Adjust `mtp` to a base without a row for the mask. Any token id serves: the adapter replaces its embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    barred = [token for token in mtp["barred_token_ids"] if token < rows]
    return mtp | {"mask_token_id": min(mtp["mask_token_id"], rows - 1), "barred_token_ids": barred}


def mask_ids_by_name(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return the ids of a tokenizer's mask tokens. The first one is fed."""
    vocabulary: dict[str, int] = {} if tokenizer is None else tokenizer.get_vocab()
    ours = [vocabulary["<|mtp|>"]] if "<|mtp|>" in vocabulary else []
    return ours + [vocabulary[name] for name in sorted(vocabulary) if name.startswith(PAPER_MASK_TOKENS)]


def checked_block_size(k: Any) -> int:
    """Return `mtp_k` as an int. Raise ValueError if it is not a valid block size."""
    if not is_whole_number(k, 1, LARGEST_BLOCK):
        raise ValueError(f"mtp_k must be a whole number from 1 to {LARGEST_BLOCK}, or 'auto', got {k!r}; 1 is plain decoding.")
    return int(k)


def checked_blocks(blocks: Any) -> int:
    """Return `mtp_blocks`. Raise ValueError if it is not a whole number >= 1."""
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise ValueError(f"mtp_blocks must be a whole number >= 1, got {blocks!r}; 1 feeds one block of masks per pass.")
    return blocks


def checked_thresholds(confadapt: Any) -> tuple[float, ...]:
    """Return the thresholds by block position, of which the last one holds for all later positions.

    Raises:
        ValueError: `confadapt` is not a probability or a non-empty list of probabilities.
    """
    is_list = isinstance(confadapt, list | tuple)
    thresholds = tuple(confadapt) if is_list else (confadapt,)
    for one in thresholds:
        if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one <= 1:
            raise ValueError(
                f"confadapt must be a probability in [0, 1]{' at every position' if is_list else ''}, got {repr(one)[:50]}; "
                "0.9 is usual, 0 accepts whole blocks."
            )
    if not thresholds:
        raise ValueError(
            "confadapt is an empty list; give at least one probability, of which the last holds for all later positions."
        )
    return tuple(map(float, thresholds))


def thresholds_by_position(thresholds: Sequence[float], k: int) -> list[float]:
    """Return one threshold for each of the k positions of a block, repeating the last one."""
    return [*thresholds, *[thresholds[-1]] * (k - len(thresholds))][:k]

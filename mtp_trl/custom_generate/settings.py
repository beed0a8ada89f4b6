"""Settings of a call, from its arguments, its generation_config and defaults, and checks for unsupported arguments."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from .adapter import MaskGatedAdapter
from .mtp_config import (
    PAPER_K_MAX,
    PAPER_MASK_TOKENS,
    check_mtp_config,
    checked_block_size,
    checked_blocks,
    checked_thresholds,
    mask_ids_by_name,
    mtp_config_of,
    within_vocabulary,
)
from .probes import CACHE_NAMES


@dataclass(frozen=True)
class Request:
    """Arguments of the call that transformers does not know or does not pass on to a custom decoding loop."""

    confadapt: float | Sequence[float] | None
    mtp_k: int | str | None
    verify: bool | None
    mtp_blocks: int | None
    mtp_token_id: int | None
    tokenizer: PreTrainedTokenizerBase | None
    streamer: BaseStreamer | None
    past: Cache | None
    synced_gpus: bool


MOST_MASKS = 64  # per row and pass, with mtp_k="auto"
# Verified decoding in these dtypes is mtp_k="auto" by default. In lower precision, passes of different widths may resolve
# near-ties differently, so that the text would depend on the clock.
DTYPES_BY_CLOCK = (torch.float32,)


@dataclass(frozen=True)
class Settings:
    """Decoding settings of a call.

    Attributes:
        k: largest block size.
        auto: whether each step chooses its block size and its number of blocks by measured times (`mtp_k="auto"`).
        thresholds: one threshold per block position. The last one holds for all later positions; 0 is static k.
        verify: whether accepted tokens are drafts that the next pass verifies.
        blocks: largest number of rejection points that get their own block of masks.
        mask_token_id: the token that is fed as a mask.
        barred_token_ids: tokens that are never emitted.
    """

    k: int
    auto: bool
    thresholds: tuple[float, ...]
    verify: bool
    blocks: int
    mask_token_id: int
    barred_token_ids: tuple[int, ...]

    @property
    def modes(self) -> list[tuple[int, int]]:
        """The (block size, number of blocks) that steps choose from."""
        if not self.auto:
            return [(self.k, self.blocks)]
        sizes = sorted({1, *(k for k in (2, 4, 8) if k < self.k), self.k})
        trees = [(k, min(k, self.blocks)) for k in sizes if k > 1 and self.blocks > 1]
        return [(k, 1) for k in sizes] + [(k, blocks) for k, blocks in trees if blocks * (k - 1) <= MOST_MASKS]


def settings_of(
    model: PreTrainedModel, request: Request, config: GenerationConfig, adapter: MaskGatedAdapter | None
) -> Settings:
    """Return the settings of a call. Each comes from the call, else generation_config, else the adapter, else a default.

    Raises:
        ValueError: a value is out of range, values contradict each other, or there is no mask token.
    """

    def value(name: str, default: Any) -> Any:
        defaults = {} if adapter is None else adapter.defaults
        candidates = (getattr(request, name), getattr(config, name, None), defaults.get(name))
        return next((candidate for candidate in candidates if candidate is not None), default)

    mtp = _mask_tokens(model, request, adapter)
    verify = value("verify", False)
    if not isinstance(verify, bool):
        raise ValueError(f"verify must be True or False, got {verify!r}.")
    fits_all = mtp["mask_token_id"] is not None and value("mtp_blocks", None) is None and not request.synced_gpus
    by_clock = verify and fits_all and model.dtype in DTYPES_BY_CLOCK
    k = value("mtp_k", "auto" if by_clock else mtp["k_max"])
    auto = k == "auto"
    k = mtp["k_max"] if auto else checked_block_size(k)
    if k > mtp["k_max"]:
        warnings.warn(f"mtp_k={k} exceeds the trained block size, {mtp['k_max']}; set it to at most that.", stacklevel=2)
    if k > 1 and mtp["mask_token_id"] is None:
        raise ValueError(
            f"{type(model).__name__} has no mask token, since its config has no `mtp`; pass mtp_token_id=, or tokenizer= if "
            f"it has {PAPER_MASK_TOKENS}0|> or <|mtp|>, or decode one token per pass with mtp_k=1."
        )
    if auto and (not verify or request.synced_gpus):
        reason = (
            "ranks that share weights must use the same sizes" if verify else "only verified text does not depend on the sizes"
        )
        raise ValueError(
            f"mtp_k='auto' chooses block sizes by measured times, and {reason}; pass a number, or verify=True without "
            "synced_gpus."
        )
    static = config.cache_implementation == "static"  # each size is compiled
    blocks = checked_blocks(value("mtp_blocks", k if auto and not static else 1))
    if request.mtp_blocks is not None and blocks > 1 and not verify:
        raise ValueError(f"mtp_blocks={blocks} needs drafts that can be rejected; pass verify=True, or omit mtp_blocks.")
    thresholds = checked_thresholds(value("confadapt", 0.0))
    blocks = min(blocks, k) if verify else 1  # a default of generation_config is for verified decoding only
    return Settings(k, auto, thresholds, verify, blocks, mtp["mask_token_id"] or 0, tuple(mtp["barred_token_ids"]))


def _mask_tokens(model: PreTrainedModel, request: Request, adapter: MaskGatedAdapter | None) -> dict[str, Any]:
    """Return `config.mtp` of the model or its adapter, else a substitute from `mtp_token_id` or the tokenizer's token names."""
    recorded = mtp_config_of(model)
    if recorded is None and adapter is not None:
        recorded = within_vocabulary(adapter.mtp, model)
        check_mtp_config(recorded, rows=model.get_input_embeddings().weight.shape[0], where="`mtp` of the adapter")
    if recorded is not None:
        if request.mtp_token_id not in (None, recorded["mask_token_id"]):
            raise ValueError(
                f"mtp_token_id={request.mtp_token_id} contradicts config.mtp, whose mask token is "
                f"{recorded['mask_token_id']}; leave mtp_token_id out."
            )
        return recorded
    barred = mask_ids_by_name(request.tokenizer)
    mask = request.mtp_token_id
    rows = model.config.get_text_config().vocab_size
    if mask is None:
        mask = barred[0] if barred else None
    elif isinstance(mask, bool) or not 0 <= mask < rows:
        raise ValueError(f"mtp_token_id must be a token id, 0 to {rows - 1}, got {mask!r}.")
    return {
        "mask_token_id": mask,
        "barred_token_ids": sorted({*barred, *([] if mask is None else [mask])}),
        "k_max": PAPER_K_MAX,
    }


def pad_token_id(config: GenerationConfig) -> int:
    """Return the token that pads finished rows: the pad token, else the first EOS token, else 0."""
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return next((int(token) for token in (config.pad_token_id, *eos) if token is not None), 0)


_REMEDY = "leave it out, or decode one token per pass with transformers' own GenerationMixin.generate(model, ...)"
_UNSUPPORTED: dict[str, Any] = {  # settings of GenerationConfig, with the values that disable them
    "num_beams": 1,
    "num_beam_groups": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "guidance_scale": 1,
    "watermarking_config": None,
    "token_healing": False,
    "prefill_chunk_size": None,
    "use_cache": True,
    "output_attentions": False,
    "output_hidden_states": False,
}


def refuse_arguments(model: PreTrainedModel, **arguments: Any) -> None:
    """Raise ValueError for an encoder-decoder, and for arguments of `generate` that multi-token decoding does not support."""
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; multi-token decoding needs a causal LM.")
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}= is not supported by multi-token decoding; {_REMEDY}.")


def refuse_cache(implementation: str | None) -> None:
    """Raise ValueError for a cache implementation that this decoder does not have."""
    if implementation not in (None, "dynamic", "static", "hybrid"):
        raise ValueError(
            f"cache_implementation={implementation!r} is not supported by multi-token decoding, which has its own cache; "
            "leave it out, or pass 'static' for static shapes that compile."
        )


def refuse_generation_config(config: GenerationConfig) -> None:
    """Raise ValueError for settings that multi-token decoding would ignore."""
    refuse_cache(config.cache_implementation)
    for name, disabled in _UNSUPPORTED.items():
        if (value := getattr(config, name, None)) is not None and value != disabled:
            raise ValueError(f"{name}={value!r} is not supported by multi-token decoding; {_REMEDY}.")


def refuse_model_inputs(model_kwargs: dict[str, Any]) -> None:
    """Raise ValueError for model inputs other than text, such as images or token types."""
    known = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHE_NAMES}
    for name, value in model_kwargs.items():
        if name not in known and value is not None:
            raise ValueError(f"{name}= would be ignored, since only input_ids and attention_mask are read; {_REMEDY}.")

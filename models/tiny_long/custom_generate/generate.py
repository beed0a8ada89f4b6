"""Multi-token decoding: several tokens per forward pass, for one row or many. Needs torch and transformers (with safetensors).

A step feeds every row, right-aligned, the tokens whose keys and values are not cached yet and a block of masks,

    [ pad | pending tokens | k - 1 masks ]

and reads a block of k predictions: the first at the last pending token, the others at the masks. It accepts a prefix
of the block, which is pending in the next step; the masks' keys and values are overwritten there. The prefill is the
first step: the whole prompt is pending.

    static k      accept all k
    ConfAdapt     accept the longest prefix in which every token's probability reaches a threshold
    verified      accepted tokens are drafts: the next step feeds them anyway, so the model's own predictions behind
                  each of them are there for the reading, and drafts are returned only as far as they agree
    tree          verified, with a block of masks behind each place at which the drafts may turn out to end,

    [ pad | pending tokens | k - 1 masks | k - 1 masks | ... ]

                  so that a step that rejects drafts has new ones all the same; the blocks do not see each other

Where layers are recurrent, their states stay behind tokens that are certain, and what comes after these is fed again.

Verified text is exactly the model's own, one token per pass: greedy, or sampled with noise that depends on (seed,
prompt, position) and on nothing else.

This file is uploaded with every model as `custom_generate/generate.py`. `from_pretrained(..., trust_remote_code=True)`
binds `generate` to the model; `attach_decoder` does so for a model in memory.
"""

# B rows of the call, A rows still alive, W columns fed, P places read, K block, V vocabulary, L columns of text,
# H heads, T cache slots, D head size, E ends of the drafts that have a block of masks, S scratch slots, M masks of a block

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import math
import operator
import statistics
import sys
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    GenerationMixin,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import ModelOutput, cached_file

__all__ = [
    "ConfAdaptLogitsProcessor",
    "MTPGenerateOutput",
    "MaskGatedAdapter",
    "accept_confident_prefix",
    "attach_adapter",
    "attach_decoder",
    "generate",
]

PAPER_K_MAX = 16  # block size that checkpoints without `config.mtp` were trained with
LARGEST_BLOCK = 1024  # a pass lays as many masks; no model is trained for more
PAPER_MASK_TOKENS = "<|mtp_special_token_"  # their mask tokens; the first is the one that is fed
STATE_TOKENS = 16  # a recurrent state moves on when so many certain tokens lie behind it; until then they are fed again
SLOT_MULTIPLE = 64  # attention reads a multiple of this many slots: few shapes, aligned
STATIC_SLOT_MULTIPLE = 256  # with static shapes all slots are read: calls of about the same length share a graph


# ---------------------------------------------------------------------------------------------------------------------
# What is public
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class MTPGenerateOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns.

    Attributes:
        sequences: prompt and generated tokens, padded with pad_token_id behind each row's end, int64 [B, L].
        block_lengths: of each row, the tokens each forward pass gave: together its generated tokens, EOS counted; 0 for a
            pass that only moved recurrent states on.
        forward_passes: of each row, the passes while it was alive, the prefill counted, int64 [B].
        acceleration: generated tokens per forward pass, the ratio of the sums over rows.
        scores: with `output_scores`, of each generated token what it was chosen from: logits after the processors, float32
            [B, V] each, the barred ids at -inf. Behind a row's end the pad token has 0 and all others -inf.
        logits: with `output_logits`, the same before any processor.
        past_key_values: the cache handed in, which now holds the columns that have been cached in all rows; None without one.
    """

    sequences: Tensor | None = None
    block_lengths: list[list[int]] | None = None
    forward_passes: Tensor | None = None
    acceleration: float | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: Cache | None = None


def accept_confident_prefix(probs_BK: Tensor, *, threshold: float | Tensor) -> Tensor:
    """Places to accept, int64 [B]: the longest prefix whose probabilities all reach `threshold`, and at least one.

    `threshold` is one number, or one for each place: float [K].
    """
    return (probs_BK >= threshold).long().cumprod(-1).sum(-1).clamp(min=1)


class ConfAdaptLogitsProcessor(LogitsProcessor):
    """Bar the ids that are never emitted, and record the distribution from which acceptance reads the confidence.

    Applied before every other processor, at each place of a block. Scores are [B, V] (one place) or [B, P, V].

    Attributes:
        scores: of the last call, float32, the barred ids at -inf; before any other processor and without temperature.
    """

    scores: Tensor

    def __init__(self, barred_token_ids: Sequence[int]) -> None:
        self.barred = torch.tensor(list(barred_token_ids), dtype=torch.long)

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Scores in float32 with the barred ids at -inf."""
        self.barred = self.barred.to(scores.device)
        self.scores = scores.float().index_fill(-1, self.barred, -torch.inf)
        return self.scores.clone()  # processors may write into what they are given

    def confidence(self, tokens: Tensor, where: Any = ...) -> Tensor:
        """Probability of the tokens actually emitted at the places `where`, an index of the scores' leading dimensions."""
        return self.scores[where].softmax(-1).gather(-1, tokens[..., None])[..., 0]


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    synced_gpus: bool | None = None,
    assistant_model: PreTrainedModel | None = None,
    streamer: BaseStreamer | None = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    *,
    model: PreTrainedModel,
    confadapt: float | Sequence[float] | None = None,
    mtp_k: int | str | None = None,
    verify: bool | None = None,
    mtp_blocks: int | None = None,
    mtp_token_id: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs: Any,
) -> Tensor | MTPGenerateOutput:
    """`GenerationMixin.generate`, several tokens per forward pass. Arguments not listed here mean what they mean there.

    A `past_key_values=` handed in (a `DynamicCache`, for a conversation that goes on) covers the first columns of
    `inputs`; in the end it covers the columns, generated ones too, that are cached in all rows.

    Args:
        inputs: prompts, int64 [B, L], padded on the left; `attention_mask` tells tokens from padding.
        generation_config: may carry `confadapt`, `mtp_k`, `verify` and `mtp_blocks`, as the model's own may.
        model: bound by `from_pretrained` and `attach_decoder`.
        confadapt: probability in [0, 1] that every token of an accepted block must reach; 0 accepts whole blocks
            (static k). Or a list with one for each place of a block, the last of which holds for all that follow: the first
            token is kept anyway, and its own decides whether any others are. None: the repository's default, else static k.
        mtp_k: largest block; 1 is plain decoding; "auto", with `verify`: of each step the block from which most tokens per
            second are to be expected, by the drafts accepted so far and the passes timed. None: the block size trained.
        verify: return exactly the model's own text. None: the repository's default, else False.
        mtp_blocks: with `verify`, how many of the places at which the drafts may end get a block of masks of their own:
            `mtp_k` covers all. More tokens per pass for wider passes, so it pays where wide passes cost little more.
            None: 1. Logits processors that read the text take 1.
        mtp_token_id: the mask token, for checkpoints that carry no `config.mtp`; with `tokenizer` it is found by name.
        tokenizer: needed for `stop_strings`.

    Returns:
        Tokens int64 [B, L], or `MTPGenerateOutput` with `return_dict_in_generate=True`.

    Raises:
        ValueError: for values out of range and for what multi-token decoding cannot do.
    """
    repository = _adapter_repository()
    if repository is not None:
        _use_adapter_of(repository, model, {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs})
    _refuse_arguments(
        model,
        assistant_model=assistant_model,
        negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
        **{name: kwargs.get(name) for name in ("custom_generate", "inputs_embeds", "cache_params", "position_ids")},
    )
    _refuse_cache(kwargs.get("cache_implementation"))  # transformers would leave for paged decoding
    config = generation_config or model.generation_config
    if kwargs.get("eos_token_id", config.eos_token_id) == []:  # none at all; transformers would look at the first
        kwargs["eos_token_id"] = None
    if generation_config is None:  # a default of False, from training, says nothing about this cache
        kwargs.setdefault("use_cache", True)
    stopping_criteria = _with_stop_strings(stopping_criteria, kwargs, generation_config, model, tokenizer)
    if synced_gpus is None:  # as in GenerationMixin.generate
        synced_gpus = (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)) and dist.get_world_size() > 1
    past = kwargs.get("past_key_values")
    request = _Request(confadapt, mtp_k, verify, mtp_blocks, mtp_token_id, tokenizer, streamer, past, synced_gpus)
    with _turn(model), _eval_mode(model):
        output: Tensor | MTPGenerateOutput = GenerationMixin.generate(
            model,
            inputs,
            generation_config,
            logits_processor,
            stopping_criteria,
            prefix_allowed_tokens_fn,
            streamer=streamer,
            custom_generate=functools.partial(_decode, request=request),
            **kwargs,
        )
    return output


_turns: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()


def _turn(model: PreTrainedModel) -> Any:
    """In exact mode one call at a time: where the adapter acts is a state of the model, which threads would share."""
    mtp = getattr(model.config, "mtp", None)
    is_exact = hasattr(model, "mtp_adapter") or (isinstance(mtp, dict) and mtp.get("exact"))
    if is_exact or model in _turns:  # whose adapter another thread may have taken off
        return _turns.setdefault(model, threading.RLock())
    return nullcontext()


def attach_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Make `model.generate` this module's. Of a PEFT model its base is bound, which `PeftModel.generate` calls."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.generate = functools.partial(generate, model=base)
    return model


def attach_adapter(model: PreTrainedModel, repository: str) -> PreTrainedModel:
    """Put the adapter of an adapter-only repository on its base for good: `config.mtp` then names the mask token.

    Raises:
        ValueError: the adapter was trained on another base.
    """
    _use_adapter_of(repository, model, {})
    model.config.mtp = _within_vocabulary(model.mtp_adapter.mtp, model)
    for name, default in model.mtp_adapter.defaults.items():
        setattr(model.generation_config, name, default)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Prefill, decode, verify
# ---------------------------------------------------------------------------------------------------------------------


def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    request: _Request,
    **model_kwargs: Any,
) -> Tensor | MTPGenerateOutput:
    """The loop that `GenerationMixin.generate` calls, with everything of its own already merged and prepared."""
    _refuse_generation_config(generation_config)
    _refuse_model_inputs(model_kwargs)
    settings = _settings(model, request, generation_config)
    seed = int(torch.randint(2**62, ()).item()) if generation_config.do_sample else None
    stops = _Stops(stopping_criteria)
    rows = _rows(input_ids, model_kwargs.get("attention_mask"), max_length=stops.max_length, seed=seed)
    if request.streamer is not None and len(rows) > 1:
        raise ValueError(f"A streamer takes one row, got {len(rows)}; decode the rows one by one to stream them.")

    if not request.synced_gpus:  # a block that is longer than all that may come would be masks for nothing
        room = max(row.limit - row.prompt_length for row in rows)
        settings = replace(settings, k=min(settings.k, room), blocks=min(settings.blocks, room))

    text = _Text(input_ids, rows, pad_token_id=_pad_token_id(generation_config))
    choose = _Choice(settings, logits_processor, text, sampling=seed is not None)
    forward = _forward_pass(model, choose.settings, rows, generation_config, request)
    scores = _Scores(generation_config, rows)
    static = generation_config.cache_implementation == "static"
    pace = _Pace(model, choose.settings, rows, sampling=seed is not None, static=static)
    alive = list(rows)
    with forward.without_adapter() if settings.k == 1 and not request.synced_gpus else nullcontext():
        while alive:
            with pace.step(alive, forward) as k:
                logits_APV, masks = forward(alive, k)
                choices = list(choose(logits_APV.to(input_ids.device), alive, k, masks=masks))  # where processors expect it
            for row, (own, blocks) in zip(alive, choices, strict=True):
                row.advance(own, blocks, verify=settings.verify, eos=stops.eos)
            stops(alive, text)
            for member, (row, (own, _)) in enumerate(zip(alive, choices, strict=True)):
                fresh = row.close_step()
                first = logits_APV.shape[1] - masks - len(own)
                scores.record(row, logits_APV, choose.scores_APV, member, first=first, count=len(fresh))
                pace.learn(row, kept=len(fresh) - 1)
                if request.streamer is not None:
                    request.streamer.put(torch.tensor(fresh))
            alive = forward.drop_finished(alive)
        forward.keep_company()

    if isinstance(forward, _CachedForward) and request.past is not None:
        forward.hand_back(request.past)
    if request.streamer is not None:
        request.streamer.end()
    if not generation_config.return_dict_in_generate:
        return text.tensor()
    return _output(rows, text, scores, request)


@dataclass
class _Row:
    """One sequence on its way: what is certain, what is drafted, what lies in the cache."""

    index: int  # in the caller's batch
    tokens: list[int]  # prompt and generated tokens: certain, never retracted
    limit: int  # of len(tokens)
    noise_key: int  # what its random numbers depend on, beside the position
    real: list[bool]  # which columns of the caller's batch are its prompt; the others are padding
    prompt_length: int = 0
    committed: int = 0  # leading tokens whose keys and values are cached
    drafts: list[int] = field(default_factory=list)  # verified decoding: accepted, to be verified in the next step
    block_lengths: list[int] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self.prompt_length = self.closed = len(self.tokens)

    @property
    def pending(self) -> list[int]:
        """Tokens to feed: not cached yet."""
        return self.tokens[self.committed :] + self.drafts

    @property
    def end(self) -> int:
        """Position that the block's first prediction is for."""
        return len(self.tokens) + len(self.drafts)

    def ends(self, most: int) -> range:
        """How many drafts may turn out to be confirmed, where that has a block of masks of its own: the last `most`."""
        return range(max(0, len(self.drafts) + 1 - most), len(self.drafts) + 1)

    def advance(self, own: list[int], blocks: dict[int, list[int]], *, verify: bool, eos: frozenset[int]) -> None:
        """Verify the drafts, then take the block: `own[i]` is the model's choice after i drafts, `blocks[i]` what follows."""
        confirmed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.drafts, own, strict=False)))
        block = [own[confirmed], *blocks.get(confirmed, [])]
        certain = 1 if verify else len(block)
        fresh = self.drafts[:confirmed] + block[:certain]
        self.committed = len(self.tokens) + confirmed
        self.tokens += _through_first(fresh, eos)
        self.done = self.tokens[-1] in eos or len(self.tokens) == self.limit
        # The pass that would verify a last token gives that token anyway: it need not be fed.
        self.drafts = _before_first(block[certain:][: self.limit - len(self.tokens) - 1], eos)

    def stop_at(self, length: int) -> None:
        """End with `length` tokens: a stopping criterion held there."""
        del self.tokens[length:]
        self.done = True

    def close_step(self) -> list[int]:
        """Book what the step gave, and return it."""
        fresh = self.tokens[self.closed :]
        self.closed = len(self.tokens)
        self.block_lengths.append(len(fresh))
        if self.done:
            self.drafts = []
        return fresh


def _through_first(tokens: list[int], stops: frozenset[int]) -> list[int]:
    before = _before_first(tokens, stops)
    return tokens[: len(before) + 1]


def _before_first(tokens: list[int], stops: frozenset[int]) -> list[int]:
    return list(takewhile(lambda token: token not in stops, tokens))


def _rows(input_ids: Tensor, attention_mask: Tensor | None, *, max_length: int, seed: int | None) -> list[_Row]:
    """Rows without their padding. A row's noise depends on its own prompt, so not on what else is in the batch."""
    width = input_ids.shape[1]
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if real.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {tuple(real.shape)}, input_ids {tuple(input_ids.shape)}: one column for each token, those that "
            "a cache holds included."
        )
    rows, copies = [], Counter[tuple[int, ...]]()
    for index, (ids, keep) in enumerate(zip(input_ids.tolist(), real.bool().tolist(), strict=True)):
        prompt = [token for token, kept in zip(ids, keep, strict=True) if kept]
        if not prompt:
            raise ValueError(f"Row {index} of the batch has no tokens; its attention_mask is 0 everywhere.")
        key = 0
        if seed is not None:
            copies[tuple(prompt)] += 1
            key = _digest(f"{seed} {copies[tuple(prompt)]} {prompt}")
        rows.append(_Row(index, prompt, limit=len(prompt) + max(1, max_length - width), noise_key=key, real=keep))
    return rows


class _Scores:
    """What every generated token was chosen from, for `output_scores` and `output_logits`."""

    def __init__(self, config: GenerationConfig, rows: list[_Row]) -> None:
        asked = bool(config.return_dict_in_generate)
        self.scores: list[list[Tensor]] | None = [[] for _ in rows] if asked and config.output_scores else None
        self.logits: list[list[Tensor]] | None = [[] for _ in rows] if asked and config.output_logits else None

    def record(self, row: _Row, logits_APV: Tensor, scores_APV: Tensor, member: int, *, first: int, count: int) -> None:
        """`count` new tokens of a row, which were chosen at the places from `first` on."""
        for kept, source in ((self.logits, logits_APV), (self.scores, scores_APV)):
            if kept is not None:
                kept[row.index] += source[member, first : first + count].to(torch.float32, copy=True).unbind(0)

    def by_token(self, kept: list[list[Tensor]] | None, *, pad: int) -> tuple[Tensor, ...] | None:
        """[B, V] of each generated token."""
        if kept is None:
            return None
        ended = torch.full_like(kept[0][0], -torch.inf)
        ended[pad] = 0
        return tuple(torch.stack(column) for column in itertools.zip_longest(*kept, fillvalue=ended))


def _output(rows: list[_Row], text: _Text, scores: _Scores, request: _Request) -> MTPGenerateOutput:
    passes = [len(row.block_lengths) for row in rows]
    return MTPGenerateOutput(
        sequences=text.tensor(),
        block_lengths=[row.block_lengths for row in rows],
        forward_passes=torch.tensor(passes),
        acceleration=sum(sum(row.block_lengths) for row in rows) / sum(passes),
        scores=scores.by_token(scores.scores, pad=text.pad),
        logits=scores.by_token(scores.logits, pad=text.pad),
        past_key_values=request.past,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass: [pad | pending | masks] through a cache in which every row has its own offset
# ---------------------------------------------------------------------------------------------------------------------


def _forward_pass(
    model: PreTrainedModel, settings: _Settings, rows: list[_Row], config: GenerationConfig, request: _Request
) -> _CachedForward | _RecurrentForward | _UncachedForward:
    arguments = frozenset(inspect.signature(model.forward).parameters)
    synced = request.synced_gpus
    kinds = {type(layer) for layer in _cache_layers(model)} if model._supports_default_dynamic_cache() else {Any}
    if windows_by_column(model):
        kinds = {Any}
    if kinds <= _ATTENTION and {"position_ids", "past_key_values"} <= arguments:
        return _CachedForward(model, settings, arguments, rows, config, synced=synced, past=request.past)
    if settings.blocks > 1:
        raise ValueError(
            f"mtp_blocks={settings.blocks} needs layers that can look back at any block, and {type(model).__name__} has "
            "recurrent ones, or others whose cache is unknown; leave it out."
        )
    if request.past is not None:
        raise ValueError(
            f"past_key_values= needs layers that keep keys and values alone, and {type(model).__name__} has recurrent ones, or "
            "others whose cache is unknown; leave it out: the conversation is read anew."
        )
    if kinds <= _ATTENTION | _RECURRENT and _continues_from_states(model):
        return _RecurrentForward(model, settings, arguments, rows, config, synced=synced)
    check_left_to_right(model)
    warnings.warn(
        f"{type(model).__name__} has layers whose cache is unknown, or cannot be told positions: it is decoded correctly but "
        "without a cache, which is slow for long texts.",
        stacklevel=2,
    )
    return _UncachedForward(model, settings, arguments, synced=synced)


_ATTENTION = {DynamicLayer, DynamicSlidingWindowLayer}
_RECURRENT = {LinearAttentionLayer, LinearAttentionAndFullAttentionLayer}


def _cache_layers(model: PreTrainedModel) -> list[Any]:
    return list(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)


def windows_by_column(model: PreTrainedModel) -> bool:
    """Whether layers have windows of their own (GPT-Neo), counted in columns: no mask of ours can say where a column stands."""
    masks = (buffer for buffer in model.buffers() if buffer.ndim == 4 and buffer.dtype == torch.bool)
    return any(not bool(mask[0, 0, -1, 0]) for mask in masks if not mask.is_meta)


_continuing: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def _continues_from_states(model: PreTrainedModel) -> bool:
    """Whether its recurrent layers go on from their states by several tokens; some start anew (Jamba), so it is tried."""
    if not hasattr(sys.modules[type(model).__module__], "create_recurrent_attention_mask"):
        return False
    if model not in _continuing:
        _continuing[model] = _states_agree(model)
    return _continuing[model]


@torch.no_grad()
def _states_agree(model: PreTrainedModel) -> bool:
    """The states behind 12 tokens, read at once and as 8 and 4."""
    name = "past_key_values" if "past_key_values" in inspect.signature(model.forward).parameters else "cache_params"
    ids = (
        torch.arange(12, device=_execution_device(model.get_input_embeddings()))[None]
        % model.config.get_text_config().vocab_size
    )
    found = []
    for parts in ([ids], ids.split(8, 1)):
        cache = Cache(layers=_cache_layers(model))
        with _text_alone(model):
            for part in parts:
                model(input_ids=part, use_cache=True, **{name: cache})
        found.append([states[i].float() for states, i in _states(cache.layers)])
    return all((one - other).norm() <= 0.1 * one.norm() for one, other in zip(*found, strict=True))


def _text_alone(model: PreTrainedModel) -> Any:
    """A context in which an adapter acts nowhere; training leaves its gate set."""
    adapter: MaskGatedAdapter | None = getattr(model, "mtp_adapter", None)
    return nullcontext() if adapter is None else adapter.acting_on(0)


_left_to_right: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


@torch.no_grad()
def check_left_to_right(model: PreTrainedModel) -> None:
    """Raises ValueError when logits depend on tokens or padding behind them: then a block cannot be verified in one pass."""
    if model in _left_to_right:
        return
    ids = (
        torch.arange(12, device=_execution_device(model.get_input_embeddings()))[None]
        % model.config.get_text_config().vocab_size
    )
    text = (torch.arange(12, device=ids.device) < 8).long()[None]
    with _text_alone(model):
        alone, *others = (
            model(input_ids=fed, attention_mask=mask, use_cache=False).logits[0, :8].float()
            for fed, mask in ((ids[:, :8], text[:, :8]), (ids, torch.ones_like(ids)), (ids * text, text))
        )
    for other, what in zip(others, ("tokens", "padding"), strict=True):
        # The median place: rounding may send single tokens to other experts.
        if ((alone - other).norm(dim=-1) / alone.norm(dim=-1)).median() > 0.05:
            raise ValueError(
                f"{type(model).__name__} does not read from left to right: its logits depend on {what} behind them. Use a "
                "causal model, or what makes this one causal in its config."
            )
    _left_to_right.add(model)


def _states(layers: Sequence[Any]) -> list[tuple[dict[int, Tensor], int]]:
    """Where the recurrent layers among them keep their states, [A, ...] each."""
    holders = [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]
    found = [(states, i) for layer in holders for states in (layer.conv_states, layer.recurrent_states) for i in states]
    return [(states, i) for states, i in found if states[i] is not None]


def _execution_device(layer: Any) -> torch.device:
    """Where a layer computes: weights that are offloaded, by accelerate, are brought there."""
    offloaded = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return layer.weight.device if offloaded is None else torch.device(offloaded)


class _Forward:
    """Logits of a step at the places that are read: behind every pending token that matters, and at the masks.

    Attributes:
        fed: how many tokens, padding counted, were fed since it was last set to 0.
        fed_again: about how many certain tokens of a row a step with masks feeds although they were fed before.
        keeps_rows: whether rows that ended stay in the batch.
    """

    fed = 0
    fed_again = 0
    keeps_rows = False

    def __init__(self, model: PreTrainedModel, settings: _Settings, arguments: frozenset[str], *, synced: bool) -> None:
        self.model = model
        self.device = _execution_device(model.get_input_embeddings())
        self.call: Callable[..., Any] = model
        self.mask = settings.mask_token_id
        self.longest = settings.k
        self.takes_positions = "position_ids" in arguments
        self.keeps_logits = "logits_to_keep" in arguments
        # The load-balancing loss of a mixture of experts fails on ready masks.
        self.constants = {"output_router_logits": False} if "output_router_logits" in arguments else {}
        self.adapter = _mask_gated_adapter(model)
        self.synced = synced

    def run(self, *, read: int, gate: int | Tensor, **inputs: Any) -> Tensor:
        """Logits [rows, read, V] of the last columns; `gate` says which columns are masks."""
        self._somebody_works(True)
        if self.keeps_logits:
            inputs["logits_to_keep"] = read
        with nullcontext() if self.adapter is None else self.adapter.acting_on(gate):  # exact mode
            logits: Tensor = self.call(**inputs, **self.constants, return_dict=True).logits
        self.fed += inputs["input_ids"].numel()
        return logits[:, -read:]

    def drop_finished(self, alive: list[_Row]) -> list[_Row]:
        """The last row takes the place of a finished one: nothing else moves, and the batch shrinks."""
        if self.keeps_rows:
            return [row for row in alive if not row.done]
        for place in reversed(range(len(alive))):
            if alive[place].done:
                alive[place] = alive[-1]
                alive.pop()
                self.replace_row(place)
        return alive

    def replace_row(self, place: int) -> None:
        """In what is kept of the rows between steps, the last one takes that place."""

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Plain decoding within the block: layers without hooks are called faster."""
        adapter, self.adapter = self.adapter, None
        if adapter is not None:
            adapter.detach(self.model)
        try:
            yield
        finally:
            if adapter is not None:
                self.adapter = adapter.attach(self.model)

    def keep_company(self) -> None:
        """Where weights are gathered from all processes: pass after pass, until every process has decoded its rows."""
        ids = torch.full((1, 1), self.mask, device=self.device)
        while self._somebody_works(False):
            with nullcontext() if self.adapter is None else self.adapter.acting_on(int(self.longest > 1)):
                self.call(input_ids=ids, **self.constants)

    def _somebody_works(self, working: bool) -> bool:
        """Asked before every pass of every process."""
        if not self.synced:
            return False
        count = torch.tensor(int(working), device=self.device)
        dist.all_reduce(count)
        return working or bool(count)


class _CachedForward(_Forward):
    """Feeds what is not cached yet. In every row slot = position, and padding writes to a slot that nobody reads.

    Blocks of masks that stand beside each other share positions: they write to scratch slots, which then come first, and
    slot = scratch + position.
    With `cache_implementation="static"` every step but the first has the same shapes and runs compiled where
    transformers would compile.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: _Settings,
        arguments: frozenset[str],
        rows: list[_Row],
        config: GenerationConfig,
        *,
        synced: bool,
        past: Cache | None,
    ) -> None:
        super().__init__(model, settings, arguments, synced=synced)
        self.blocks = settings.blocks
        self.scratch = settings.blocks * (settings.k - 1) if settings.blocks > 1 else 0
        self.static = config.cache_implementation == "static"
        self.trash = self.scratch + max(row.limit for row in rows)
        multiple = STATIC_SLOT_MULTIPLE if self.static else 1
        self.placement = _Placement(slots=-(-(self.trash + 1) // multiple) * multiple)
        self.layers = [_RowOffsetLayer(self.placement) for _ in _cache_layers(model)]
        self.cache = Cache(layers=self.layers)
        text_slots = self.placement.slots - self.scratch
        self.attention = _Attention(model, slots=text_slots, scratch=self.scratch, block=settings.k - 1)
        self.rows = rows
        self.keeps_rows = self.static or past is not None
        self.compiles = self.static and model._valid_auto_compile_criteria({"past_key_values": self.cache}, config)
        self.compile_config = config.compile_config
        if past is not None:
            self.take_over(past)

    def __call__(self, alive: list[_Row], k: int) -> tuple[Tensor, int]:
        """Logits [A, P, V], and how many of the P places are masks': k - 1 of each block."""
        whole = self.static and all(row.committed for row in alive)  # shapes that are the same in every step
        blocks = self.blocks if whole else max(len(row.ends(self.blocks)) for row in alive)
        masks = blocks * (k - 1)
        pending = max(len(row.pending) for row in alive)
        if whole:
            pending = 1 if pending == k == 1 else self.longest
        width = masks + pending
        fed = self.rows if self.keeps_rows else alive
        columns = [self.columns(row, width, blocks, k) if not row.done else self.padding(width) for row in fed]
        ids, positions, slots, anchors = torch.tensor(columns, device=self.device).unbind(1)
        last = self.scratch + max(min(row.end + k - 1, row.limit) for row in alive)
        top = self.placement.slots if whole else min(-(-last // SLOT_MULTIPLE) * SLOT_MULTIPLE, self.placement.slots)
        self.placement.place(slots, top=top)
        if whole and self.compiles:
            self.call = self.model.get_compiled_call(self.compile_config)
        own = pending if whole else 1 + max(len(row.drafts) for row in alive)
        logits = self.run(
            read=own + masks,
            gate=masks,
            input_ids=ids,
            position_ids=positions,
            attention_mask=self.attention.masks(positions, anchors, masks=masks, top=top, dtype=self.mask_dtype()),
            past_key_values=self.cache,
            use_cache=True,
        )
        return (logits if fed is alive else logits[[row.index for row in alive]]), masks

    def mask_dtype(self) -> torch.dtype | None:
        """The cache's, once it has one: boolean masks, which need no dtype, are converted anew in every layer."""
        first = self.layers[0]
        return first.keys.dtype if first.is_initialized else self.attention.dtype

    def columns(self, row: _Row, width: int, blocks: int, k: int) -> list[list[int]]:
        """Ids, positions, slots and anchors of one row: [pad | pending | masks]. Masks beyond its limit are padding too.

        An anchor is the last position of the text that a column sees.
        """
        text = list(range(row.committed, row.end))
        ids, positions, anchors = row.pending + [self.mask] * (k - 1) * blocks, list(text), list(text)
        slots = [self.scratch + position for position in text]
        ends = row.ends(self.blocks)
        for block in range(blocks):
            end = len(row.tokens) + ends[block] if block < len(ends) else row.limit  # a block too many is padding
            for place in range(k - 1):
                inside = end + place < row.limit
                positions.append(end + place if inside else 0)
                anchors.append((end - 1 if self.scratch else end + place) if inside else 0)
                mine = block * (k - 1) + place if self.scratch else end + place
                slots.append(mine if inside else self.trash)
        before = width - len(ids)
        pad = [0] * before
        return [pad + ids, pad + positions, [self.trash] * before + slots, pad + anchors]

    def padding(self, width: int) -> list[list[int]]:
        """The columns of a row that has ended, where shapes must not change."""
        return [[0] * width, [0] * width, [self.trash] * width, [0] * width]

    def replace_row(self, place: int) -> None:
        """In every layer's keys and values."""
        for layer in self.layers:
            layer.replace_row(place)

    def take_over(self, past: Cache) -> None:
        """Take over keys and values that were handed in, one column for each of the first columns of the prompts."""
        if any(type(layer) not in _ATTENTION for layer in past.layers):
            found = f"{type(past).__name__} of {sorted({type(layer).__name__ for layer in past.layers})}"
            remedy = "pass DynamicCache(config=model.config), or leave it out"
            raise ValueError(f"past_key_values= must be a DynamicCache, got {found}; {remedy}.")
        cached = past.get_seq_length()
        if cached == 0:
            return
        rows, width = len(past.layers[0].keys), len(self.rows[0].real)
        if rows != len(self.rows) or cached > width:
            remedy = "pass the whole conversation as input_ids, what is cached included"
            if rows != len(self.rows):
                remedy = "for several answers to one prompt call its batch_repeat_interleave(num_return_sequences) first"
            raise ValueError(
                f"past_key_values= holds {rows} rows of {cached} tokens, the prompts are {len(self.rows)} rows of {width}: "
                f"{remedy}."
            )
        if len(past.layers) != len(self.layers):
            sizes = f"{len(past.layers)} layers, the model {len(self.layers)}"
            raise ValueError(f"past_key_values= has {sizes}; pass DynamicCache(config=model.config).")
        for row in self.rows:
            row.committed = min(sum(row.real[:cached]), len(row.tokens) - 1)  # the last is fed for its logits
            for theirs in past.layers:
                if isinstance(theirs, DynamicSlidingWindowLayer):
                    # It holds its last columns alone. Where padding takes their room, or the last token is fed again, they
                    # do not reach back to all that the next token sees: then the row is read anew.
                    first = sum(row.real[: cached - theirs.keys.shape[2]])
                    if first > max(0, row.committed - theirs.sliding_window + 1):
                        row.committed = 0
        for layer, theirs in zip(self.layers, past.layers, strict=True):
            layer.lazy_initialization(theirs.keys, theirs.values)
            first = cached - theirs.keys.shape[2]  # sliding layers hold the last columns alone
            for row in self.rows:
                columns = [column - first for column, real in enumerate(row.real[:cached]) if real and column >= first]
                end = self.scratch + sum(row.real[:cached])
                layer.keys[row.index, :, end - len(columns) : end] = theirs.keys[row.index][:, columns]
                layer.values[row.index, :, end - len(columns) : end] = theirs.values[row.index][:, columns]

    def hand_back(self, past: Cache) -> None:
        """Hand back the columns that are cached in all rows."""
        columns = [[*row.real, *[True] * (len(row.tokens) - row.prompt_length)] for row in self.rows]
        # A stop may have cut a row shorter than what is cached of it.
        cached = min(len(row.real) - row.prompt_length + min(row.committed, len(row.tokens)) for row in self.rows)
        past.layers = _cache_layers(self.model)
        for theirs, layer in zip(past.layers, self.layers, strict=True):
            keys, values = (
                states.new_zeros((*states.shape[:2], cached, states.shape[3])) for states in (layer.keys, layer.values)
            )
            for row, real in zip(self.rows, columns, strict=True):
                where = [column for column in range(cached) if real[column]]
                text = slice(self.scratch, self.scratch + len(where))
                keys[row.index][:, where], values[row.index][:, where] = (
                    layer.keys[row.index, :, text],
                    layer.values[row.index, :, text],
                )
            theirs.update(keys, values)


class _RecurrentForward(_Forward):
    """For models with recurrent layers, whose states cannot forget: a state stays behind tokens that are certain.

    A step goes from there, feeds [tokens behind the state | drafts | masks | pad], and puts the state back. When
    `STATE_TOKENS` certain tokens lie behind a row's state, a pass over tokens alone moves it on: by the same number of
    tokens for every row that moves, since padding, too, would change a state. Attention is cached as elsewhere.
    """

    fed_again = STATE_TOKENS

    def __init__(
        self,
        model: PreTrainedModel,
        settings: _Settings,
        arguments: frozenset[str],
        rows: list[_Row],
        config: GenerationConfig,
        *,
        synced: bool,
    ) -> None:
        super().__init__(model, settings, arguments, synced=synced)
        if config.cache_implementation == "static":
            raise ValueError(
                f"{type(model).__name__} has recurrent layers, which decode in steps of many shapes: leave static out."
            )
        self.trash = max(row.limit for row in rows)
        self.placement = _Placement(slots=self.trash + 1)
        self.layers = [_beside_states(layer, self.placement) for layer in _cache_layers(model)]
        attends = any(isinstance(layer, _RowOffsetLayer) for layer in self.layers)
        self.attention = _Attention(model, slots=self.placement.slots, scratch=0, block=1) if attends else None
        self.cache_name = "past_key_values" if "past_key_values" in arguments else "cache_params"
        self.cache = Cache(layers=self.layers)
        self.read: dict[int, int] = {}  # tokens behind which a row's state stands, by its index

    def __call__(self, alive: list[_Row], k: int) -> tuple[Tensor, int]:
        """Logits [A, P, V], and how many of the P places are masks'."""
        masks = k - 1
        if not self.read:
            # Padding before the text leaves a state as it is: at 0.
            prompts = [row.tokens if masks == 0 else row.tokens[:-1] for row in alive]
            self.read = dict.fromkeys((row.index for row in alive), 0)
            logits = self.feed(alive, prompts, before=True, read=1)
            self.read = {row.index: len(prompt) for row, prompt in zip(alive, prompts, strict=True)}
            if masks == 0:
                return logits, 0
            self.count_pass(alive)
        self.move_on(alive, at_least=STATE_TOKENS if masks else 1)

        fed = [row.tokens[self.read[row.index] :] + row.drafts for row in alive]
        if masks == 0 and all(len(tokens) == 1 for tokens in fed):
            logits = self.feed(alive, fed)
            self.read = {row.index: len(row.tokens) for row in alive}
            return logits, 0
        with self.put_back(range(len(alive))):
            logits = self.feed(alive, fed, masks=masks)
        own = 1 + max(len(row.drafts) for row in alive)
        first = torch.tensor([len(tokens) - own for tokens in fed], device=logits.device)
        places = (first[:, None] + torch.arange(own + masks, device=logits.device)).clamp(min=0)  # before 0 none is read
        return logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])), masks

    def move_on(self, alive: list[_Row], *, at_least: int) -> None:
        """Read certain tokens into the states where there are so many, but for the last, whose logits the step reads."""
        while True:
            behind = [len(row.tokens) - 1 - self.read[row.index] for row in alive]
            moving = [length >= at_least for length in behind]
            if not any(moving):
                return
            step = min(length for length in behind if length >= at_least)
            starts = [self.read[row.index] for row in alive]
            fed = [row.tokens[s : s + step] if moves else [] for row, s, moves in zip(alive, starts, moving, strict=True)]
            with self.put_back([member for member, moves in enumerate(moving) if not moves]):
                self.feed(alive, fed, read=1)
            for row, tokens in zip(alive, fed, strict=True):
                self.read[row.index] += len(tokens)
            self.count_pass(alive)

    def count_pass(self, alive: list[_Row]) -> None:
        """A pass that gave nothing."""
        for row in alive:
            row.block_lengths.append(0)

    def feed(
        self, alive: list[_Row], fed: list[list[int]], *, masks: int = 0, before: bool = False, read: int | None = None
    ) -> Tensor:
        """Logits of a pass over tokens of each row from its state on and masks; padding is last, or first.

        [A, W, V], or of the last `read` columns.
        """
        # transformers leaves the mask of a single column out, which would be padding before an empty prompt.
        width = max(2 if before else 1, max(map(len, fed))) + masks
        columns, real, is_mask = [], [], []
        for row, tokens in zip(alive, fed, strict=True):
            count, start = len(tokens) + masks, self.read[row.index]
            pad = [0] * (width - count)
            positions = list(range(start, start + count))
            slots = [position if position < row.limit else self.trash for position in positions]
            parts = [(tokens + [self.mask] * masks, pad), (positions, pad), (slots, [self.trash] * len(pad)), (positions, pad)]
            columns.append([padding + part if before else part + padding for part, padding in parts])
            real.append([0] * len(pad) + [1] * count)
            is_mask.append([False] * len(tokens) + [True] * masks + [False] * len(pad))
        ids, positions_AW, slots_AW, anchors_AW = torch.tensor(columns, device=self.device).unbind(1)
        last = max(min(self.read[row.index] + len(tokens) + masks, row.limit) for row, tokens in zip(alive, fed, strict=True))
        top = min(-(-max(last, 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE, self.placement.slots)
        self.placement.place(slots_AW, top=top)
        states: Any = torch.tensor(real, device=ids.device) if before else None
        mask: Any
        if self.attention is None:
            mask = states
        else:
            mask = self.attention.masks(positions_AW, anchors_AW, masks=0, top=top, dtype=self.attention.dtype)
            mask = {**mask, "linear_attention": states, "conv": states}
        return self.run(
            read=width if read is None else read,
            # Processes that share weights run the adapter in the same passes.
            gate=torch.tensor(is_mask, device=ids.device) if masks or (self.synced and self.longest > 1) else 0,
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            **{self.cache_name: self.cache},
            **({"position_ids": positions_AW} if self.takes_positions else {}),
        )

    @contextmanager
    def put_back(self, members: Sequence[int]) -> Iterator[None]:
        """The states of some rows as they were, after the block."""
        rows = torch.tensor(list(members), device=self.device)
        kept = [states[i].index_select(0, rows.to(states[i].device)) for states, i in _states(self.layers)] if members else []
        yield
        for (states, i), state in zip(_states(self.layers) if members else [], kept, strict=True):
            states[i].index_copy_(0, rows.to(states[i].device), state)

    def replace_row(self, place: int) -> None:
        """In every layer's state, and keys and values."""
        for states, i in _states(self.layers):
            states[i][place] = states[i][-1].clone()
            states[i] = states[i][:-1]
        for layer in self.layers:
            if isinstance(layer, _RowOffsetLayer):
                layer.replace_row(place)


class _UncachedForward(_Forward):
    """Feeds every row whole in every step, padded on the right: no causal layer sees that, whatever it makes of a mask."""

    def __call__(self, alive: list[_Row], k: int) -> tuple[Tensor, int]:
        """Logits [A, P, V], and how many of the P places are masks': k - 1 of each block."""
        masks = k - 1
        fed = [row.tokens + row.drafts + [self.mask] * masks for row in alive]
        width = max(map(len, fed))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in fed], device=self.device)
        lengths = torch.tensor([len(row) for row in fed], device=self.device)[:, None]
        column = torch.arange(width, device=self.device)
        real = column < lengths
        read = max(len(row.drafts) for row in alive) + k
        places = (lengths - read + torch.arange(read, device=self.device)).clamp(min=0)  # before 0 none is read
        kept = width - int(places.min())
        logits = self.run(
            read=kept,
            # Processes that share weights run the adapter in the same passes.
            gate=real & (column >= lengths - masks) if masks or (self.synced and self.longest > 1) else 0,
            input_ids=ids,
            attention_mask=real.long(),
            use_cache=False,
            **({"position_ids": column.expand_as(ids)} if self.takes_positions else {}),
        )
        places = (places - (width - kept)).to(logits.device)
        return logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])), masks


class _Placement:
    """Where the keys and values of a step go: set once per step, read by every layer."""

    def __init__(self, *, slots: int) -> None:
        self.slots = slots
        self.first: dict[tuple[int, int, torch.device], Tensor] = {}

    def place(self, slots_AW: Tensor, *, top: int) -> None:
        self.slots_AW, self.top = slots_AW, top
        self.flat: dict[tuple[int, torch.device], Tensor] = {}

    def index(self, heads: int, device: torch.device) -> Tensor:
        """Rows of a cache [A, H, T, D] seen as [A * H * T, D] that the step's [A, H, W] vectors go to."""
        if (heads, device) not in self.flat:
            first_AH = self._first_slots(len(self.slots_AW), heads, device)
            self.flat[heads, device] = (first_AH[..., None] + self.slots_AW.to(device)[:, None]).flatten()
        return self.flat[heads, device]

    def _first_slots(self, rows: int, heads: int, device: torch.device) -> Tensor:
        if (rows, heads, device) not in self.first:
            self.first[rows, heads, device] = (torch.arange(rows * heads, device=device) * self.slots).view(rows, heads)
        return self.first[rows, heads, device]


class _RowOffsetLayer(StaticLayer):
    """Keys and values [A, H, T, D], allocated once. Sliding layers keep all positions: the window is in the mask."""

    keys: Tensor
    values: Tensor

    def __init__(self, placement: _Placement) -> None:
        super().__init__(max_cache_len=placement.slots)
        self.placement = placement

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [A, H, W, D] to the step's slots; returns the slots in use, [A, H, top, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        index, top = self.placement.index(key_states.shape[1], key_states.device), self.placement.top
        # One index names row, head and slot in the memory's flat view.
        self.keys.flatten(0, 2).index_copy_(0, index, key_states.reshape(-1, self.k_head_dim))
        self.values.flatten(0, 2).index_copy_(0, index, value_states.reshape(-1, self.v_head_dim))
        return self.keys.narrow(2, 0, top), self.values.narrow(2, 0, top)

    def replace_row(self, target: int) -> None:
        """The last row takes the place of row `target`."""
        if target < len(self.keys) - 1:
            self.keys[target], self.values[target] = self.keys[-1], self.values[-1]
        self.keys, self.values = self.keys[:-1], self.values[:-1]


class _RowOffsetHybridLayer(_RowOffsetLayer, LinearAttentionAndStaticFullAttentionLayer):
    """The same beside a recurrent state."""


def _beside_states(layer: Any, placement: _Placement) -> Any:
    """A layer's cache where some layers are recurrent."""
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return _RowOffsetHybridLayer(placement)
    return layer if type(layer) is LinearAttentionLayer else _RowOffsetLayer(placement)


class _Attention:
    """Masks of a step: causal in positions, with each layer type's window, in the form the attention backend takes."""

    def __init__(self, model: PreTrainedModel, *, slots: int, scratch: int, block: int) -> None:
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} cannot express a mask per row; call "
                "model.set_attn_implementation('sdpa') (or 'eager' for models that refuse sdpa) before generate."
            )
        # Eager attention adds its mask to the scores: a boolean one would be added as 0 and 1.
        self.dtype = model.dtype if config._attn_implementation == "eager" else None
        device = _execution_device(model.get_input_embeddings())
        self.slots_T = torch.arange(slots, device=device)  # of the text; scratch slots lie before them
        place_S = torch.arange(scratch, device=device)
        self.hidden_SS = (place_S[:, None] // max(block, 1) != place_S // max(block, 1)) | (place_S > place_S[:, None])
        self.window: Any = getattr(config, "sliding_window", None)
        self.chunk: Any = getattr(config, "attention_chunk_size", None)
        # As in transformers' create_masks_for_generate: several masks where a config names its layers, else one.
        hybrids = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
        named = set(getattr(config, "layer_types", []))
        self.aliases = {name: kind for name, kind in hybrids.items() if name in named}
        names = {hybrids.get(name, name) for name in named}
        self.layer_types = sorted(names - {"linear_attention", "conv"})
        self.only_type = "sliding_attention" if self.window else "chunked_attention" if self.chunk else "full_attention"

    def masks(
        self, positions_AW: Tensor, anchors_AW: Tensor, *, masks: int, top: int, dtype: torch.dtype | None
    ) -> Tensor | dict[str, Tensor]:
        """[A, 1, W, top], or a dict of them by layer type; boolean, or of `dtype` and to be added to the scores."""
        arguments = (positions_AW[:, None, :, None], anchors_AW[:, None, :, None], masks, top, dtype)
        if not self.layer_types:
            return self._mask(self.only_type, *arguments)
        by_type = {layer_type: self._mask(layer_type, *arguments) for layer_type in self.layer_types}
        return by_type | {name: by_type[layer_type] for name, layer_type in self.aliases.items()}

    def _mask(
        self, layer_type: str, queries: Tensor, anchors: Tensor, masks: int, top: int, dtype: torch.dtype | None
    ) -> Tensor:
        slots_T = self.slots_T[: top - len(self.hidden_SS)]
        hidden = slots_T > anchors
        if layer_type == "sliding_attention":
            hidden |= slots_T <= queries - self.window
        elif layer_type == "chunked_attention":
            hidden |= slots_T // self.chunk != queries // self.chunk
        if len(self.hidden_SS):
            hidden = torch.cat([self._hidden_scratch(layer_type, queries, masks), hidden], -1)
        return ~hidden if dtype is None else hidden.to(dtype).mul_(torch.finfo(dtype).min)

    def _hidden_scratch(self, layer_type: str, queries: Tensor, masks: int) -> Tensor:
        """A mask sees the masks before it in its own block, as far as the window or chunk goes; a token sees none."""
        rows, _, width, _ = queries.shape
        hidden = torch.ones(rows, 1, width, len(self.hidden_SS), dtype=torch.bool, device=queries.device)
        hidden[:, :, width - masks :] = self.hidden_SS[:masks]
        positions = nn.functional.pad(queries[:, :, width - masks :, 0], (0, len(self.hidden_SS) - masks))[:, :, None]
        if layer_type == "sliding_attention":
            hidden |= positions <= queries - self.window
        elif layer_type == "chunked_attention":
            hidden |= positions // self.chunk != queries // self.chunk
        return hidden


# ---------------------------------------------------------------------------------------------------------------------
# From logits to tokens: processors, acceptance, sampling
# ---------------------------------------------------------------------------------------------------------------------

# Processors that look at the scores of one place and at nothing else: one call serves all places of all rows.
_POINTWISE = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


class _Choice:
    """The tokens chosen at every place that is read, and how much of each block is accepted.

    Attributes:
        scores_APV: of the last call, logits after all processors.
    """

    scores_APV: Tensor

    def __init__(self, settings: _Settings, processors: LogitsProcessorList, text: _Text, *, sampling: bool) -> None:
        thresholds = thresholds_by_place(settings.thresholds, settings.k)
        self.thresholds_K = torch.tensor(thresholds, dtype=torch.float32, device=text.input_ids.device)
        self.reads_confidence = any(settings.thresholds)
        # Verified: every place is drawn. Otherwise only a block of length one is, and longer blocks are the argmax.
        self.draw_all = sampling and settings.verify
        self.draw_single = sampling and not settings.verify
        self.confadapt = ConfAdaptLogitsProcessor(settings.barred_token_ids)
        self.processors = list(processors)
        self.at_once = all(type(processor) in _POINTWISE for processor in self.processors)
        self.settings = settings if self.at_once else replace(settings, blocks=1)  # blocks share no one text before them
        self.text = text

    def __call__(
        self, logits_APV: Tensor, alive: list[_Row], k: int, *, masks: int
    ) -> Iterator[tuple[list[int], dict[int, list[int]]]]:
        """Of each row, the choices behind its 0, 1, ... drafts, and by the number confirmed what is accepted behind.

        The last `masks` places are those of the blocks of masks, the others those of pending tokens.
        """
        A, P, _ = logits_APV.shape
        own, block, E = P - masks, k - 1, masks // (k - 1) if masks else 1
        ends = [row.ends(self.settings.blocks) for row in alive]
        choose = self._all_places if self.at_once else self._place_by_place
        chosen_AP, probs_AP, self.scores_APV = choose(logits_APV, alive, own, ends, k)
        columns = [chosen_AP]
        if probs_AP is not None:
            probs_AEK = probs_AP[:, None, -k:]
            if E > 1:
                first = [[own - 1 - len(r.drafts) + end for end in _padded(e, E)] for r, e in zip(alive, ends, strict=True)]
                first_AE = probs_AP.gather(1, torch.tensor(first, device=probs_AP.device))
                probs_AEK = torch.cat([first_AE[..., None], probs_AP[:, own:].view(A, E, block)], -1)
            columns.append(accept_confident_prefix(probs_AEK.flatten(0, 1), threshold=self.thresholds_K[:k]).view(A, E))
        if self.draw_single:
            columns.append(_draw(self.scores_APV[:, own - 1], alive, [row.end for row in alive])[:, None])
        host = torch.cat(columns, 1).tolist() if len(columns) > 1 else chosen_AP.tolist()  # a step's one wait
        for row, row_ends, values in zip(alive, ends, host, strict=True):
            chosen = values[own - 1 - len(row.drafts) : own]
            lengths = [k] * E if probs_AP is None else values[P : P + E]
            room = row.limit - len(row.tokens)
            blocks = {}
            for place, end in enumerate(row_ends):
                start = own + place * block
                blocks[end] = values[start : start + min(lengths[place], room) - 1]
            if self.draw_single and not blocks[0]:
                chosen[0] = values[-1]
            yield chosen, blocks

    def _all_places(
        self, logits_APV: Tensor, alive: list[_Row], own: int, ends: list[range], k: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        scores_APV = self.confadapt(None, logits_APV)
        for processor in self.processors:
            scores_APV = processor(None, scores_APV.flatten(0, 1)).view_as(scores_APV)
        E = (scores_APV.shape[1] - own) // max(k - 1, 1)
        if self.draw_all:
            positions = [
                [row.end - own + 1 + place for place in range(own)]
                + [len(row.tokens) + end + place for end in _padded(row_ends, E) for place in range(1, k)]
                for row, row_ends in zip(alive, ends, strict=True)
            ]
            chosen_AP = _draw(scores_APV, alive, positions)
        else:
            chosen_AP = scores_APV.argmax(-1)
        probs_AP = None
        if self.reads_confidence and k > 1:
            read = (slice(None), slice(0 if E > 1 else own - 1, None))  # a single block begins at the last pending token
            probs_AP = self.confadapt.confidence(chosen_AP[read], read)
        return chosen_AP, probs_AP, scores_APV

    def _place_by_place(
        self, logits_APV: Tensor, alive: list[_Row], own: int, ends: list[range], k: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Left to right, each place with the tokens before it: what processors that read `input_ids` need."""
        chosen_AP = logits_APV.new_zeros(logits_APV.shape[:2], dtype=torch.long)
        probs_AP = torch.zeros_like(chosen_AP, dtype=torch.float32)
        scores_APV = torch.zeros_like(logits_APV, dtype=torch.float32)
        history_BL = self.text.tensor(room=k)
        for place in range(logits_APV.shape[1]):
            offset = place - own + 1  # in the block; before 0, behind a draft
            for length, members in self.text.by_length(alive, offset).items():
                rows = [alive[member] for member in members]
                indices = [row.index for row in rows]
                scores_MV = self._processed(history_BL[:, :length], logits_APV[:, place], alive)[indices]
                positions = [row.end + offset for row in rows]
                picked_M = _draw(scores_MV, rows, positions) if self.draw_all else scores_MV.argmax(-1)
                chosen_AP[members, place] = picked_M
                probs_AP[members, place] = self.confadapt.confidence(picked_M, indices)
                scores_APV[members, place] = scores_MV
                if offset >= 0:
                    history_BL[indices, length] = picked_M
        return chosen_AP, probs_AP, scores_APV

    def _processed(self, history_BL: Tensor, logits_AV: Tensor, alive: list[_Row]) -> Tensor:
        """Scores [B, V] of the whole batch, in which processors may count rows; rows that ended have zeros."""
        scores_BV = logits_AV.new_zeros((len(history_BL), logits_AV.shape[1]))
        scores_BV[[row.index for row in alive]] = logits_AV
        for processor in (self.confadapt, *self.processors):
            scores_BV = processor(history_BL, scores_BV)
        return scores_BV


def _padded(ends: range, count: int) -> list[int]:
    return [*ends, *[ends[-1]] * (count - len(ends))]


def _draw(scores: Tensor, rows: list[_Row], positions: list[int] | list[list[int]]) -> Tensor:
    """Tokens for `positions` drawn from softmax(scores) [A, V] or [A, P, V] by the Gumbel trick.

    A mask's distribution and the model's own at the same position meet the same noise, so that drafts agree with what
    verification draws as often as the two distributions do.
    """
    keys = torch.tensor([row.noise_key for row in rows], device=scores.device)
    places = torch.tensor(positions, device=scores.device)
    return (scores + _gumbel(keys.view(-1, *[1] * (places.ndim - 1)), places, scores.shape[-1])).argmax(-1)


def _gumbel(keys: Tensor, positions: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise [..., size], float32: a function of key and position alone, on any device (SplitMix64)."""
    streams = _mix(keys + _mix(positions))[..., None]
    bits = _mix(streams + _signed(0x9E3779B97F4A7C15) * torch.arange(1, size + 1, device=keys.device))
    uniform = (bits & (2**63 - 1) | 1).float() * 2.0**-63
    return -torch.log(-torch.log1p(-uniform))


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap around."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return x ^ (x >> 31 & (1 << 33) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class _Text:
    """The caller's batch with what has been generated, as processors, criteria and the caller see it: [B, L]."""

    def __init__(self, input_ids: Tensor, rows: list[_Row], *, pad_token_id: int) -> None:
        self.input_ids, self.rows, self.pad = input_ids, rows, pad_token_id

    def tensor(self, *, room: int = 0) -> Tensor:
        """Prompts as they came, generated tokens and drafts, padding; `room` columns more than the longest row."""
        generated = [row.tokens[row.prompt_length :] + row.drafts for row in self.rows]
        width = max(map(len, generated)) + room
        padded = [tokens + [self.pad] * (width - len(tokens)) for tokens in generated]
        return torch.cat([self.input_ids, torch.tensor(padded, device=self.input_ids.device).view(-1, width)], 1)

    def width(self, row: _Row, tokens: int) -> int:
        """Columns up to and with the first `tokens` tokens of a row."""
        return self.input_ids.shape[1] - row.prompt_length + tokens

    def by_length(self, alive: list[_Row], offset: int) -> dict[int, list[int]]:
        """Rows that have a place at `offset` (0 begins the block, before it are drafts), by the columns before it."""
        groups: dict[int, list[int]] = {}
        for member, row in enumerate(alive):
            if offset >= -len(row.drafts):
                groups.setdefault(self.width(row, row.end + offset), []).append(member)
        return groups


class _Stops:
    """EOS ids and the longest length, read from transformers' criteria; the other criteria are asked at every token."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        eos = [criterion.eos_token_id.tolist() for criterion in criteria if type(criterion) is EosTokenCriteria]
        self.eos = frozenset(token for ids in eos for token in ids)
        self.max_length: int = min(c.max_length for c in criteria if type(c) is MaxLengthCriteria)
        known = (EosTokenCriteria, MaxLengthCriteria)
        self.others = StoppingCriteriaList(c for c in criteria if type(c) not in known)

    def __call__(self, alive: list[_Row], text: _Text) -> None:
        """Ask once per new token and length, on the columns that one token per pass would have shown, and truncate."""
        if not self.others:
            return
        history_BL = text.tensor()
        reached: dict[int, list[tuple[_Row, int]]] = {}
        for row in alive:
            for length in range(row.closed + 1, len(row.tokens) + 1):
                reached.setdefault(text.width(row, length), []).append((row, length))
        for width in sorted(reached):
            going = [(row, length) for row, length in reached[width] if length <= len(row.tokens)]
            if going:
                verdicts = self.others(history_BL[:, :width], None).tolist()
                for row, length in going:
                    if verdicts[row.index]:
                        row.stop_at(length)


# ---------------------------------------------------------------------------------------------------------------------
# mtp_k="auto": the block of each step
# ---------------------------------------------------------------------------------------------------------------------

MARGIN = 1.05  # what a longer block must promise, in tokens per second, to be preferred to plain decoding
DECAY = 0.98  # per draft: about the last 50 drafts of a place count
PROBES_SHARE = 0.02  # of the time may be spent on looking at the other way of decoding


class _Measured:
    """What a model's calls have shown so far: passes timed, by whether they had one column per row, and drafts kept."""

    def __init__(self, k_max: int) -> None:
        self.plain: deque[tuple[int, float]] = deque(maxlen=16)  # tokens fed, seconds
        self.wide: deque[tuple[int, float]] = deque(maxlen=16)
        self.reached, self.kept = [0.0] * k_max, [0.0] * k_max  # how often draft 1, 2, ... came up, and was right
        self.since_probe = 0.0  # seconds
        self.longer_next = False  # of the lengths on both sides of the best one, which is looked at next

    def seconds(self) -> Callable[[float], float]:
        """A pass's time by the tokens it takes: the line through what was timed, compilation and hiccups left out."""
        passes = [
            one
            for timed in (self.plain, self.wide)
            for one in timed
            if one[1] <= 3 * statistics.median(seconds for _, seconds in timed)
        ]
        fed, took = (sum(column) / len(passes) for column in zip(*passes, strict=True))
        spread = sum((n - fed) ** 2 for n, _ in passes)
        slope = max(0.0, sum((n - fed) * (t - took) for n, t in passes) / spread) if spread else 0.0
        slope = min(slope, took / fed)  # no pass takes less than nothing
        return lambda n: took + slope * (n - fed)

    def survival(self) -> list[float]:
        """Probability that at least 1, 2, ... drafts are kept; a place that was never reached is like the one before."""
        rates, rate = [], 0.7
        for reached, kept in zip(self.reached, self.kept, strict=True):
            rate = (kept + 2 * rate) / (reached + 2)
            rates.append(rate)
        return list(itertools.accumulate(rates, operator.mul))


class _Pace:
    """How long the next block shall be."""

    measured: weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, _Measured]] = weakref.WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel, settings: _Settings, rows: list[_Row], *, sampling: bool, static: bool) -> None:
        self.longest, self.auto, self.rows = settings.k, settings.auto, rows
        self.k = settings.k
        self.laid: dict[int, int] = {}  # masks of a row's last block
        self.probes: list[int] = []  # blocks to come, whatever they promise
        # Static shapes know two lengths: every other would be compiled too.
        self.lengths = sorted({1, self.longest} if static else {1, *(k for k in (2, 4, 8) if k < self.longest), self.longest})
        if self.auto:
            # What a pass takes depends on the rows, of which a line says little beyond those measured, and on the context.
            sizes = len(rows).bit_length(), max(row.limit for row in rows).bit_length()
            key = (settings.thresholds, settings.k, sampling, static, *sizes)
            self.so_far = self.measured.setdefault(model, {}).setdefault(key, _Measured(settings.k))

    @contextmanager
    def step(self, alive: list[_Row], forward: _Forward) -> Iterator[int]:
        """The block to lay in a step, which is timed."""
        if not self.auto:
            yield self.longest
            return
        prefill = not self.laid
        rows = len(self.rows if forward.keeps_rows else alive)
        self.k, forward.fed = self.next(rows, forward.fed_again), 0
        started = time.perf_counter()
        yield self.k
        seconds = time.perf_counter() - started
        if not prefill:
            plain = forward.fed == rows  # one column per row
            (self.so_far.plain if plain else self.so_far.wide).append((forward.fed, seconds))
            self.so_far.since_probe += seconds

    def learn(self, row: _Row, *, kept: int) -> None:
        """So many drafts turned out to be right of the block laid before; older blocks count less and less."""
        if not self.auto:
            return
        so_far = self.so_far
        if not row.done:  # else what cut the block short may have been the end
            for place in range(min(self.laid.get(row.index, 0), kept + 1)):
                so_far.reached[place] = DECAY * so_far.reached[place] + 1
                so_far.kept[place] = DECAY * so_far.kept[place] + (place < kept)
        self.laid[row.index] = self.k - 1

    def next(self, rows: int, fed_again: int) -> int:
        """The block that promises most tokens per second, or one that has not been looked at for long."""
        so_far = self.so_far
        if not so_far.wide:
            return self.longest
        if len(so_far.plain) < 2:
            return 1
        if self.probes:
            return self.probes.pop()
        seconds = so_far.seconds()
        best = self.best(rows, fed_again, seconds)
        longer = self.lengths[self.lengths.index(best) + 1 :][:1]
        # The first step of one token reads what is pending, the second shows what such a step takes.
        other = longer if longer and (best == 1 or so_far.longer_next) else [1, 1]
        costs = sum(seconds(rows * (1 if k == 1 else 2 * k + fed_again)) for k in other)
        if PROBES_SHARE * so_far.since_probe > costs:
            so_far.since_probe, so_far.longer_next, self.probes = 0.0, not so_far.longer_next, other
            return self.probes.pop()
        return best

    def best(self, rows: int, fed_again: int, seconds: Callable[[float], float]) -> int:
        survival = self.so_far.survival()

        def tokens_per_second(k: int) -> float:
            kept = survival[: k - 1]
            widest = 1 + sum(1 - (1 - share) ** rows for share in kept)  # of the rows' pending tokens
            columns = widest + k - 1 + (fed_again if k > 1 else 0)
            return (1 + sum(kept)) / seconds(rows * columns)

        best = max(self.lengths, key=tokens_per_second)
        return best if tokens_per_second(best) > MARGIN * tokens_per_second(1) else 1


# ---------------------------------------------------------------------------------------------------------------------
# The call: defaults, checks, refusals
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """Arguments of the call that transformers does not know or does not pass on."""

    confadapt: float | Sequence[float] | None
    mtp_k: int | str | None
    verify: bool | None
    mtp_blocks: int | None
    mtp_token_id: int | None
    tokenizer: PreTrainedTokenizerBase | None
    streamer: BaseStreamer | None
    past: Cache | None
    synced_gpus: bool


@dataclass(frozen=True)
class _Settings:
    """What a call comes to: largest block, thresholds (0 is static k), verification, and the ids that matter."""

    k: int
    auto: bool
    thresholds: tuple[float, ...]  # of place 1, 2, ... of a block; the last holds for all that follow
    verify: bool
    blocks: int
    mask_token_id: int
    barred_token_ids: tuple[int, ...]


def _settings(model: PreTrainedModel, request: _Request, config: GenerationConfig) -> _Settings:
    """The call's own values, else those of generation_config, else the defaults."""
    adapter = _mask_gated_adapter(model)

    def value(name: str, default: Any) -> Any:
        defaults = {} if adapter is None else adapter.defaults
        given = (getattr(request, name), getattr(config, name, None), defaults.get(name), default)
        return next(one for one in given if one is not None)

    mtp = _mask_tokens(model, request, adapter)
    k = value("mtp_k", mtp["k_max"])
    auto = k == "auto"
    k = mtp["k_max"] if auto else _checked_k(k)
    if k > mtp["k_max"]:
        warnings.warn(f"mtp_k={k} is more than the block size trained, {mtp['k_max']}; use at most that.", stacklevel=2)
    if k > 1 and mtp["mask_token_id"] is None:
        raise ValueError(
            f"{type(model).__name__} has no mask token: its config carries no `mtp`. Pass mtp_token_id=, or tokenizer= "
            f"if it has {PAPER_MASK_TOKENS}0|> or <|mtp|>; or decode one token per pass with mtp_k=1."
        )
    verify = value("verify", False)
    if not isinstance(verify, bool):
        raise ValueError(f"verify must be True or False, got {verify!r}.")
    if auto and (not verify or request.synced_gpus):
        reason = (
            "processes that share weights must agree on the block" if verify else "only verified text does not depend on it"
        )
        raise ValueError(f"mtp_k='auto' goes by the clock, and {reason}; pass a number, or verify=True on its own.")
    blocks = _checked_blocks(value("mtp_blocks", 1))
    if auto and (request.mtp_blocks or 1) > 1:
        raise ValueError(f"mtp_blocks={blocks} does not go with mtp_k='auto'; pass a number as mtp_k, or leave mtp_blocks out.")
    if request.mtp_blocks is not None and blocks > 1 and not verify:
        raise ValueError(f"mtp_blocks={blocks} lays masks where drafts may be rejected; pass verify=True, or leave it out.")
    thresholds = checked_thresholds(value("confadapt", 0.0))
    blocks = min(blocks, k) if verify and not auto else 1  # a default for verified decoding says nothing about other calls
    return _Settings(k, auto, thresholds, verify, blocks, mtp["mask_token_id"] or 0, tuple(mtp["barred_token_ids"]))


def _checked_k(k: Any) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= LARGEST_BLOCK:
        raise ValueError(
            f"mtp_k must be a whole number >= 1, at most {LARGEST_BLOCK}, or 'auto', got {k!r}; 1 is plain decoding."
        )
    return k


def _checked_blocks(blocks: Any) -> int:
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise ValueError(f"mtp_blocks must be a whole number >= 1, got {blocks!r}; 1 lays one block of masks per pass.")
    return blocks


def checked_thresholds(confadapt: Any) -> tuple[float, ...]:
    """A number as the only one, a list as it is; raises ValueError for anything but probabilities."""
    listed = isinstance(confadapt, list | tuple)
    thresholds = tuple(confadapt) if listed else (confadapt,)
    for one in thresholds:
        if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one <= 1:
            raise ValueError(
                f"confadapt must be a probability in [0, 1]{' at every place' if listed else ''}, got {repr(one)[:50]}; 0.9 is "
                "usual, 0 accepts whole blocks."
            )
    if not thresholds:
        raise ValueError(
            "confadapt is an empty list; name at least one probability, the last holds for all places that follow."
        )
    return tuple(map(float, thresholds))


def thresholds_by_place(thresholds: Sequence[float], k: int) -> list[float]:
    """One for each place of a block of k: the last one again and again, or as many as there are places."""
    return [*thresholds, *[thresholds[-1]] * (k - len(thresholds))][:k]


def _mask_tokens(model: PreTrainedModel, request: _Request, adapter: MaskGatedAdapter | None) -> dict[str, Any]:
    """`config.mtp` of the model or of its adapter, or the same made from `mtp_token_id` or the tokenizer's token names."""
    recorded = getattr(model.config, "mtp", None)
    if recorded is None and adapter is not None:
        recorded = _within_vocabulary(adapter.mtp, model)
    if recorded is not None:
        check_mask_tokens(recorded, rows=model.config.get_text_config().vocab_size)
        if request.mtp_token_id not in (None, recorded["mask_token_id"]):
            raise ValueError(
                f"mtp_token_id={request.mtp_token_id} contradicts config.mtp, whose mask token is "
                f"{recorded['mask_token_id']}; leave mtp_token_id out."
            )
        return dict(recorded)
    barred = _mask_ids_by_name(request.tokenizer)
    mask = request.mtp_token_id
    if mask is None:
        mask = barred[0] if barred else None
    elif isinstance(mask, bool) or not 0 <= mask < model.config.get_text_config().vocab_size:
        rows = model.config.get_text_config().vocab_size
        raise ValueError(f"mtp_token_id must be a row of the vocabulary, 0 to {rows - 1}, got {mask!r}.")
    return {
        "mask_token_id": mask,
        "barred_token_ids": sorted({*barred, *([] if mask is None else [mask])}),
        "k_max": PAPER_K_MAX,
    }


_ANY_VOCABULARY = 2**31  # rows, where the vocabulary is not known yet
_BROKEN = "the repository is broken, load another revision."


def check_mask_tokens(mtp: Any, *, rows: int = _ANY_VOCABULARY, where: str = "config.mtp") -> None:
    """A config comes with the repository, from anybody: its values are looked at before anything is built of them."""
    if not isinstance(mtp, dict):
        raise ValueError(f"{where} must hold values by name, got {_short(mtp)}; {_BROKEN}")
    barred = mtp.get("barred_token_ids")
    right = {
        "mask_token_id": _is_whole(mtp.get("mask_token_id"), 0, rows - 1),
        "k_max": _is_whole(mtp.get("k_max"), 1, LARGEST_BLOCK),
        "barred_token_ids": isinstance(barred, list) and len(barred) < rows and all(_is_whole(t, 0, rows - 1) for t in barred),
        "base_vocab_size": _is_whole(mtp.get("base_vocab_size", 1), 1, _ANY_VOCABULARY),
        "mask_token": isinstance(mtp.get("mask_token", ""), str),
        "exact": isinstance(mtp.get("exact", False), bool),
    }
    for name, is_right in right.items():
        if not is_right:
            raise ValueError(
                f"{where} has {name}={_short(mtp.get(name))}: ids are rows of the vocabulary, 0 to {rows - 1}, not all of them "
                f"barred, k_max is 1 to {LARGEST_BLOCK}, base_vocab_size a number >= 1, mask_token text, exact true or false; "
                f"{_BROKEN}"
            )


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _short(value: Any) -> str:
    return repr(str(value)[:50])


def _within_vocabulary(mtp: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """For a base that never got the mask's row: any token can stand at a mask, since the adapter replaces its embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    barred = [token for token in mtp["barred_token_ids"] if token < rows]
    return mtp | {"mask_token_id": min(mtp["mask_token_id"], rows - 1), "barred_token_ids": barred}


def _mask_ids_by_name(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Ids of a tokenizer's mask tokens; the first is the one that is fed."""
    vocabulary: dict[str, int] = {} if tokenizer is None else tokenizer.get_vocab()
    ours = [vocabulary["<|mtp|>"]] if "<|mtp|>" in vocabulary else []
    return ours + [vocabulary[name] for name in sorted(vocabulary) if name.startswith(PAPER_MASK_TOKENS)]


def _pad_token_id(config: GenerationConfig) -> int:
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return next((int(token) for token in (config.pad_token_id, *ends) if token is not None), 0)


def _with_stop_strings(
    criteria: StoppingCriteriaList | None,
    kwargs: dict[str, Any],
    generation_config: GenerationConfig | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> StoppingCriteriaList:
    """The criterion for `stop_strings`, built here: transformers gives a custom loop no tokenizer and raises."""
    configs = [config for config in (generation_config, model.generation_config) if config is not None]
    found = [kwargs.get("stop_strings"), *(config.stop_strings for config in configs)]
    stop_strings = next((strings for strings in found if strings is not None), None)
    kwargs["stop_strings"] = None
    criteria = StoppingCriteriaList(criteria or [])
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError(f"stop_strings={stop_strings!r} needs the tokenizer; pass tokenizer= to generate.")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    return criteria


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and caches on, as in evaluation; every module is left in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


_PLAIN = "leave it out, or decode one token per pass with transformers' own GenerationMixin.generate(model, ...)"
_UNSUPPORTED: dict[str, Any] = {  # of GenerationConfig, with the value that asks for nothing
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


def _refuse_arguments(model: PreTrainedModel, **arguments: Any) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; multi-token decoding takes a causal LM.")
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}= does not go with multi-token decoding: {_PLAIN}.")


def _refuse_cache(implementation: str | None) -> None:
    if implementation not in (None, "dynamic", "static", "hybrid"):
        raise ValueError(
            f"cache_implementation={implementation!r} does not go with multi-token decoding, which keeps its own cache; "
            "leave it out, or pass 'static' for shapes that compile."
        )


def _refuse_generation_config(config: GenerationConfig) -> None:
    _refuse_cache(config.cache_implementation)
    for name, nothing in _UNSUPPORTED.items():
        if (value := getattr(config, name, None)) is not None and value != nothing:
            raise ValueError(f"{name}={value!r} does not go with multi-token decoding: {_PLAIN}.")


def _refuse_model_inputs(model_kwargs: dict[str, Any]) -> None:
    """Whatever is left beside the text would be ignored: images, token types, ..."""
    known = {"attention_mask", "position_ids", "past_key_values", "cache_params", "use_cache", "logits_to_keep"}
    for name, value in model_kwargs.items():
        if name not in known and value is not None:
            raise ValueError(f"{name}= would be ignored, input_ids and attention_mask are all that is read: {_PLAIN}.")


# ---------------------------------------------------------------------------------------------------------------------
# Exact mode: an adapter that acts at the masks alone
# ---------------------------------------------------------------------------------------------------------------------


ADAPTER_FILE = "custom_generate/mtp_adapter.safetensors"
_HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "proxies")


def _adapter_repository() -> str | None:
    """The repository in `model.generate(..., custom_generate=repository)`, where this file came from; None otherwise.

    transformers loads the function from there and keeps the name to itself, so it is read from the call that is waiting.
    """
    frame = sys._getframe(2)  # of the caller of `generate`
    if frame.f_code is not inspect.unwrap(GenerationMixin.generate).__code__:
        return None
    return str(frame.f_locals["custom_generate"])


def _use_adapter_of(repository: str, model: PreTrainedModel, hub_options: dict[str, Any]) -> None:
    """Attach the adapter of an adapter-only repository in place of another, unless the repository has none."""
    attached: MaskGatedAdapter | None = getattr(model, "mtp_adapter", None)
    path = cached_file(repository, ADAPTER_FILE, _raise_exceptions_for_missing_entries=False, **hub_options)
    # The cached file's name holds the commit; a local file may be written anew.
    source = (repository, path and f"{Path(path).resolve()} {Path(path).stat().st_mtime_ns}")
    if attached is not None and attached.source == source:
        return
    adapter = None if path is None else _read_adapter(path, model, source=source)
    if attached is not None:
        attached.detach(model)
    if adapter is not None:
        adapter.attach(model)


def _mask_gated_adapter(model: PreTrainedModel) -> MaskGatedAdapter | None:
    """The adapter of an exact-mode model; the first call reads it from the model's own repository."""
    attached: MaskGatedAdapter | None = getattr(model, "mtp_adapter", None)
    mtp = getattr(model.config, "mtp", None)
    if mtp is not None:
        check_mask_tokens(mtp, rows=model.config.get_text_config().vocab_size)
    if attached is not None or mtp is None or not mtp.get("exact"):
        return attached
    source = (model.config._name_or_path, getattr(model.config, "_commit_hash", None))
    path = cached_file(source[0], ADAPTER_FILE, revision=source[1])
    return _read_adapter(path, model, source=source).attach(model)


def _read_adapter(path: str, model: PreTrainedModel, *, source: tuple[str, str | None]) -> MaskGatedAdapter:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    adapter = MaskGatedAdapter.from_tensors(tensors, metadata)
    adapter.source = source
    adapter.check_base(model)
    return adapter.to(model.dtype)


def base_fingerprint(
    model: PreTrainedModel, names: Sequence[str], *, gathered: Callable[[list[Any]], Any] = nullcontext
) -> str | None:
    """A hash of the first and last rows of the named layers' weights, in bfloat16: equal however the base was loaded.

    None where the weights are not there to be read as they were trained: quantised, in float16, or on no device.
    `gathered` is a context in which sharded weights are whole.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        weight: Any = getattr(model.get_submodule(name), "weight", None)
        if weight is None or weight.is_meta or type(weight) not in (Tensor, nn.Parameter) or type(weight.data) is not Tensor:
            return None
        if weight.dtype not in (torch.float32, torch.bfloat16):
            return None
        with gathered([weight]):
            ends = weight.detach()[[0, -1]].to("cpu", torch.bfloat16)
        digest.update(name.encode() + ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Part(nn.Module):
    """A module, so that frameworks that shard weights gather them when it runs; not part of the model's state dict.

    The model's own weights stay the base's, and the adapter has a file of its own.
    """

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class _LowRankUpdate(_Part):
    """output + (alpha / rank) B A x; without gradient in place."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = scale

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            low = nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A)
            return output + (nn.functional.linear(low, self.lora_B) * self.scale).to(output.dtype)
        low = nn.functional.linear(x, self.lora_A.to(x.dtype)).to(output.dtype)
        return output.baddbmm_(low, self.lora_B.to(output.dtype).T.expand(len(x), -1, -1), alpha=self.scale)


class _MaskRow(_Part):
    """What a mask looks like to the first layer; without gradient in place."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, output: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.weight.to(output.dtype).expand_as(output).clone()  # some models write into their embeddings
        return output.copy_(self.weight)


class MaskGatedAdapter(nn.Module):
    """Low-rank updates of linear layers, and an input row, that act at mask slots alone.

    At a slot y += (alpha / rank) B A x; at every other column the layer's output is left as it is, bit for bit, so the
    text is read by the base whatever the training did.

    Attributes:
        gate: where the adapter acts: the number of columns at the end of every row, or bool [X, T]. It stays set after a
            forward pass, since layers that recompute their activations in backward read it again.
        mtp: `config.mtp` of the model it was trained in.
        defaults: of decoding, `confadapt` and `verify`, for a base whose generation_config knows neither.
        base: name and `base_fingerprint` of the model it was trained on; the fingerprint may be None.
        lora_layers: where the model must have LoRA layers of PEFT's, by name: beside a LoRA, which acts at every column, this
            adapter has no updates of its own and brings the mask's row alone.
        source: the repository and which version of its file it was read from.
    """

    updates: Any  # a ModuleList of _LowRankUpdate, in the order of `names`

    def __init__(self, shapes: dict[str, tuple[int, int]], *, rank: int, alpha: float, hidden_size: int) -> None:
        """`shapes`: (inputs, outputs) of each adapted layer, by its name in the model."""
        super().__init__()
        self.names = list(shapes)
        self.rank, self.alpha = rank, alpha
        scale = alpha / rank
        self.updates = nn.ModuleList(_LowRankUpdate(*shape, rank=rank, scale=scale) for shape in shapes.values())
        self.mask_row = _MaskRow(hidden_size)
        self.gate: int | Tensor = 0
        self.shape = torch.Size((0, 0))  # rows and columns of the pass
        self.mtp: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        self.base: tuple[str, str | None] = ("", None)
        self.source: tuple[str, str | None] | None = None
        self.lora_layers: list[str] = []
        self._hooks: list[RemovableHandle] = []

    def attach(self, model: PreTrainedModel) -> MaskGatedAdapter:
        """Act in `model` from now on, as its submodule `mtp_adapter`."""
        for name, update in zip(self.names, self.updates, strict=True):
            layer, hook = model.get_submodule(name), functools.partial(self._adapt, name, update)
            update.to(_execution_device(layer))  # layers may be spread over devices
            self._hooks.append(layer.register_forward_hook(hook))
        self.mask_row.to(_execution_device(model.get_input_embeddings()))
        self._hooks.append(model.get_input_embeddings().register_forward_hook(self._embed))
        model.mtp_adapter = self
        return self

    def detach(self, model: PreTrainedModel) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        del model.mtp_adapter

    def check_base(self, model: PreTrainedModel) -> None:
        """Raises ValueError for a model that is not the one it was trained on: other layers, vocabulary, mask or weights."""
        name, fingerprint = self.base
        expected = f"The adapter in {self.source[0] if self.source else 'this file'} was trained on {name or 'another model'}"
        remedy = f"load {name or 'its base'} instead."
        layers = dict(model.named_modules())
        for layer, update in zip(self.names, self.updates, strict=True):
            wanted = (update.lora_A.shape[1], update.lora_B.shape[0])
            if layer not in layers or linear_features(layers[layer]) != wanted:
                found = linear_features(layers[layer]) if layer in layers else "no such layer"
                raise ValueError(f"{expected}: {layer} must map {wanted[0]} to {wanted[1]} features, found {found}; {remedy}")
        for layer in self.lora_layers:
            if not hasattr(layers.get(layer), "lora_A"):
                repository = self.source[0] if self.source else "REPOSITORY"
                raise ValueError(
                    f"{repository} is a LoRA adapter, and this model has no LoRA at {layer}: put it on first, with "
                    f"peft.PeftModel.from_pretrained(model, {repository!r})."
                )
        rows = model.get_input_embeddings().weight.shape[0]
        base_rows = self.mtp.get("base_vocab_size")
        last = max(self.mtp.get("barred_token_ids", ()), default=0)
        # As the base has it, or grown by the mask's row, to a height that hardware likes or not.
        if base_rows and rows not in (base_rows, self.mtp["mask_token_id"] + 1, last + 1):
            raise ValueError(f"{expected}: its vocabulary has {base_rows} rows, this model's {rows}; {remedy}")
        own = getattr(model.config, "mtp", None)
        if own is not None:
            check_mask_tokens(own)
        if own is not None and self.mtp and own["mask_token_id"] != self.mtp["mask_token_id"]:
            mask_ids = f"its mask token is {self.mtp['mask_token_id']}, this model's {own['mask_token_id']}"
            raise ValueError(f"{expected}: {mask_ids}; {remedy}")
        actual = base_fingerprint(model, self.names + self.lora_layers)
        if fingerprint is not None and actual is None:
            warnings.warn(
                f"{expected}; whether these weights are the same cannot be told (quantised, float16 or offloaded).",
                stacklevel=2,
            )
        elif fingerprint not in (None, actual):
            raise ValueError(f"{expected}, and these weights differ from it; {remedy}")

    def _adapt(self, name: str, update: _LowRankUpdate, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if isinstance(self.gate, int) and self.gate == 0:
            return output
        flat, x = output, inputs[0]
        if output.ndim == 2 and "expert" not in name and len(output) == math.prod(self.shape):  # OPT flattens rows
            output, x = output.view(*self.shape, -1), x.view(*self.shape, -1)
        if output.shape[:-1] != self.shape:  # experts' tokens, or keys of the whole cache: which are masks cannot be told
            raise ValueError(f"{name} gives {tuple(output.shape)}, not [rows, columns, features]: adapt other modules.")
        return self._where_gated(output, lambda part, columns: update(part, x[:, columns])).view_as(flat)

    def _embed(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.shape = output.shape[:2]
        return self._where_gated(output, lambda part, columns: self.mask_row(part))

    def _where_gated(self, output: Tensor, changed: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """The output with some columns changed: `changed` takes them, and their place, and may write into them."""
        if isinstance(self.gate, Tensor):
            return torch.where(self.gate.to(output.device)[..., None], changed(output.clone(), slice(None)), output)
        if self.gate == 0:
            return output
        tail = changed(output[:, -self.gate :], slice(-self.gate, None))
        if self.gate == output.shape[1]:
            return tail
        return torch.cat([output[:, : -self.gate], tail], 1) if torch.is_grad_enabled() else output

    @contextmanager
    def acting_on(self, gate: int | Tensor) -> Iterator[None]:
        """The gate within the block; 0 after it."""
        self.gate = gate
        try:
            yield
        finally:
            self.gate = 0

    def by_file_name(self) -> dict[str, nn.Parameter]:
        """Its weights by their names in the file, which are those of a LoRA adapter, and the mask's row."""
        named = {"mask_row": self.mask_row.weight}
        for name, update in zip(self.names, self.updates, strict=True):
            named[f"base_model.model.{name}.lora_A.weight"] = update.lora_A
            named[f"base_model.model.{name}.lora_B.weight"] = update.lora_B
        return named

    def metadata(self) -> dict[str, str]:
        """What the file says beside the weights."""
        return {
            "format": "pt",
            "r": str(self.rank),
            "lora_alpha": str(self.alpha),
            "base_model_name_or_path": self.base[0],
            "base_fingerprint": self.base[1] or "",
            "mtp": json.dumps(self.mtp),
            "defaults": json.dumps(self.defaults),
            "lora_layers": json.dumps(self.lora_layers),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> MaskGatedAdapter:
        """An adapter as its file has it.

        Raises:
            ValueError: metadata or tensors that no adapter has.
        """
        said = adapter_metadata(metadata)
        before, behind = "base_model.model.", ".lora_A.weight"
        names = [name[len(before) : -len(behind)] for name in tensors if name.startswith(before) and name.endswith(behind)]
        shapes = {}
        for name in names:
            low, high = (_shape(tensors, f"{before}{name}.lora_{side}.weight") for side in "AB")
            if len(low) != 2 or len(high) != 2 or not low[0] == high[1] == said["r"]:
                raise ValueError(f"{ADAPTER_FILE} has {name} with {low} and {high}, not of rank {said['r']}; {_BROKEN}")
            shapes[name] = (low[1], high[0])
        if len(row := _shape(tensors, "mask_row")) != 1:
            raise ValueError(f"{ADAPTER_FILE} has mask_row with {row}, not one row; {_BROKEN}")
        adapter = cls(shapes, rank=said["r"], alpha=float(said["lora_alpha"]), hidden_size=row[0])
        adapter.mtp, adapter.defaults, adapter.lora_layers = said["mtp"], said["defaults"], said["lora_layers"]
        adapter.base = (metadata.get("base_model_name_or_path", ""), metadata.get("base_fingerprint") or None)
        with torch.no_grad():
            for name, parameter in adapter.by_file_name().items():
                parameter.copy_(tensors[name])
        return adapter


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...]:
    return tuple(tensors[name].shape) if name in tensors else ()


_DEFAULTS = ("confadapt", "verify")  # all that an adapter may say of decoding on its base


def adapter_metadata(metadata: dict[str, str] | None) -> dict[str, Any]:
    """What `MaskGatedAdapter.metadata` wrote, looked at: an adapter comes with its repository, from anybody.

    Raises:
        ValueError: a value is missing or is not what it should be.
    """
    written = {"lora_layers": "[]", **(metadata or {})}

    def value(name: str, is_right: Callable[[Any], bool], wanted: str) -> Any:
        try:
            found = json.loads(written[name])
        except (KeyError, ValueError, RecursionError):
            found = None
        if not is_right(found):
            raise ValueError(f"{ADAPTER_FILE} has {name}={_short(written.get(name))}, which must be {wanted}; {_BROKEN}")
        return found

    said = {
        "r": value("r", lambda r: _is_whole(r, 1, 2**31), "a whole number >= 1"),
        "lora_alpha": value("lora_alpha", lambda alpha: type(alpha) in (int, float) and abs(alpha) < 1e9, "a number"),
        "mtp": value("mtp", lambda mtp: isinstance(mtp, dict), "the mask token's values by name"),
        "defaults": value("defaults", lambda defaults: isinstance(defaults, dict), "decoding defaults by name"),
        "lora_layers": value(
            "lora_layers",
            lambda layers: isinstance(layers, list) and all(isinstance(layer, str) for layer in layers),
            "a list of names",
        ),
    }
    check_mask_tokens(said["mtp"], where=f"`mtp` in {ADAPTER_FILE}")
    said["defaults"] = {name: said["defaults"][name] for name in _DEFAULTS if name in said["defaults"]}
    return said


def linear_features(layer: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, of a quantised one or of GPT-2's transposed one; None of any other module."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return (layer.nx, layer.nf) if hasattr(layer, "nf") else None

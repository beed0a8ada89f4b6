"""Multi-token decoding of causal LMs: several tokens per forward pass, for one row or a batch.

Each step runs one forward pass. It feeds every row its pending tokens, which are those without cached keys and values,
and a block of masks after them:

    [ padding | pending tokens | k - 1 masks ]

The pass predicts a block of k tokens: the first one at the last pending token, the others at the masks. The step accepts
a prefix of the block. The accepted tokens are pending in the next step, which overwrites the keys and values of the masks.
The first step is the prefill: the whole prompt is pending.

    static k      Accept all k tokens.
    ConfAdapt     Accept the longest prefix in which the probability of every token reaches a threshold.
    verified      Treat the accepted tokens after the first one as drafts. The next step feeds them anyway, so it also yields
                  the model's next-token prediction after each of them. Confirm the drafts before the first one that differs
                  from the prediction, and reject the others.
    tree          Verified, with one block of masks for each possible rejection point, so that a step that rejects drafts
                  still has new ones. The blocks do not attend to each other:

                  [ padding | pending tokens | k - 1 masks | k - 1 masks | ... ]

Verified text is token for token what the model generates at one token per pass: greedy, or sampled with noise that depends
only on (seed, prompt, position).

Recurrent states advance over confirmed tokens only. Each step feeds again all tokens that a state has not read yet.

This folder is uploaded with every model as `custom_generate/`. `from_pretrained(..., trust_remote_code=True)` binds
`generate` to the model; `attach_decoder` binds it to a model in memory. It needs torch, transformers and safetensors. Read
`_decode` and `_decode_rows` first, then `rows`, `forward` and `choice`.
"""

# Shapes: A rows not finished, B rows of the batch, L columns of the text, P positions read, V vocabulary

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

# transformers copies only the files that this file imports into its module cache, so import every file of the folder here.
from .adapter import MaskGatedAdapter
from .adapter_file import ADAPTER_FILE  # noqa: F401
from .base import base_fingerprint  # noqa: F401
from .cache import RowOffsetLayer  # noqa: F401
from .cached_forward import CachedForward
from .choice import Choice
from .forward import forward_for
from .forward_base import Forward
from .low_rank import FusedUpdates  # noqa: F401
from .mtp_config import check_mtp_config  # noqa: F401
from .output import MTPGenerateOutput, Scores, output_of
from .pace import Pace
from .past_cache import take_over  # noqa: F401
from .probes import CACHE_NAMES
from .recurrent_forward import RecurrentForward  # noqa: F401
from .repository import HUB_OPTIONS, Repository, adapter_for, being_loaded_from, repository_of
from .rows import Row, Text, rows_of
from .sampling import draw  # noqa: F401
from .settings import (
    Request,
    pad_token_id,
    refuse_arguments,
    refuse_cache,
    refuse_generation_config,
    refuse_model_inputs,
    settings_of,
)
from .sharding import ranks_wait_for_each_other
from .stopping import Stops, with_stop_strings


def generate_blocks(
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
    repository: Repository | None = None,
    confadapt: float | Sequence[float] | None = None,
    mtp_k: int | str | None = None,
    verify: bool | None = None,
    mtp_blocks: int | None = None,
    mtp_token_id: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs: Any,
) -> Tensor | MTPGenerateOutput:
    """Generate several tokens per forward pass. Arguments not listed here are those of `GenerationMixin.generate`.

    To continue a conversation, pass its `DynamicCache` as `past_key_values`, or as `cache`, its name since transformers 5.24.
    It must cover the first columns of `inputs`. After the call it covers the columns, generated ones included, that are cached
    in every row.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("you/adapted", trust_remote_code=True)
        >>> model.generate(**tokenizer("Count to ten: 1, 2,", return_tensors="pt"), confadapt=0.9, max_new_tokens=32)

    Args:
        inputs: prompts, int64 [B, L], padded on the left. `attention_mask` marks the padding.
        generation_config: may set `confadapt`, `mtp_k`, `verify` and `mtp_blocks`, as `model.generation_config` may.
        model: bound by `from_pretrained` and `attach_decoder`.
        repository: source of exact mode's adapter, bound by `from_pretrained` and `custom_generate=`.
        confadapt: probability in [0, 1] that every token of an accepted block must reach; 0 accepts whole blocks
            (static k). Or a list with one threshold for each position of a block, the last of which holds for all later
            positions. The first token of a block is always accepted; if it misses its own threshold, no other token is.
            None: the repository's default, else static k.
        mtp_k: largest block size; 1 is plain decoding. "auto", only with `verify`, picks the block size and the number of
            blocks of each step for the most tokens per second, estimated from the confirmed drafts and the timed passes so
            far. None: the repository's default, else "auto" for verified decoding in float32 without `mtp_blocks`, else the
            trained block size.
        verify: return exactly the text of one token per pass. None: the repository's default, else False.
        mtp_blocks: with `verify`, the number of possible rejection points that get their own block of masks; the
            value of `mtp_k` covers all of them. More blocks give more tokens per pass but wider passes, so they pay off if
            wide passes cost little more. With "auto" it is an upper limit. None: the repository's default, else no limit with
            "auto" (without static shapes), else 1. With logits processors that read the text it is always 1.
        mtp_token_id: the mask token, for checkpoints without `config.mtp`. None: `tokenizer`, if passed, finds it by name.
        tokenizer: needed for `stop_strings`.

    Returns:
        Tokens int64 [B, L], or `MTPGenerateOutput` with `return_dict_in_generate=True`.

    Raises:
        ValueError: a value is out of range, or multi-token decoding does not support an argument.
    """
    if repository is not None and repository.per_call:  # transformers passes its Hub options on to us
        kwargs = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
    refuse_arguments(
        model,
        assistant_model=assistant_model,
        negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
        **{name: kwargs.get(name) for name in ("custom_generate", "inputs_embeds", "cache_params", "position_ids")},
    )
    refuse_cache(kwargs.get("cache_implementation"))  # "paged" would make transformers bypass `_decode`
    config = generation_config or model.generation_config
    if kwargs.get("eos_token_id", config.eos_token_id) == []:  # no EOS; transformers would read the first entry
        kwargs["eos_token_id"] = None
    if generation_config is None:  # ignore a use_cache=False that training left in model.generation_config
        kwargs.setdefault("use_cache", True)
    stopping_criteria = with_stop_strings(stopping_criteria, kwargs, generation_config, model, tokenizer)
    if synced_gpus is None:
        synced_gpus = ranks_wait_for_each_other(model)
    past = kwargs.pop("past_key_values", None)
    if past is None:
        past = kwargs.get(CACHE_NAMES[0])
    elif kwargs.setdefault(CACHE_NAMES[0], past) is not past:
        raise ValueError("past_key_values= and cache= name the same argument; pass one of them.")
    request = Request(confadapt, mtp_k, verify, mtp_blocks, mtp_token_id, tokenizer, streamer, past, synced_gpus)
    with adapter_for(model, repository) as adapter, evaluating(model):
        loop = functools.partial(_decode, request=request, adapter=adapter)
        output: Tensor | MTPGenerateOutput = GenerationMixin.generate(
            model,
            inputs,
            generation_config,
            logits_processor,
            stopping_criteria,
            prefix_allowed_tokens_fn,
            streamer=streamer,
            custom_generate=loop,
            **kwargs,
        )
    return output


def __getattr__(name: str) -> Any:
    """Return `generate`. While transformers loads it from a repository, bind it to that repository."""
    if name != "generate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    repository = being_loaded_from()
    return generate_blocks if repository is None else functools.partial(generate_blocks, repository=repository)


def attach_decoder(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Make `model.generate` decode several tokens per forward pass, and return the model.

    For a PEFT model this replaces `generate` of its base, which `PeftModel.generate` calls. The adapter of an exact-mode model
    that was loaded without `trust_remote_code` is read from the same repository.

    Args:
        options: the arguments of `from_pretrained` that the adapter's file needs, such as `subfolder` and `token`.

    Raises:
        ValueError: the model was adapted in exact mode, and its adapter cannot be read.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.generate = functools.partial(generate_blocks, model=base, repository=repository_of(base, **options))
    return model


def _decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    request: Request,
    adapter: MaskGatedAdapter | None,
    **model_kwargs: Any,
) -> Tensor | MTPGenerateOutput:
    """Decode a batch. `GenerationMixin.generate` calls this after it has merged the configs and prepared the inputs."""
    # 1. Read the settings and the stopping criteria, and split the batch into rows.
    refuse_generation_config(generation_config)
    refuse_model_inputs(model_kwargs)
    settings = settings_of(model, request, generation_config, adapter)
    seed = int(torch.randint(2**62, ()).item()) if generation_config.do_sample else None
    stops = Stops(stopping_criteria)
    rows = rows_of(input_ids, model_kwargs.get("attention_mask"), max_length=stops.max_length, seed=seed)
    if request.streamer is not None and len(rows) > 1:
        raise ValueError(f"A streamer takes one row, got {len(rows)}; decode the rows one by one to stream them.")
    if not request.synced_gpus:  # do not feed masks for more tokens than may be generated
        longest = max(row.limit - row.prompt_length for row in rows)
        settings = replace(settings, k=min(settings.k, longest), blocks=min(settings.blocks, longest))

    # 2. Prepare the forward passes, the choice of tokens and the block size of each step.
    text = Text(input_ids, rows, pad_token_id=pad_token_id(generation_config))
    choose = Choice(settings, logits_processor, text, sampling=seed is not None)
    synced, past = request.synced_gpus, request.past
    forward = forward_for(model, choose.settings, rows, generation_config, adapter=adapter, synced=synced, past=past)
    static = generation_config.cache_implementation == "static"
    pace = Pace(model, choose.settings, rows, forward, sampling=seed is not None, static=static)
    scores = Scores(generation_config, rows)

    # Steps 3 to 7 are in `_decode_rows`.
    with forward.hooks_restored():
        if settings.k == 1 and not synced:
            forward.hook_adapter(False)
        _decode_rows(rows, forward, choose, pace, stops, text, scores, verify=settings.verify, streamer=request.streamer)
        forward.run_until_all_ranks_finish()

    # 8. Update the caller's cache, and return the text.
    if isinstance(forward, CachedForward) and past is not None:
        forward.hand_back(past)
    if request.streamer is not None:
        request.streamer.end()
    return output_of(rows, text, scores, past) if generation_config.return_dict_in_generate else text.tensor()


def _decode_rows(
    rows: list[Row],
    forward: Forward,
    choose: Choice,
    pace: Pace,
    stops: Stops,
    text: Text,
    scores: Scores,
    *,
    verify: bool,
    streamer: BaseStreamer | None,
) -> None:
    """Prefill, then decode and verify in steps, until every row is finished."""
    alive = list(rows)
    while alive:
        with pace.step(alive) as (k, blocks):
            # 3. Run one forward pass over [pending tokens | masks]. The first one is the prefill: the prompt is pending.
            logits_APV, masks = forward(alive, k, blocks)
            # 4. Choose a token at every position read, and how many tokens of each block to accept.
            choices = list(choose(logits_APV.to(text.input_ids.device), alive, k, blocks, masks=masks))

        # 5. Verify: confirm the drafts before the first one that differs from the model's choice, then add the next block.
        for row, chosen in zip(alive, choices, strict=True):
            row.verify(chosen.next_tokens, chosen.blocks, keep_drafts=verify, eos=stops.eos)
        stops(alive, text)

        # 6. Emit the new tokens.
        for member, (row, chosen) in enumerate(zip(alive, choices, strict=True)):
            new = row.finish_step()
            first = logits_APV.shape[1] - masks - len(chosen.next_tokens)
            scores.record(row, logits_APV, choose.scores_APV, member, first=first, count=len(new))
            pace.learn(row, confirmed=len(new) - 1)
            if streamer is not None:
                streamer.put(torch.tensor(new))

        # 7. Drop finished rows from the batch.
        alive = forward.drop_finished(alive)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode within the block, and restore each module's mode after it.

    This turns off dropout, and gradient checkpointing, which would disable the cache.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

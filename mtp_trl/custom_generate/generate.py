"""Multi-token decoding: several tokens per forward pass, for one row or many. Needs torch and transformers (with safetensors).

A step feeds every row, right-aligned, the tokens whose keys and values are not cached yet and a block of masks,

    [ padding | pending tokens | k - 1 masks ]

and reads a block of k predictions: the first at the last pending token, the others at the masks. It accepts a prefix
of the block, which is pending in the next step; the masks' keys and values are overwritten there. The prefill is the
first step: the whole prompt is pending.

    static k      accept all k
    ConfAdapt     accept the longest prefix in which every token's probability reaches a threshold
    verified      accepted tokens are drafts: the next step feeds them anyway, so the model's own prediction after each
                  of them can be read there, and drafts are returned only as far as they agree with it
    tree          verified, with a block of masks for each point at which the drafts may be rejected,

    [ padding | pending tokens | k - 1 masks | k - 1 masks | ... ]

                  so that a step that rejects drafts has new ones all the same; the blocks do not see each other

Recurrent states advance over confirmed tokens only; what comes after these is fed again in each step.

Verified text is exactly the model's own, one token per pass: greedy, or sampled with noise that depends on (seed,
prompt, position) and on nothing else.

This folder is uploaded with every model as `custom_generate/`. `from_pretrained(..., trust_remote_code=True)` binds
`generate` to the model; `attach_decoder` does so for a model in memory. Read `_decode` first, then `rows`, `forward`,
`choice`.
"""

# Shapes: A rows not finished, B rows of the batch, L columns of the text, P positions read, V vocabulary

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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

# transformers copies the files that this one imports into its cache, so all of the folder are imported here.
from .adapter import MaskGatedAdapter
from .adapter_file import ADAPTER_FILE  # noqa: F401
from .base import base_fingerprint  # noqa: F401
from .cache import RowOffsetLayer  # noqa: F401
from .cached_forward import CachedForward
from .choice import Choice
from .forward import forward_for
from .forward_base import Forward
from .mtp_config import check_mtp_config  # noqa: F401
from .output import MTPGenerateOutput, Scores, output_of
from .pace import Pace
from .past_cache import take_over  # noqa: F401
from .probes import execution_device  # noqa: F401
from .recurrent_forward import RecurrentForward  # noqa: F401
from .repository import HUB_OPTIONS, Repository, adapter_for, being_loaded_from, one_at_a_time
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
    """`GenerationMixin.generate`, several tokens per forward pass. Arguments not listed here mean what they mean there.

    A `past_key_values=` handed in (a `DynamicCache`, for a conversation that goes on) covers the first columns of
    `inputs`; in the end it covers the columns, generated ones too, that are cached in all rows.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("you/adapted", trust_remote_code=True)
        >>> model.generate(**tokenizer("Count to ten: 1, 2,", return_tensors="pt"), confadapt=0.9, max_new_tokens=32)

    Args:
        inputs: prompts, int64 [B, L], padded on the left; `attention_mask` tells tokens from padding.
        generation_config: may carry `confadapt`, `mtp_k`, `verify` and `mtp_blocks`, as the model's own may.
        model: bound by `from_pretrained` and `attach_decoder`.
        repository: bound by `from_pretrained` and `custom_generate=`: where exact mode's adapter comes from.
        confadapt: probability in [0, 1] that every token of an accepted block must reach; 0 accepts whole blocks
            (static k). Or a list with one for each position of a block, the last of which holds for all that follow: the
            first token is accepted anyway, and its own decides whether any others are. None: the repository's default, else
            static k.
        mtp_k: largest block; 1 is plain decoding; "auto", with `verify`: in each step the block that promises most tokens
            per second, by the drafts accepted so far and the passes timed. None: the block size trained.
        verify: return exactly the model's own text. None: the repository's default, else False.
        mtp_blocks: with `verify`, how many of the points at which the drafts may be rejected get a block of masks of their
            own: `mtp_k` covers all. More tokens per pass for wider passes, so it pays where wide passes cost little more.
            None: 1. Logits processors that read the text take 1.
        mtp_token_id: the mask token, for checkpoints that carry no `config.mtp`; with `tokenizer` it is found by name.
        tokenizer: needed for `stop_strings`.

    Returns:
        Tokens int64 [B, L], or `MTPGenerateOutput` with `return_dict_in_generate=True`.

    Raises:
        ValueError: for values out of range and for what multi-token decoding cannot do.
    """
    if repository is not None and repository.per_call:  # transformers passes these on to us as well
        kwargs = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
    refuse_arguments(
        model,
        assistant_model=assistant_model,
        negative_prompt_ids=negative_prompt_ids,
        negative_prompt_attention_mask=negative_prompt_attention_mask,
        **{name: kwargs.get(name) for name in ("custom_generate", "inputs_embeds", "cache_params", "position_ids")},
    )
    refuse_cache(kwargs.get("cache_implementation"))  # transformers would leave for paged decoding
    config = generation_config or model.generation_config
    if kwargs.get("eos_token_id", config.eos_token_id) == []:  # none at all; transformers would look at the first
        kwargs["eos_token_id"] = None
    if generation_config is None:  # a default of False, from training, says nothing about this cache
        kwargs.setdefault("use_cache", True)
    stopping_criteria = with_stop_strings(stopping_criteria, kwargs, generation_config, model, tokenizer)
    if synced_gpus is None:
        synced_gpus = ranks_wait_for_each_other(model)
    past = kwargs.get("past_key_values")
    request = Request(confadapt, mtp_k, verify, mtp_blocks, mtp_token_id, tokenizer, streamer, past, synced_gpus)
    with one_at_a_time(model, repository), evaluating(model):
        loop = functools.partial(_decode, request=request, adapter=adapter_for(model, repository))
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
    """`generate`: while transformers is fetching it for a model, bound to the repository that it comes from."""
    if name != "generate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    repository = being_loaded_from()
    return generate_blocks if repository is None else functools.partial(generate_blocks, repository=repository)


def attach_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Make `model.generate` this module's. Of a PEFT model its base is bound, which `PeftModel.generate` calls."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.generate = functools.partial(generate_blocks, model=base)
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
    """The loop that `GenerationMixin.generate` calls, with everything of its own already merged and prepared."""
    # 1. What is asked for, the rows, and where they end.
    refuse_generation_config(generation_config)
    refuse_model_inputs(model_kwargs)
    settings = settings_of(model, request, generation_config, adapter)
    seed = int(torch.randint(2**62, ()).item()) if generation_config.do_sample else None
    stops = Stops(stopping_criteria)
    rows = rows_of(input_ids, model_kwargs.get("attention_mask"), max_length=stops.max_length, seed=seed)
    if request.streamer is not None and len(rows) > 1:
        raise ValueError(f"A streamer takes one row, got {len(rows)}; decode the rows one by one to stream them.")
    if not request.synced_gpus:  # masks for more tokens than can still come would be fed for nothing
        room = max(row.limit - row.prompt_length for row in rows)
        settings = replace(settings, k=min(settings.k, room), blocks=min(settings.blocks, room))

    # 2. How a step is run, how its tokens are chosen, and how long its block is.
    text = Text(input_ids, rows, pad_token_id=pad_token_id(generation_config))
    choose = Choice(settings, logits_processor, text, sampling=seed is not None)
    synced, past = request.synced_gpus, request.past
    forward = forward_for(model, choose.settings, rows, generation_config, adapter=adapter, synced=synced, past=past)
    static = generation_config.cache_implementation == "static"
    pace = Pace(model, choose.settings, rows, sampling=seed is not None, static=static)
    scores = Scores(generation_config, rows)

    with forward.without_adapter() if settings.k == 1 and not synced else nullcontext():
        _run(rows, forward, choose, pace, stops, text, scores, verify=settings.verify, streamer=request.streamer)
        forward.run_until_all_ranks_finish()

    # 8. Give back what was handed in, and return.
    if isinstance(forward, CachedForward) and past is not None:
        forward.hand_back(past)
    if request.streamer is not None:
        request.streamer.end()
    return output_of(rows, text, scores, past) if generation_config.return_dict_in_generate else text.tensor()


def _run(
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
    """Decode until every row has ended."""
    alive = list(rows)
    while alive:
        with pace.step(alive, forward) as k:
            # 3. Prefill or decode: one forward pass over [pending tokens | masks]. At first the whole prompt is pending.
            logits_APV, masks = forward(alive, k)
            # 4. Choose a token at every position that was read, and how much of each block is accepted.
            choices = list(choose(logits_APV.to(text.input_ids.device), alive, k, masks=masks))  # where processors expect it

        # 5. Verify: drafts are confirmed as far as the model's own choices agree; the accepted block follows them.
        for row, chosen in zip(alive, choices, strict=True):
            row.verify(chosen.own, chosen.blocks, keep_drafts=verify, eos=stops.eos)
        stops(alive, text)

        # 6. Emit the new tokens.
        for member, (row, chosen) in enumerate(zip(alive, choices, strict=True)):
            new = row.finish_step()
            first = logits_APV.shape[1] - masks - len(chosen.own)
            scores.record(row, logits_APV, choose.scores_APV, member, first=first, count=len(new))
            pace.learn(row, confirmed=len(new) - 1)
            if streamer is not None:
                streamer.put(torch.tensor(new))

        # 7. Rows that ended leave the batch.
        alive = forward.drop_finished(alive)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and caches on, as in evaluation; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

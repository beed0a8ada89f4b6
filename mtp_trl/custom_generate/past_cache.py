"""The caller's cache: copy its keys and values before decoding, and update it after decoding."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .cache import RowOffsetLayer
from .probes import CACHE_NAMES, cache_layers
from .rows import Row

ATTENTION_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer}


def take_over(past: Cache, layers: list[RowOffsetLayer], rows: list[Row], *, scratch: int) -> None:
    """Copy the keys and values of a cache that covers the first columns of the prompts.

    Raises:
        ValueError: the cache is not a DynamicCache, or does not fit the prompts or the model.
    """
    if any(type(layer) not in ATTENTION_LAYERS for layer in past.layers):
        found = f"{type(past).__name__} of {sorted({type(layer).__name__ for layer in past.layers})}"
        remedy = "pass DynamicCache(config=model.config), or leave it out"
        raise ValueError(f"{CACHE_NAMES[0]}= must be a DynamicCache, got {found}; {remedy}.")
    cached = past.get_seq_length()
    if cached == 0:
        return
    _check_fit(past, layers, rows, cached=cached)
    for row in rows:
        row.cached = min(sum(row.is_prompt[:cached]), len(row.tokens) - 1)  # the last token is fed for its logits
        for past_layer in past.layers:
            if isinstance(past_layer, DynamicSlidingWindowLayer):
                # A sliding layer holds only its last columns. If some of them are padding, or if the last token is fed again,
                # they may not cover the window of the next token. Then the row is read from its start.
                first = sum(row.is_prompt[: cached - past_layer.keys.shape[2]])
                if first > max(0, row.cached - past_layer.sliding_window + 1):
                    row.cached = 0
    for layer, past_layer in zip(layers, past.layers, strict=True):
        layer.lazy_initialization(past_layer.keys, past_layer.values)
        first = cached - past_layer.keys.shape[2]  # sliding layers hold only the last columns
        for row in rows:
            columns = [column - first for column, real in enumerate(row.is_prompt[:cached]) if real and column >= first]
            end = scratch + sum(row.is_prompt[:cached])
            layer.keys[row.index, :, end - len(columns) : end] = past_layer.keys[row.index][:, columns]
            layer.values[row.index, :, end - len(columns) : end] = past_layer.values[row.index][:, columns]


def _check_fit(past: Cache, layers: list[RowOffsetLayer], rows: list[Row], *, cached: int) -> None:
    found, width = len(past.layers[0].keys), len(rows[0].is_prompt)
    if found != len(rows) or cached > width:
        remedy = "pass the whole conversation as input_ids, cached tokens included"
        if found != len(rows):
            remedy = "for several answers to one prompt, call its batch_repeat_interleave(num_return_sequences) first"
        raise ValueError(
            f"{CACHE_NAMES[0]}= holds {found} rows of {cached} tokens, the prompts are {len(rows)} rows of {width}; {remedy}."
        )
    if len(past.layers) != len(layers):
        sizes = f"{len(past.layers)} layers, the model {len(layers)}"
        raise ValueError(f"{CACHE_NAMES[0]}= has {sizes}; pass DynamicCache(config=model.config).")


def hand_back(past: Cache, layers: list[RowOffsetLayer], rows: list[Row], model: PreTrainedModel, *, scratch: int) -> None:
    """Set the layers of `past` to the columns that are cached in all rows."""
    is_text = [[*row.is_prompt, *[True] * (len(row.tokens) - row.prompt_length)] for row in rows]
    # A stopping criterion may have cut a row to fewer tokens than are cached.
    cached = min(len(row.is_prompt) - row.prompt_length + min(row.cached, len(row.tokens)) for row in rows)
    past.layers = cache_layers(model)
    for past_layer, layer in zip(past.layers, layers, strict=True):
        keys, values = (states.new_zeros((*states.shape[:2], cached, states.shape[3])) for states in (layer.keys, layer.values))
        for row, real in zip(rows, is_text, strict=True):
            columns = [column for column in range(cached) if real[column]]
            slots = slice(scratch, scratch + len(columns))
            keys[row.index][:, columns] = layer.keys[row.index, :, slots]
            values[row.index][:, columns] = layer.values[row.index, :, slots]
        past_layer.update(keys, values)

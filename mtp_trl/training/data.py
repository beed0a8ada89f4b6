"""Prepare datasets for training: map columns, tokenise prompts and completions, and drop unusable rows.

Supported columns, tried in this order: `prompt` + `completion` (text or messages), `messages` (the last turn is the
completion), `text` (everything after its first token is the completion), only `prompt` (the model completes it during
training). The conventions are those of `trl.SFTTrainer`: one BOS; EOS after a plain-text completion that has none; chat
templates end their own turns; loss on completions only. In an optional column `finish_reason`, "length" says that the
completion was cut, so neither EOS nor an end of the turn follows it; "stop" or null changes nothing. This module uses no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .encoding import DataRow, Encoder, Form, form_of, listed

# First rows that are checked for nulls before anything is tokenised, and the largest accepted share of nulls in a column.
_CHECKED_ROWS = 100
_MAX_NULL_SHARE = 0.25


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    column_map: Mapping[str, str] | None = None,
    max_length: int | None = None,
    mask_token: str | None = None,
    desc: str = "train",
) -> Dataset | IterableDataset:
    """Return rows with `prompt` and, if the data has completions, `prompt_ids` and `completion_ids` (lists of ints).

    No token spans the boundary between prompt and completion, as in generation. Rows with a null, with an empty completion or
    with a prompt that fills `max_length` are dropped, and longer completions are truncated; the counts are logged. Prompt-only
    data keeps only its `prompt` column and is completed on policy. A malformed row raises an error before training starts. In a
    stream, a malformed row that follows good ones is dropped with a warning instead, because it may be read hours into the
    training.

    Args:
        dataset: dataset with any of the column sets above, and optionally `finish_reason`.
        tokenizer: needs a chat template if the data is conversational.
        column_map: renames columns, e.g. `{"question": "prompt", "answer": "completion"}`.
        max_length: longest prompt + completion in tokens; None for no limit.
        mask_token: a string that must not occur in the text, since its id marks positions to predict.
        desc: name of the split in progress bars and messages.

    Raises:
        ValueError: if a column is missing or mostly null, the columns match no supported set, a row contains the mask token or
            an unknown `finish_reason`, the tokenizer has no chat template for conversational data, or no row is left to train
            on.
    """
    dataset = rename_columns(dataset, column_map)
    columns = column_names(dataset)
    form = form_of(columns, desc)
    _check_filled(dataset, form, desc)
    streamed = not isinstance(dataset, Dataset)
    encoder = Encoder(tokenizer, form, max_length, mask_token, desc, streamed)
    # With the cache of `datasets`, a second run would skip the checks and counts of rows.
    options: dict[str, Any] = {} if streamed else {"desc": f"Tokenizing {desc}", "load_from_cache_file": False}
    if form.columns == ("prompt",):
        prepared = dataset.select_columns(["prompt"]).filter(encoder.can_be_completed, **options)
    else:
        prepared = dataset.map(encoder, batched=True, with_indices=True, remove_columns=columns, **options)
    encoder.report()
    if isinstance(prepared, Dataset) and not len(prepared):
        raise ValueError(f"No row of the {desc} set is left to train on: {encoder.summary() or 'it has no rows'}.")
    return prepared


def rename_columns(dataset: Any, column_map: Mapping[str, str] | None) -> Any:
    """Rename columns according to a column map.

    Raises:
        ValueError: if a column to rename is missing, or its new name is taken.
    """
    for old, new in (column_map or {}).items():
        columns = column_names(dataset)
        _check_column(old, columns, "column_map renames")
        if new in columns:
            raise ValueError(
                f"column_map renames {old!r} to {new!r}, but the dataset has a column {new!r} already; "
                f"rename the existing {new!r} first."
            )
        dataset = dataset.rename_column(old, new)
    return dataset


def format_columns(
    dataset: Any,
    *,
    column_map: Mapping[str, str] | None = None,
    prompt_format: str | None = None,
    completion_format: str | None = None,
    as_messages: bool = False,
) -> Any:
    """Apply format strings to plain-text prompts and completions, and optionally convert them to messages.

    Args:
        dataset: dataset whose columns keep their names.
        column_map: column map that is applied later; it tells which columns hold `prompt` and `completion`.
        prompt_format, completion_format: texts in which `{}` stands for the text of the column.
        as_messages: convert the prompt to a user message and the completion, if there is one, to an assistant message.

    Raises:
        ValueError: if a format does not contain exactly one `{}`, or its column is missing.
    """
    source = {new: old for old, new in (column_map or {}).items()}
    columns = column_names(dataset)
    formats: dict[str, tuple[str, str]] = {}
    for name, role, text in (("prompt", "user", prompt_format), ("completion", "assistant", completion_format)):
        if text is not None and text.count("{}") != 1:
            raise ValueError(f"{name}_format must contain exactly one {{}}, which stands for the {name}, got {text!r}.")
        column = source.get(name, name)
        if text is not None or (as_messages and (name == "prompt" or column in columns)):
            _check_column(column, columns, f"the {name} is formatted from")
            formats[column] = (role, text or "{}")
    if not formats:
        return dataset

    def format_row(row: DataRow) -> dict[str, Any]:
        formatted: dict[str, Any] = {}
        for column, (role, text) in formats.items():
            if row[column] is None:  # the encoder drops and counts such rows
                formatted[column] = None
                continue
            # str.format would fail on the braces that are common in mathematics and code.
            content = text.replace("{}", row[column])
            formatted[column] = [{"role": role, "content": content}] if as_messages else content
        return formatted

    return dataset.map(format_row, desc="Formatting") if isinstance(dataset, Dataset) else dataset.map(format_row)


def _check_column(column: str, columns: Sequence[str], purpose: str) -> None:
    if column not in columns:
        close = get_close_matches(column, columns, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"{purpose} {column!r}, but the dataset has the columns {listed(columns)}{hint}")


def column_names(dataset: Any) -> list[str]:
    """Return the columns of a dataset. A streamed dataset that declares none is read up to its first row."""
    return list(dataset.column_names or next(iter(dataset)))


def _check_filled(dataset: Any, form: Form, desc: str) -> None:
    """Raise ValueError if a column has many nulls, which happens when datasets with different column names are mixed."""
    head = list(dataset.take(_CHECKED_ROWS))
    for column in form.columns:
        empty = sum(row[column] is None for row in head)
        if empty > _MAX_NULL_SHARE * len(head):  # rows with fewer nulls are dropped one by one
            raise ValueError(
                f"Column {column!r} of the {desc} set is null in {empty} of the first {len(head)} rows. Mixing "
                "datasets whose columns have different names causes this; give them the same names before mixing."
            )


def has_completions(dataset: Any) -> bool:
    """Whether a prepared dataset contains completions. True if there is no dataset, since nothing has to be completed."""
    return dataset is None or "completion_ids" in column_names(dataset)


def check_one_step(dataset: Any, *, per_device: int, accumulation: int, processes: int) -> None:
    """Raise ValueError if the dataset has fewer rows than one optimizer step needs.

    TRL's sampler drops rows that do not fill a global batch, so training would run for zero steps.
    """
    if dataset is None or isinstance(dataset, IterableDataset):
        return
    needed = per_device * accumulation * processes
    if len(dataset) < needed:
        raise ValueError(
            f"The training set has {len(dataset)} usable rows, fewer than the {needed} of one optimizer step "
            f"({per_device} per device x {accumulation} accumulation steps x {processes} processes); lower one of these or "
            "add data."
        )

"""Datasets into rows of ids: which columns there are, how a prompt and its completion are tokenised, what is left out.

Accepted forms, in this order: `prompt` + `completion` (text or messages), `messages` (the last turn is the completion),
`text` (everything after its first token is the completion), `prompt` alone (the model completes it during training).
The conventions are those of `trl.SFTTrainer`: BOS once, EOS after a plain-text completion that has none, chat templates
end their own turns, loss on completions. No model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .encoding import DataRow, Encoder, Form, form_of, listed

# Rows looked at before anything is tokenised.
_PEEK = 100
_NULLS = 0.25  # of the first rows: more than that is no accident


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    column_map: Mapping[str, str] | None = None,
    max_length: int | None = None,
    mask_token: str | None = None,
    desc: str = "train",
) -> Dataset | IterableDataset:
    """Rows with `prompt` and, where the data has completions, `prompt_ids` and `completion_ids` (lists of ints).

    A completion's ids continue the prompt's, never merging across the boundary, since that is what generation does.
    Rows with a null, rows without a completion and rows whose prompt alone fills `max_length` are left out, longer
    completions are cut; the counts are logged. Prompt-only data comes back with its `prompt` column alone, to be completed
    on policy. A malformed row is an error, which comes before any work is lost; behind good rows of a stream, perhaps hours
    into the training, it is left out with a warning.

    Args:
        dataset: any of the forms above.
        tokenizer: with a chat template if the data is conversational.
        column_map: renames columns, e.g. `{"question": "prompt", "answer": "completion"}`.
        max_length: longest prompt + completion in tokens; None for no limit.
        mask_token: a string that must not occur in the text, since its id stands for a place to predict.
        desc: name of the split in progress bars and messages.

    Raises:
        ValueError: a column is missing or empty, no accepted form fits, a row contains the mask token, a tokenizer has
            no chat template for conversational data, or nothing is left to train on.
    """
    dataset = rename_columns(dataset, column_map)
    columns = column_names(dataset)
    form = form_of(columns, desc)
    _check_filled(dataset, form, desc)
    streamed = not isinstance(dataset, Dataset)
    encoder = Encoder(tokenizer, form, max_length, mask_token, desc, streamed)
    # With the cache, a second run would skip the rows' checks and counts.
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
    """Apply a column map.

    Raises:
        ValueError: a column to rename is not there, or its new name is taken.
    """
    for old, new in (column_map or {}).items():
        columns = column_names(dataset)
        _check_column(old, columns, "column_map renames")
        if new in columns:
            raise ValueError(
                f"column_map renames {old!r} to {new!r}, but the dataset has a column {new!r} already; "
                "map that one to another name first."
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
    """Put plain-text prompts and completions into a frame, or into messages for the chat template.

    Args:
        dataset: its columns keep their names.
        column_map: which columns will be `prompt` and `completion` once it is applied.
        prompt_format, completion_format: texts in which `{}` stands for the column's own text.
        as_messages: make the prompt a user's message and the completion, where there is one, an assistant's.

    Raises:
        ValueError: a format without exactly one `{}`, or a column it needs is missing.
    """
    source = {new: old for old, new in (column_map or {}).items()}
    columns = column_names(dataset)
    frames: dict[str, tuple[str, str]] = {}
    for name, role, text in (("prompt", "user", prompt_format), ("completion", "assistant", completion_format)):
        if text is not None and text.count("{}") != 1:
            raise ValueError(f"{name}_format needs one {{}} where the {name} goes, got {text!r}.")
        column = source.get(name, name)
        if text is not None or (as_messages and (name == "prompt" or column in columns)):
            _check_column(column, columns, f"the {name} is to be formatted from")
            frames[column] = (role, text or "{}")
    if not frames:
        return dataset

    def frame(row: DataRow) -> dict[str, Any]:
        framed: dict[str, Any] = {}
        for column, (role, text) in frames.items():
            if row[column] is None:  # left out, and counted, where rows are encoded
                framed[column] = None
                continue
            # Not str.format: braces are common in mathematics and code.
            content = text.replace("{}", row[column])
            framed[column] = [{"role": role, "content": content}] if as_messages else content
        return framed

    return dataset.map(frame, desc="Formatting") if isinstance(dataset, Dataset) else dataset.map(frame)


def _check_column(column: str, columns: Sequence[str], wanted: str) -> None:
    if column not in columns:
        close = get_close_matches(column, columns, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"{wanted} {column!r}, but the dataset has the columns {listed(columns)}{hint}")


def column_names(dataset: Any) -> list[str]:
    """The columns of a dataset, also of a streamed one that does not declare them."""
    return list(dataset.column_names or next(iter(dataset)))


def _check_filled(dataset: Any, form: Form, desc: str) -> None:
    """Columns with many nulls appear when data sets with different column names are mixed."""
    head = list(dataset.take(_PEEK))
    for column in form.columns:
        empty = sum(row[column] is None for row in head)
        if empty > _NULLS * len(head):  # a few are rows to be left out
            raise ValueError(
                f"Column {column!r} of the {desc} set is null in {empty} of the first {len(head)} rows. Mixing "
                "data sets whose columns have different names does that: rename them alike before mixing."
            )


def has_completions(dataset: Any) -> bool:
    """Whether a prepared dataset brings its completions; without a dataset there is nothing to complete."""
    return dataset is None or "completion_ids" in column_names(dataset)


def check_one_step(dataset: Any, *, per_device: int, accumulation: int, processes: int) -> None:
    """Raises ValueError for too few rows. TRL's sampler drops what does not fill a global batch: it would train zero steps."""
    if dataset is None or isinstance(dataset, IterableDataset):
        return
    needed = per_device * accumulation * processes
    if len(dataset) < needed:
        raise ValueError(
            f"The training set has {len(dataset)} usable rows, fewer than the {needed} of one optimizer step "
            f"({per_device} a device x {accumulation} accumulation steps x {processes} processes); lower one of these or "
            "bring more data."
        )

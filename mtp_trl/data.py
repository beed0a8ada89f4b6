"""Datasets into rows of ids: which columns there are, how a prompt and its completion are tokenised, what is left out.

Accepted forms, in this order: `prompt` + `completion` (text or messages), `messages` (the last turn is the completion),
`text` (everything after its first token is the completion), `prompt` alone (the model completes it during training).
The conventions are those of `trl.SFTTrainer`: BOS once, EOS after a plain-text completion that has none, chat templates
end their own turns, loss on completions. No model.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Text = str | Messages
Row = Mapping[str, Any]

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
    form = _form_of(columns, desc)
    _check_filled(dataset, form, desc)
    streamed = not isinstance(dataset, Dataset)
    encoder = _Encoder(tokenizer, form, max_length, mask_token, desc, streamed)
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

    def frame(row: Row) -> dict[str, Any]:
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
        raise ValueError(f"{wanted} {column!r}, but the dataset has the columns {_listed(columns)}{hint}")


def column_names(dataset: Any) -> list[str]:
    """The columns of a dataset, also of a streamed one that does not declare them."""
    return list(dataset.column_names or next(iter(dataset)))


@dataclass(frozen=True)
class _Form:
    """One way for a row to say what precedes and what is learned."""

    columns: tuple[str, ...]
    split: Callable[[Row], tuple[Text | None, Text]]


def _split_messages(row: Row) -> tuple[Text | None, Text]:
    messages = row["messages"]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise ValueError(f"`messages` must hold a prompt and end with the assistant's turn, got the roles {roles}")
    return messages[:-1], messages[-1:]


_FORMS = (
    _Form(("prompt", "completion"), lambda row: (row["prompt"], row["completion"])),
    _Form(("messages",), _split_messages),
    _Form(("text",), lambda row: (None, row["text"])),
    _Form(("prompt",), lambda row: (row["prompt"], "")),
)


def _form_of(columns: Sequence[str], desc: str) -> _Form:
    for form in _FORMS:
        if set(form.columns) <= set(columns):
            return form
    raise ValueError(
        f"The {desc} set has the columns {_listed(columns)}, but needs `prompt` and `completion`, `messages`, `text`, "
        'or `prompt` alone; rename them with column_map, e.g. {"question": "prompt", "answer": "completion"}.'
    )


def _check_filled(dataset: Any, form: _Form, desc: str) -> None:
    """Columns with many nulls appear when data sets with different column names are mixed."""
    head = list(dataset.take(_PEEK))
    for column in form.columns:
        empty = sum(row[column] is None for row in head)
        if empty > _NULLS * len(head):  # a few are rows to be left out
            raise ValueError(
                f"Column {column!r} of the {desc} set is null in {empty} of the first {len(head)} rows. Mixing "
                "data sets whose columns have different names does that: rename them alike before mixing."
            )


class _Encoder:
    """Tokenises batches of rows and counts what it leaves out. Used by `datasets.map` in one process."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        form: _Form,
        max_length: int | None,
        mask_token: str | None,
        desc: str,
        streamed: bool,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no EOS token, so no completion could end; set tokenizer.eos_token.")
        self.tokenizer = tokenizer
        self.form = form
        self.max_length = max_length
        self.mask_token = mask_token
        self.desc = desc
        self.streamed = streamed
        self.counts: Counter[str] = Counter()
        self.special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"prompt": [], "prompt_ids": [], "completion_ids": []}
        names = list(batch)
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            try:
                encoded = self._encode(dict(zip(names, values, strict=True)))
            except (ValueError, TypeError, KeyError) as error:
                if not (self.streamed and self.counts["kept"]):
                    raise ValueError(f"Row {index} of the {self.desc} set: {error}") from error
                self.counts["malformed left out"] += 1
                logger.warning(f"Row {index} of the {self.desc} set is left out ({self.summary()}): {error}")
                continue
            if encoded is not None:
                for column, value in zip(out.values(), encoded, strict=True):
                    column.append(value)
        return out

    def can_be_completed(self, row: Row) -> bool:
        """Whether there is a prompt, and room behind it."""
        prompt = row["prompt"]
        self._refuse_mask_token(prompt)
        if not prompt:
            self.counts["without a prompt left out"] += 1
            return False
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if self.max_length is not None and len(ids) >= self.max_length:
            self.counts[f"with a prompt of max_length={self.max_length} tokens or more left out"] += 1
            return False
        self.counts["kept"] += 1
        return True

    def summary(self) -> str:
        return ", ".join(f"{count} rows {what}" for what, count in self.counts.items() if what != "kept")

    def report(self) -> None:
        summary = self.summary()
        if summary and int(os.environ.get("RANK", "0")) == 0:
            logger.warning(f"{self.desc} set: {summary}; {self.counts['kept']} rows remain.")

    def _encode(self, row: Row) -> tuple[Text, list[int], list[int]] | None:
        if any(row[column] is None for column in self.form.columns):
            self.counts["with a null left out"] += 1
            return None
        prompt, completion = self.form.split(row)
        self._refuse_mask_token(prompt, completion)
        if _is_blank(completion):
            self.counts["without a completion left out"] += 1
            return None
        if prompt is None:
            prompt, prompt_ids, completion_ids = self._encode_text(completion)
        elif isinstance(prompt, str):
            prompt_ids, completion_ids = self._encode_pair(prompt, completion)
        else:
            prompt_ids, completion_ids = self._encode_chat(prompt, completion, row)
        return self._fit(prompt, prompt_ids, completion_ids)

    def _fit(self, prompt: Text, prompt_ids: list[int], completion_ids: list[int]) -> tuple[Text, list[int], list[int]] | None:
        if not completion_ids:
            self.counts["without a completion left out"] += 1
            return None
        if not prompt_ids:
            raise ValueError("the prompt has no tokens and the tokenizer adds no BOS: there is nothing to predict from")
        if self.max_length is not None:
            room = self.max_length - len(prompt_ids)
            if room < 1:
                self.counts[f"with a prompt of max_length={self.max_length} tokens or more left out"] += 1
                return None
            if len(completion_ids) > room:
                self.counts[f"cut to max_length={self.max_length} tokens"] += 1
                completion_ids = completion_ids[:room]
        self.counts["kept"] += 1
        return prompt, prompt_ids, completion_ids

    def _encode_text(self, text: Text) -> tuple[str, list[int], list[int]]:
        if not isinstance(text, str):
            raise ValueError("`text` must be a string; conversations go into a column `messages`")
        ids = self._with_eos(self.tokenizer(text)["input_ids"])
        return self.tokenizer.decode(ids[:1]), ids[:1], ids[1:]

    def _encode_pair(self, prompt: str, completion: Text) -> tuple[list[int], list[int]]:
        if not isinstance(completion, str):
            raise ValueError("the prompt is a string but the completion is not; both must be text, or both messages")
        prompt_ids = _without_eos(self.tokenizer(prompt)["input_ids"], self.tokenizer.eos_token_id)
        return prompt_ids, self._with_eos(self._continue(prompt_ids, prompt, prompt + completion))

    def _encode_chat(self, prompt: Messages, completion: Text, row: Row) -> tuple[list[int], list[int]]:
        if isinstance(completion, str):
            raise ValueError("the prompt is messages but the completion is a string; both must be messages, or both text")
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the data is conversational but the tokenizer has no chat template; use a chat model's tokenizer or plain text"
            )
        options = dict(row.get("chat_template_kwargs") or {})
        if tools := row.get("tools"):
            options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
        # Text first: where a template renders the prompt alone differently from the prompt in the dialogue shows in the
        # text, and the prompt that generation will see is the one that counts.
        before = str(self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options))
        whole = str(self.tokenizer.apply_chat_template(prompt + completion, tokenize=False, **options))
        if not whole.startswith(before):
            raise ValueError(
                "the chat template renders the prompt alone differently from the prompt followed by its answer, so the "
                "answer does not continue what generation sees; use another template or plain text"
            )
        prompt_ids = self.tokenizer(before, add_special_tokens=False)["input_ids"]
        completion_ids = self._continue(prompt_ids, before, whole, add_special_tokens=False)
        return prompt_ids, self._end_of_turn(completion_ids)

    def _continue(self, prompt_ids: list[int], prompt: str, whole: str, **options: Any) -> list[int]:
        """The ids of whole after the prompt; tokenised by itself when a token would span the boundary."""
        whole_ids: list[int] = _without_eos(self.tokenizer(whole, **options)["input_ids"], self.tokenizer.eos_token_id)
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return whole_ids[len(prompt_ids) :]
        rest: list[int] = self.tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        return rest

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == eos else [*ids, eos]

    def _end_of_turn(self, ids: list[int]) -> list[int]:
        """Cut the white space some templates put behind the turn's last token; generation stops at that token."""
        end = len(ids)
        while end and self.tokenizer.decode(ids[end - 1 : end]).isspace():
            end -= 1
        return ids[:end] if end and ids[end - 1] in self.special else self._with_eos(ids)

    def _refuse_mask_token(self, *texts: Text | None) -> None:
        if self.mask_token is None:
            return
        for text in texts:
            parts = [text] if isinstance(text, str) else [message.get("content") for message in text or []]
            if any(isinstance(part, str) and self.mask_token in part for part in parts):
                raise ValueError(
                    f"the text contains the mask token {self.mask_token!r}; remove it from the data or choose "
                    "another mask_token, which may be a token that the tokenizer has"
                )


def _without_eos(ids: list[int], eos: int) -> list[int]:
    """Undo a tokenizer that ends every text with EOS; a completion's own EOS is put back by the caller."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids


def _is_blank(completion: Text) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any(message.get("content") or message.get("tool_calls") for message in completion)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)

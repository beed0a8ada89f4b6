"""Tokenise rows of text into rows of ids, and drop rows that cannot be trained on. Uses no model.

The conventions are those of `trl.SFTTrainer`: one BOS; EOS after a plain-text completion that has none; chat templates end
their own turns; loss on completions only. In addition, a completion that was cut, which the column `finish_reason` says, gets
no end.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Messages = list[dict[str, Any]]
Text = str | Messages
DataRow = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """A supported set of columns, and the function that splits such a row into prompt and completion."""

    columns: tuple[str, ...]
    split: Callable[[DataRow], tuple[Text | None, Text]]


def _split_messages(row: DataRow) -> tuple[Text | None, Text]:
    messages = row["messages"]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise ValueError(f"`messages` must contain a prompt and end with the assistant's turn, got the roles {roles}")
    return messages[:-1], messages[-1:]


_FORMS = (
    Form(("prompt", "completion"), lambda row: (row["prompt"], row["completion"])),
    Form(("messages",), _split_messages),
    Form(("text",), lambda row: (None, row["text"])),
    Form(("prompt",), lambda row: (row["prompt"], "")),
)


def template_options(row: DataRow) -> dict[str, Any]:
    """Return the arguments for the chat template in the columns `tools` and `chat_template_kwargs` of a row."""
    options = dict(row.get("chat_template_kwargs") or {})
    if tools := row.get("tools"):
        options["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    return options


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text, **options: Any) -> tuple[str, list[int]]:
    """Return the text of a prompt, rendered by the chat template if it is messages, and the ids that a completion continues.

    Args:
        options: arguments for the chat template.
    """
    if isinstance(prompt, str):
        return prompt, _without_eos(tokenizer(prompt)["input_ids"], tokenizer.eos_token_id)
    text = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options))
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def form_of(columns: Sequence[str], desc: str) -> Form:
    """Return the form that matches these columns; raise ValueError if none does."""
    for form in _FORMS:
        if set(form.columns) <= set(columns):
            return form
    raise ValueError(
        f"The {desc} set has the columns {listed(columns)}, but needs `prompt` and `completion`, `messages`, `text`, "
        'or only `prompt`; rename them with column_map, e.g. {"question": "prompt", "answer": "completion"}.'
    )


class Encoder:
    """Tokenises batches of rows, and counts the rows it drops or truncates. `datasets.map` calls it in one process."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        form: Form,
        max_length: int | None,
        mask_token: str | None,
        desc: str,
        streamed: bool,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no EOS token, so a completion could never end; set tokenizer.eos_token.")
        self.tokenizer = tokenizer
        self.form = form
        self.max_length = max_length
        self.mask_token = mask_token
        self.desc = desc
        self.streamed = streamed
        self.counts: Counter[str] = Counter()
        self.special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Return the columns `prompt`, `prompt_ids` and `completion_ids` of the rows that are kept."""
        out: dict[str, list[Any]] = {"prompt": [], "prompt_ids": [], "completion_ids": []}
        names = list(batch)
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            try:
                encoded = self._encode(dict(zip(names, values, strict=True)))
            except (ValueError, TypeError, KeyError) as error:
                if not (self.streamed and self.counts["kept"]):
                    raise ValueError(f"Row {index} of the {self.desc} set: {error}") from error
                self.counts["dropped as malformed"] += 1
                logger.warning(f"Row {index} of the {self.desc} set is malformed and dropped ({self.summary()}): {error}")
                continue
            if encoded is not None:
                for column, value in zip(out.values(), encoded, strict=True):
                    column.append(value)
        return out

    def can_be_completed(self, row: DataRow) -> bool:
        """Whether the row has a prompt, and `max_length` allows at least one token after it."""
        prompt = row["prompt"]
        self._check_no_mask_token(prompt)
        if not prompt:
            self.counts["dropped for an empty prompt"] += 1
            return False
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if self.max_length is not None and len(ids) >= self.max_length:
            self.counts[f"dropped for a prompt of max_length={self.max_length} tokens or more"] += 1
            return False
        self.counts["kept"] += 1
        return True

    def summary(self) -> str:
        """Return the counts of dropped and truncated rows as text."""
        return ", ".join(f"{count} rows {outcome}" for outcome, count in self.counts.items() if outcome != "kept")

    def report(self) -> None:
        """Log the counts of dropped and truncated rows, on rank 0 only."""
        summary = self.summary()
        if summary and int(os.environ.get("RANK", "0")) == 0:
            logger.warning(f"{self.desc} set: {summary}; {self.counts['kept']} rows remain.")

    def _encode(self, row: DataRow) -> tuple[Text, list[int], list[int]] | None:
        if any(row[column] is None for column in self.form.columns):
            self.counts["dropped for a null value"] += 1
            return None
        prompt, completion = self.form.split(row)
        cut = _was_cut(row)
        self._check_no_mask_token(prompt, completion)
        if _is_blank(completion):
            self.counts["dropped for an empty completion"] += 1
            return None
        if prompt is None:
            prompt, prompt_ids, completion_ids = self._encode_text(completion, cut=cut)
        elif isinstance(prompt, str):
            prompt_ids, completion_ids = self._encode_pair(prompt, completion, cut=cut)
        else:
            prompt_ids, completion_ids = self._encode_chat(prompt, completion, template_options(row), cut=cut)
        return self._fit(prompt, prompt_ids, completion_ids)

    def _fit(self, prompt: Text, prompt_ids: list[int], completion_ids: list[int]) -> tuple[Text, list[int], list[int]] | None:
        if not completion_ids:
            self.counts["dropped for an empty completion"] += 1
            return None
        if not prompt_ids:
            raise ValueError("the prompt has no tokens and the tokenizer adds no BOS, so there is nothing to predict from")
        if self.max_length is not None:
            remaining = self.max_length - len(prompt_ids)
            if remaining < 1:
                self.counts[f"dropped for a prompt of max_length={self.max_length} tokens or more"] += 1
                return None
            if len(completion_ids) > remaining:
                self.counts[f"truncated to max_length={self.max_length} tokens"] += 1
                completion_ids = completion_ids[:remaining]
        self.counts["kept"] += 1
        return prompt, prompt_ids, completion_ids

    def _encode_text(self, text: Text, *, cut: bool) -> tuple[str, list[int], list[int]]:
        if not isinstance(text, str):
            raise ValueError("`text` must be a string; put conversations into a column `messages`")
        ids = _without_eos(self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id)
        ids = ids if cut else self._with_eos(ids)
        return self.tokenizer.decode(ids[:1]), ids[:1], ids[1:]

    def _encode_pair(self, prompt: str, completion: Text, *, cut: bool) -> tuple[list[int], list[int]]:
        if not isinstance(completion, str):
            raise ValueError("the prompt is a string but the completion is not; both must be text, or both messages")
        _, prompt_ids = encode_prompt(self.tokenizer, prompt)
        completion_ids = self._continue(prompt_ids, prompt, prompt + completion)
        return prompt_ids, completion_ids if cut else self._with_eos(completion_ids)

    def _encode_chat(
        self, prompt: Messages, completion: Text, options: dict[str, Any], *, cut: bool
    ) -> tuple[list[int], list[int]]:
        if isinstance(completion, str):
            raise ValueError("the prompt is messages but the completion is a string; both must be messages, or both text")
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the data is conversational but the tokenizer has no chat template; use a chat model's tokenizer or plain text"
            )
        # Render text before tokenising it: only the text shows whether the template renders the prompt on its own differently
        # from the prompt within the dialogue. Generation sees the prompt on its own, so the completion must continue that.
        before, prompt_ids = encode_prompt(self.tokenizer, prompt, **options)
        if cut:
            whole = self._cut_dialogue(prompt + completion, options)
        else:
            whole = str(self.tokenizer.apply_chat_template(prompt + completion, tokenize=False, **options))
        if not whole.startswith(before):
            raise ValueError(
                "the chat template renders the prompt on its own differently from the prompt followed by its answer, so the "
                "answer does not continue what generation sees; use another template or plain text"
            )
        completion_ids = self._continue(prompt_ids, before, whole, add_special_tokens=False)
        return prompt_ids, completion_ids if cut else self._end_of_turn(completion_ids)

    def _cut_dialogue(self, messages: Messages, options: dict[str, Any]) -> str:
        """Return the text of a dialogue whose last message was cut.

        That message follows its generation prompt unchanged: the template would end it, and may end an open thought as well.
        """
        *earlier, last = messages
        others = [name for name, value in last.items() if value and name not in ("role", "content")]
        if others or not isinstance(last["content"], str):
            raise ValueError(
                "finish_reason is 'length', so the last message must be text in `content` alone, but it has "
                f"{listed(others) if others else type(last['content']).__name__}; put all of its text into `content`, or drop "
                "the row"
            )
        opening, _ = encode_prompt(self.tokenizer, earlier, **options)
        return opening + str(last["content"])

    def _continue(self, prompt_ids: list[int], prompt: str, whole: str, **options: Any) -> list[int]:
        """Return the ids of `whole` after the prompt. If a token spans the boundary, tokenise the rest on its own."""
        whole_ids: list[int] = _without_eos(self.tokenizer(whole, **options)["input_ids"], self.tokenizer.eos_token_id)
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            return whole_ids[len(prompt_ids) :]
        rest: list[int] = self.tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        return rest

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == eos else [*ids, eos]

    def _end_of_turn(self, ids: list[int]) -> list[int]:
        """End the completion at the special token that ends the turn, or append EOS if there is none.

        Some templates add white space after that token. It is removed, since generation stops at the token.
        """
        end = len(ids)
        while end and self.tokenizer.decode(ids[end - 1 : end]).isspace():
            end -= 1
        return ids[:end] if end and ids[end - 1] in self.special else self._with_eos(ids)

    def _check_no_mask_token(self, *texts: Text | None) -> None:
        if self.mask_token is None:
            return
        for text in texts:
            parts = [text] if isinstance(text, str) else [message.get("content") for message in text or []]
            if any(isinstance(part, str) and self.mask_token in part for part in parts):
                raise ValueError(
                    f"the text contains the mask token {self.mask_token!r}; remove it from the data or set mask_token to "
                    "another string, which may be an existing token of the tokenizer"
                )


def _was_cut(row: DataRow) -> bool:
    """Whether the completion was cut, so that no end may follow it."""
    reason = row.get("finish_reason")
    if reason not in (None, "stop", "length"):
        raise ValueError(
            f"finish_reason is {reason!r}, but must be 'stop' (the completion is whole) or 'length' (it was cut); map the "
            "column to these values or remove it"
        )
    return bool(reason == "length")


def _without_eos(ids: list[int], eos: int) -> list[int]:
    """Remove the EOS that some tokenizers append to every text; callers append EOS to completions themselves."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids


def _is_blank(completion: Text) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not any(message.get("content") or message.get("tool_calls") for message in completion)


def listed(names: Sequence[str]) -> str:
    """Format names as a list for error messages."""
    return ", ".join(repr(name) for name in names)

"""Generate a model's own answers to prompts, as rows of training data."""

# Shapes: B rows of the batch, L columns of the text

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from ..training.encoding import Text, encode_prompt, template_options
from .sweep import end_of_text_ids, progress_bar

logger = logging.getLogger(__name__)
# Columns of arguments for the chat template. The answers keep them, because the trainer applies the template again.
_TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer.

    Attributes:
        columns: what its answer's row begins with: `prompt`, and the arguments for the chat template if the data has any.
        ids: its tokens, which the answer continues.
        index: its row in the data.
    """

    columns: dict[str, Any]
    ids: list[int]
    index: int


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are decoded.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        batch_size: rows decoded together.
        temperature: sample at this temperature; 0 decodes greedily.
        top_p: sample from the most probable tokens that together have this probability; None means all tokens.
        seed: seed of the sampling; None means 0. The same batch always gets the same answers.
    """

    max_new_tokens: int = 512
    batch_size: int = 64
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or math.isnan(self.temperature):
            raise ValueError(f"temperature must be >= 0, got {self.temperature}; 0 decodes greedily.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; leave it out to sample from all tokens.")
        for name in ("top_p", "seed"):
            if not self.temperature and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect on greedy decoding; set a temperature, or leave it out."
                )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `generate` that choose tokens in this way."""
        if not self.temperature:
            return {"do_sample": False}
        # top_k=0 disables transformers' default of 50.
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": 0}


def encode_prompts(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str | None = None,
    chat_template: bool = True,
) -> list[Prompt]:
    """Return the prompts of rows, tokenised as for training. Empty ones are skipped and counted in a warning.

    Args:
        rows: the data.
        tokenizer: tokenizer of the model that will answer. If it has a chat template, a text becomes one user message.
        column: column of the prompts, text or messages; by default `prompt`, else `messages`. The last turn in `messages` is
            dropped if it is the assistant's.
        chat_template: whether to apply the chat template to text.

    Raises:
        ValueError: there is no such column, a prompt is neither text nor messages, or messages have no chat template.
    """
    if column is None:
        column = next((name for name in ("prompt", "messages") if rows and name in rows[0]), "prompt")
    prompts = []
    for index, row in enumerate(rows):
        try:
            prompt = _prompt_of(row, column)
            if isinstance(prompt, str) and prompt and chat_template and tokenizer.chat_template:
                prompt = [{"role": "user", "content": prompt}]
            if isinstance(prompt, list) and not tokenizer.chat_template:
                raise ValueError("it is messages, but the tokenizer has no chat template; use a chat model, or text")
            if isinstance(prompt, list) and not chat_template:
                raise ValueError("it is messages, which need the chat template; leave out --no-chat-template, or use text")
            if prompt:
                kept = {name: row[name] for name in _TEMPLATE_COLUMNS if isinstance(prompt, list) and row.get(name)}
                _, ids = encode_prompt(tokenizer, prompt, **template_options(kept))
                prompts.append(Prompt({"prompt": prompt, **kept}, ids, index))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"The prompt of row {index} cannot be used: {error}") from error
    if empty := len(rows) - len(prompts):
        logger.warning(f"{empty} empty prompts are skipped.")
    return prompts


def _prompt_of(row: Mapping[str, Any], column: str) -> Text:
    if column not in row:
        raise ValueError(f"it has no column {column!r}, only {', '.join(row)}; name the column with --prompt-column")
    prompt = row[column] or ""
    if not isinstance(prompt, str | list):
        raise ValueError(f"{column!r} must be text or a list of messages, got {type(prompt).__name__}")
    if column == "messages" and isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        return prompt[:-1]
    return prompt


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: AnswerSettings,
    *,
    done: int = 0,
    progress: bool = True,
) -> Iterator[list[dict[str, Any]]]:
    """Answer prompts in batches of similar length, the longest prompts first, and yield the rows of each batch.

    A row has the prompt's columns, `completion` in the form of the prompt (text, or one message), `finish_reason` ("stop", or
    "length" if the answer was cut) and `index`. Prompts that fill the model's positions are skipped and counted in a warning.

    The text is the model's own at one token per pass. A model that verifies by default decodes in blocks, which does not change
    its text.

    Args:
        model: a causal LM with this package's `generate`, as from `load_causal_lm`.
        tokenizer: the one that encoded the prompts; it must have a pad token.
        prompts: from `encode_prompts`.
        settings: how to decode.
        done: number of rows that an interrupted run yielded, a multiple of the batch size. They are not answered again.
        progress: show a progress bar with the remaining time and the speed on stderr.

    Raises:
        ValueError: no prompt leaves room for an answer.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    fitting = sorted((p for p in prompts if len(p.ids) < positions), key=lambda prompt: -len(prompt.ids))
    if skipped := len(prompts) - len(fitting):
        logger.warning(f"{skipped} prompts are skipped: they leave no room for an answer in the model's {positions} positions.")
    if not fitting:
        raise ValueError("There is nothing to answer: no prompt is left; pass prompts that are neither empty nor too long.")
    ends = end_of_text_ids(model)
    tokens, started = 0, time.perf_counter()
    with progress_bar(shown=progress) as bar:
        task = bar.add_task("", total=len(fitting), completed=done)
        for start in range(done, len(fitting), settings.batch_size):
            batch = fitting[start : start + settings.batch_size]
            with torch.random.fork_rng(devices=[]):  # `generate` takes its seed from the CPU's generator
                torch.manual_seed((settings.seed or 0) + start)
                answers = _decode(model, tokenizer, [prompt.ids for prompt in batch], settings, positions=positions)
            yield [
                _row(tokenizer, prompt, answer, ends, room=min(settings.max_new_tokens, positions - len(prompt.ids)))
                for prompt, answer in zip(batch, answers, strict=True)
            ]
            tokens += sum(map(len, answers))
            speed = tokens / (time.perf_counter() - started)
            bar.update(task, advance=len(batch), description=f"{speed:,.0f} tokens/s")


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: AnswerSettings,
    *,
    positions: float,
) -> list[list[int]]:
    """Return the generated tokens of each row, with the EOS if there is one."""
    encoded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    prompt_BL = encoded["input_ids"]
    options = settings.arguments()
    fits = prompt_BL.shape[1] + settings.max_new_tokens <= positions
    if not fits:
        from ..training.decoding import RowLength  # imports TRL, which takes seconds

        limit = RowLength(list(map(len, prompts)), max_length=int(positions), multiple=1)
        options["stopping_criteria"] = StoppingCriteriaList([limit])
    if not fits or not getattr(model.generation_config, "verify", False):
        options["mtp_k"] = 1  # masks after the last position would exceed a table of learned positions
    output = model.generate(
        input_ids=prompt_BL,
        attention_mask=encoded["attention_mask"],
        max_new_tokens=settings.max_new_tokens,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
        tokenizer=tokenizer,
        **options,
    )
    generated = output.sequences[:, prompt_BL.shape[1] :].tolist()
    return [row[: sum(lengths)] for row, lengths in zip(generated, output.block_lengths, strict=True)]


def _row(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: list[int], ends: set[int], *, room: float
) -> dict[str, Any]:
    """Return a row of training data. `room` is the largest number of tokens that the answer could have."""
    ended = answer[-1] in ends
    cut = not ended and len(answer) >= room
    # Decode the answer after its prompt: some tokenizers drop the first space of a text.
    before = str(tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False))
    whole = tokenizer.decode(prompt.ids + (answer[:-1] if ended else answer), clean_up_tokenization_spaces=False)
    text = str(whole)[len(before) :]
    if cut:
        text = text.rstrip("\ufffd")  # the first bytes of a character
    is_chat = isinstance(prompt.columns["prompt"], list)
    completion = [{"role": "assistant", "content": text}] if is_chat else text
    return {**prompt.columns, "completion": completion, "finish_reason": "length" if cut else "stop", "index": prompt.index}

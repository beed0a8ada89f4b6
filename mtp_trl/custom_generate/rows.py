"""The rows of a call: what is confirmed, drafted and cached of each, and the text that they make up together."""

# Shapes: B rows of the batch, L columns of the text

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor


@dataclass
class Row:
    """One sequence being decoded.

    Attributes:
        index: its row in the caller's batch.
        tokens: prompt and generated tokens that are confirmed: never taken back.
        limit: largest `len(tokens)`.
        noise_key: what its random numbers depend on, besides the position.
        is_prompt: which columns of the caller's batch are its prompt; the others are padding.
        cached: how many leading tokens have keys and values in the cache.
        drafts: verified decoding: accepted tokens that the next pass will verify.
        block_lengths: new tokens of each pass.
        emitted: how many tokens had been confirmed when the last step was finished.
    """

    index: int
    tokens: list[int]
    limit: int
    noise_key: int
    is_prompt: list[bool]
    prompt_length: int = 0
    cached: int = 0
    drafts: list[int] = field(default_factory=list)
    block_lengths: list[int] = field(default_factory=list)
    emitted: int = 0
    done: bool = False

    def __post_init__(self) -> None:
        self.prompt_length = self.emitted = len(self.tokens)

    @property
    def pending(self) -> list[int]:
        """Tokens to feed: the confirmed ones that are not cached yet, and the drafts."""
        return self.tokens[self.cached :] + self.drafts

    @property
    def end(self) -> int:
        """Position of the block's first prediction in the text."""
        return len(self.tokens) + len(self.drafts)

    def rejection_points(self, most: int) -> range:
        """How many drafts may be confirmed, for each outcome that gets a block of masks: the last `most` of them."""
        return range(max(0, len(self.drafts) + 1 - most), len(self.drafts) + 1)

    def verify(self, own: list[int], blocks: dict[int, list[int]], *, keep_drafts: bool, eos: frozenset[int]) -> None:
        """Confirm the drafts that the model agrees with, then take the block that follows them.

        Args:
            own: `own[i]` is the model's own choice after i drafts.
            blocks: `blocks[i]` are the accepted tokens that follow `own[i]`.
            keep_drafts: verified decoding: the block's first token is confirmed, the others become the next drafts.
                Otherwise the whole block is confirmed.
            eos: tokens that end a text.
        """
        pairs = zip(self.drafts, own, strict=False)
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        block = [own[agreed], *blocks.get(agreed, [])]
        confirmed = 1 if keep_drafts else len(block)
        self.cached = len(self.tokens) + agreed
        self.tokens += through_first(self.drafts[:agreed] + block[:confirmed], eos)
        self.done = self.tokens[-1] in eos or len(self.tokens) == self.limit
        # The pass that would verify the last token gives that token anyway: it need not be fed.
        room = self.limit - len(self.tokens) - 1
        self.drafts = before_first(block[confirmed:][:room], eos)

    def stop_at(self, length: int) -> None:
        """End with `length` tokens: a stopping criterion holds there."""
        del self.tokens[length:]
        self.done = True

    def finish_step(self) -> list[int]:
        """Record the step's new tokens and return them."""
        new = self.tokens[self.emitted :]
        self.emitted = len(self.tokens)
        self.block_lengths.append(len(new))
        if self.done:
            self.drafts = []
        return new


def through_first(tokens: list[int], stops: frozenset[int]) -> list[int]:
    """The tokens up to the first that stops, inclusive."""
    return tokens[: len(before_first(tokens, stops)) + 1]


def before_first(tokens: list[int], stops: frozenset[int]) -> list[int]:
    """The tokens before the first that stops."""
    return list(takewhile(lambda token: token not in stops, tokens))


def rows_of(input_ids: Tensor, attention_mask: Tensor | None, *, max_length: int, seed: int | None) -> list[Row]:
    """The rows of a batch [B, L] without their padding.

    With a seed every row gets a noise key that depends on its own prompt, and so not on what else is in the batch.

    Raises:
        ValueError: a mask of another shape, or a row without tokens.
    """
    width = input_ids.shape[1]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}: one column for each token, those that "
            "a cache holds included."
        )
    rows, copies = [], Counter[tuple[int, ...]]()
    for index, (ids, is_prompt) in enumerate(zip(input_ids.tolist(), mask.bool().tolist(), strict=True)):
        prompt = [token for token, is_real in zip(ids, is_prompt, strict=True) if is_real]
        if not prompt:
            raise ValueError(f"Row {index} of the batch has no tokens; its attention_mask is 0 everywhere.")
        key = 0
        if seed is not None:
            copies[tuple(prompt)] += 1
            key = _digest(f"{seed} {copies[tuple(prompt)]} {prompt}")
        rows.append(Row(index, prompt, limit=len(prompt) + max(1, max_length - width), noise_key=key, is_prompt=is_prompt))
    return rows


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class Text:
    """The caller's batch with what has been generated, as logits processors, criteria and the caller see it: [B, L]."""

    def __init__(self, input_ids: Tensor, rows: list[Row], *, pad_token_id: int) -> None:
        self.input_ids, self.rows, self.pad = input_ids, rows, pad_token_id

    def tensor(self, *, room: int = 0) -> Tensor:
        """Prompts as they came, generated tokens and drafts, padding; `room` columns more than the longest row has."""
        generated = [row.tokens[row.prompt_length :] + row.drafts for row in self.rows]
        width = max(map(len, generated)) + room
        padded = [tokens + [self.pad] * (width - len(tokens)) for tokens in generated]
        return torch.cat([self.input_ids, torch.tensor(padded, device=self.input_ids.device).view(-1, width)], 1)

    def width(self, row: Row, tokens: int) -> int:
        """Columns up to and including the first `tokens` tokens of a row."""
        return self.input_ids.shape[1] - row.prompt_length + tokens

    def by_length(self, alive: list[Row], offset: int) -> dict[int, list[int]]:
        """Rows with a prediction at `offset`, by the columns before it. Offset 0 begins the block, before it are drafts."""
        groups: dict[int, list[int]] = {}
        for member, row in enumerate(alive):
            if offset >= -len(row.drafts):
                groups.setdefault(self.width(row, row.end + offset), []).append(member)
        return groups

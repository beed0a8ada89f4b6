"""The rows of a call, with their confirmed, drafted and cached tokens, and the batch of text that they form."""

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
        index: index of the row in the caller's batch.
        tokens: confirmed tokens, prompt and generated. They are final.
        limit: largest `len(tokens)`.
        noise_key: key of the row's random numbers, which depend on it and on the position.
        is_prompt: for each column of the caller's batch, whether it is a token of the prompt, not padding.
        prompt_length: number of tokens of the prompt.
        cached: number of leading tokens with keys and values in the cache.
        drafts: accepted tokens that the next pass verifies, in verified decoding.
        block_lengths: number of new tokens of each pass.
        emitted: number of confirmed tokens after the last finished step.
        done: whether the row is finished.
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
        """The tokens to feed: the confirmed ones that are not cached yet, and the drafts."""
        return self.tokens[self.cached :] + self.drafts

    @property
    def end(self) -> int:
        """The text position of the block's first token: the one after all tokens and drafts."""
        return len(self.tokens) + len(self.drafts)

    def rejection_points(self, most: int) -> range:
        """Return the rejection points that get a block of masks: the last `most` of 0 to `len(self.drafts)`.

        A rejection point is the number of drafts that are confirmed before the first rejected one.
        """
        return range(max(0, len(self.drafts) + 1 - most), len(self.drafts) + 1)

    def verify(self, next_tokens: list[int], blocks: dict[int, list[int]], *, keep_drafts: bool, eos: frozenset[int]) -> None:
        """Confirm the drafts before the first one that differs from the model's next token, then add the accepted block.

        Args:
            next_tokens: `next_tokens[i]` is the token that the model chooses after the first i drafts.
            blocks: `blocks[i]` holds the accepted tokens that follow `next_tokens[i]`.
            keep_drafts: whether to confirm only the first token of the block and keep the others as the next drafts
                (verified decoding). If False, the whole block is confirmed.
            eos: end-of-text tokens.
        """
        pairs = zip(self.drafts, next_tokens, strict=False)
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        block = [next_tokens[agreed], *blocks.get(agreed, [])]
        confirmed = 1 if keep_drafts else len(block)
        self.cached = len(self.tokens) + agreed
        self.tokens += through_first(self.drafts[:agreed] + block[:confirmed], eos)
        self.done = self.tokens[-1] in eos or len(self.tokens) == self.limit
        # Keep no draft for the last position: the pass that would verify it predicts that token anyway.
        most_drafts = self.limit - len(self.tokens) - 1
        self.drafts = before_first(block[confirmed:][:most_drafts], eos)

    def stop_at(self, length: int) -> None:
        """Finish the row after its first `length` tokens, where a stopping criterion holds."""
        del self.tokens[length:]
        self.done = True

    def finish_step(self) -> list[int]:
        """Record and return the new tokens of the step."""
        new = self.tokens[self.emitted :]
        self.emitted = len(self.tokens)
        self.block_lengths.append(len(new))
        if self.done:
            self.drafts = []
        return new


def through_first(tokens: list[int], stops: frozenset[int]) -> list[int]:
    """Return the tokens up to and including the first one in `stops`."""
    return tokens[: len(before_first(tokens, stops)) + 1]


def before_first(tokens: list[int], stops: frozenset[int]) -> list[int]:
    """Return the tokens before the first one in `stops`."""
    return list(takewhile(lambda token: token not in stops, tokens))


def rows_of(input_ids: Tensor, attention_mask: Tensor | None, *, max_length: int, seed: int | None) -> list[Row]:
    """Return the rows of a batch [B, L] without their padding.

    With a seed, every row gets a noise key from its own prompt, so that its text does not depend on the rest of the batch.

    Raises:
        ValueError: the attention mask has another shape than the ids, or a row has no tokens.
    """
    width = input_ids.shape[1]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)} and input_ids {tuple(input_ids.shape)}; pass one mask column per "
            "token, cached tokens included."
        )
    rows, copies = [], Counter[tuple[int, ...]]()
    for index, (ids, is_prompt) in enumerate(zip(input_ids.tolist(), mask.bool().tolist(), strict=True)):
        prompt = [token for token, is_real in zip(ids, is_prompt, strict=True) if is_real]
        if not prompt:
            raise ValueError(f"Row {index} of the batch has no tokens: its attention_mask is 0 everywhere; remove the row.")
        key = 0
        if seed is not None:
            copies[tuple(prompt)] += 1
            key = _digest(f"{seed} {copies[tuple(prompt)]} {prompt}")
        rows.append(Row(index, prompt, limit=len(prompt) + max(1, max_length - width), noise_key=key, is_prompt=is_prompt))
    return rows


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class Text:
    """The caller's batch with the generated tokens [B, L], as logits processors, stopping criteria and the caller see it."""

    def __init__(self, input_ids: Tensor, rows: list[Row], *, pad_token_id: int) -> None:
        self.input_ids, self.rows, self.pad = input_ids, rows, pad_token_id

    def tensor(self, *, extra_columns: int = 0) -> Tensor:
        """Return the caller's columns, then generated tokens, drafts and padding: `extra_columns` beyond the longest row."""
        generated = [row.tokens[row.prompt_length :] + row.drafts for row in self.rows]
        width = max(map(len, generated)) + extra_columns
        padded = [tokens + [self.pad] * (width - len(tokens)) for tokens in generated]
        return torch.cat([self.input_ids, torch.tensor(padded, device=self.input_ids.device).view(-1, width)], 1)

    def width(self, row: Row, tokens: int) -> int:
        """Return the number of columns that hold the first `tokens` tokens of a row."""
        return self.input_ids.shape[1] - row.prompt_length + tokens

    def by_length(self, alive: list[Row], offset: int) -> dict[int, list[int]]:
        """Group the rows with a prediction at `offset` by the number of columns before it.

        Offset 0 is the first token of the block. Negative offsets are the next tokens after earlier drafts.

        Returns:
            Indices into `alive`, by number of columns.
        """
        groups: dict[int, list[int]] = {}
        for member, row in enumerate(alive):
            if offset >= -len(row.drafts):
                groups.setdefault(self.width(row, row.end + offset), []).append(member)
        return groups

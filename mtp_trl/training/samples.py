"""Decode held-out prompts during training, and show answers with one colour per forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Backgrounds on which black text is readable; adjacent ones differ.
COLOURS = ("#b3d9ff", "#ffe0a3", "#c8f0c0", "#f5c6e0", "#d9ccf5", "#c7f0ee")
_INCOMPLETE = "\ufffd"


def block_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], blocks: Iterable[int]) -> list[str]:
    """Return the text that each block adds. Joined, the texts are the answer without special tokens.

    A character whose bytes span two blocks belongs to the later one. A block that adds no text gives "".

    Args:
        tokenizer: tokenizer of the model that generated the answer.
        token_ids: ids of the answer.
        blocks: number of tokens in each block.

    Raises:
        ValueError: if the blocks do not sum to the number of tokens.
    """
    lengths = list(blocks)
    if sum(lengths) != len(token_ids):
        raise ValueError(
            f"The blocks sum to {sum(lengths)} tokens, got {len(token_ids)} ids; pass the ids and blocks of one answer."
        )
    texts, shown, end = [], "", 0
    for length in lengths:
        end += length
        text = str(tokenizer.decode(list(token_ids[:end]), skip_special_tokens=True))
        if end < len(token_ids):
            text = text.rstrip(_INCOMPLETE)
        texts.append(text[len(shown) :])
        shown = shown + texts[-1]
    return texts


def coloured(texts: Iterable[str]) -> Text:
    """Format block texts for a terminal: alternating backgrounds, and a thin bar between blocks in case colours do not show."""
    line = Text()
    for i, text in enumerate(filter(None, texts)):
        if i:
            line.append("│", style="bright_black")
        line.append(text, style=f"black on {COLOURS[i % len(COLOURS)]}")
    return line


def decode_samples(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], *, thresholds: Sequence[float], max_new_tokens: int
) -> tuple[dict[str, float], Any]:
    """Decode prompts greedily at every threshold, verified and unverified.

    Returns:
        Tokens per pass by log name, and the output of the last `generate` call (unverified, last threshold).
    """
    metrics: dict[str, float] = {}
    for verify, name in ((True, "verified"), (False, "acceleration")):
        for threshold in thresholds:
            output = model.generate(
                **inputs,
                confadapt=threshold,
                verify=verify,
                mtp_k=model.config.mtp["k_max"],
                mtp_blocks=1,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )
            metrics[f"eval_decoding/{name}_{threshold}"] = float(output.acceleration)
    return metrics, output


def sample_table(tokenizer: PreTrainedTokenizerBase, output: Any, prompt_length: int, *, title: str) -> Table:
    """Return a table of the answers in an `MTPGenerateOutput`, with their blocks coloured."""
    table = Table(title=title, show_lines=True)
    table.add_column("tokens per pass", justify="right")
    table.add_column("answer, one block per pass")
    for ids, lengths in zip(output.sequences[:, prompt_length:].tolist(), output.block_lengths, strict=True):
        tokens = sum(lengths)
        mean = tokens / max(1, len(lengths))
        table.add_row(f"{mean:.2f}", coloured(block_texts(tokenizer, ids[:tokens], lengths)))
    return table

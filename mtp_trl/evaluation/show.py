"""One answer with its blocks coloured: every colour is one forward pass. Pure functions of token ids; no model."""

import html
from collections.abc import Iterable, Sequence

from rich.text import Text
from transformers import PreTrainedTokenizerBase

# Backgrounds on which black text is readable; neighbours differ.
_COLOURS = ("#b3d9ff", "#ffe0a3", "#c8f0c0", "#f5c6e0", "#d9ccf5", "#c7f0ee")
_INCOMPLETE = "\ufffd"


def block_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], blocks: Iterable[int]) -> list[str]:
    """The text each block adds; joined they are the answer's text, special tokens left out.

    A character whose bytes are spread over two blocks belongs to the later one. A pass that added nothing gives "".

    Raises:
        ValueError: the blocks do not sum to the number of tokens.
    """
    lengths = list(blocks)
    if sum(lengths) != len(token_ids):
        raise ValueError(f"The blocks sum to {sum(lengths)} tokens, got {len(token_ids)}; pass one answer's own blocks.")
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
    """Blocks for a terminal: alternating backgrounds, and a thin bar between blocks where colours do not show."""
    line = Text()
    for i, text in enumerate(filter(None, texts)):
        if i:
            line.append("│", style="bright_black")
        line.append(text, style=f"black on {_COLOURS[i % len(_COLOURS)]}")
    return line


def as_html(texts: Iterable[str]) -> str:
    """Blocks as one HTML element without scripts; the texts are escaped."""
    spans = [
        f'<span style="background:{_COLOURS[i % len(_COLOURS)]};color:#000">{html.escape(text)}</span>'
        for i, text in enumerate(filter(None, texts))
    ]
    return f'<div style="white-space:pre-wrap;font-family:monospace;line-height:1.7">{"".join(spans)}</div>'

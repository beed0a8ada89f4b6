"""One answer with its blocks coloured, as it comes or whole: every colour is one forward pass. No model."""

import html
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

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


class ColouredStreamer(BaseStreamer):
    """A streamer that prints each block when its pass is done, in the colours of `coloured`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        self.tokenizer, self.console = tokenizer, console
        self.token_ids: list[int] = []
        self.blocks: list[int] = []
        self.shown: list[str] = []
        self.prompt_is_next = True

    def put(self, value: Tensor) -> None:
        """The prompt first, which is not printed, then the tokens of each pass, int64 [N]."""
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        self.token_ids += value.tolist()
        self.blocks.append(len(value))
        # The blocks so far and one to come: a character that is not complete yet waits for it.
        self._print(block_texts(self.tokenizer, [*self.token_ids, self.token_ids[-1]], [*self.blocks, 1])[:-1])

    def end(self) -> None:
        """The answer is over: what still waited is printed as it is."""
        self._print(block_texts(self.tokenizer, self.token_ids, self.blocks))
        self.console.print()

    def _print(self, texts: list[str]) -> None:
        before, after = coloured(self.shown), coloured(texts)
        self.console.print(after[len(before) :], end="", soft_wrap=True)
        self.shown = texts


def as_html(texts: Iterable[str]) -> str:
    """Blocks as one HTML element without scripts; the texts are escaped."""
    spans = [
        f'<span style="background:{_COLOURS[i % len(_COLOURS)]};color:#000">{html.escape(text)}</span>'
        for i, text in enumerate(filter(None, texts))
    ]
    return f'<div style="white-space:pre-wrap;font-family:monospace;line-height:1.7">{"".join(spans)}</div>'


def html_page(prompt: str, texts: Iterable[str], caption: str) -> str:
    """A page that needs nothing else: the prompt, the answer in blocks, and what it took."""
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(prompt[:60])}</title>
<style>
body {{ max-width: 46rem; margin: 2rem auto; padding: 0 1rem; font-family: sans-serif; background: #fff; color: #222 }}
pre {{ white-space: pre-wrap }}
</style>
</head>
<body>
<pre>{html.escape(prompt)}</pre>
{as_html(texts)}
<p>{html.escape(caption)} Every colour is one forward pass.</p>
</body>
</html>
"""

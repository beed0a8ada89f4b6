"""`mtp-trl show`: print one answer pass by pass, or write it as HTML, with a colour for each forward pass."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..custom_generate.mtp_config import checked_thresholds
from ..evaluation.loading import load_student
from ..modeling.files import write_atomically
from ..publishing.report import Threshold
from ..training.samples import COLOURS, block_texts, coloured


class ColouredStreamer(BaseStreamer):
    """A streamer that prints each block when its pass is done, in the colours of `coloured`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        self.tokenizer, self.console = tokenizer, console
        self.token_ids: list[int] = []
        self.blocks: list[int] = []
        self.shown: list[str] = []
        self.prompt_is_next = True

    def put(self, value: Tensor) -> None:
        """Skip the prompt, which comes first, then print the tokens of each pass, int64 [tokens]."""
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        self.token_ids += value.tolist()
        self.blocks.append(len(value))
        # A dummy block stands for the next pass, so that a character whose bytes are incomplete is printed with that pass.
        self._print(block_texts(self.tokenizer, [*self.token_ids, self.token_ids[-1]], [*self.blocks, 1])[:-1])

    def end(self) -> None:
        """Print the rest of the answer, including an incomplete character."""
        self._print(block_texts(self.tokenizer, self.token_ids, self.blocks))
        self.console.print()

    def _print(self, texts: list[str]) -> None:
        before, after = coloured(self.shown), coloured(texts)
        self.console.print(after[len(before) :], end="", soft_wrap=True)
        self.shown = texts


def as_html(texts: Iterable[str]) -> str:
    """Return the blocks as one HTML element without scripts, with the texts escaped."""
    spans = [
        f'<span style="background:{COLOURS[i % len(COLOURS)]};color:#000">{html.escape(text)}</span>'
        for i, text in enumerate(filter(None, texts))
    ]
    return f'<div style="white-space:pre-wrap;font-family:monospace;line-height:1.7">{"".join(spans)}</div>'


def html_page(prompt: str, texts: Iterable[str], caption: str) -> str:
    """Return a self-contained HTML page with the prompt, the answer in blocks and a caption."""
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


def run_show(
    model: str,
    prompt: str,
    *,
    base: str | None = None,
    gguf_file: str | None = None,
    confadapt: Threshold | None,
    mtp_k: int | str | None,
    verify: bool | None,
    max_new_tokens: int,
    html_file: Path | None,
    trust_remote_code: bool = False,
) -> None:
    """Answer one prompt greedily and print it pass by pass, with a colour for each. None means the model's default.

    Without a default, `mtp_k` is the trained block size: "auto" would spend the first passes of the only call on measurements.
    """
    if confadapt is not None:
        checked_thresholds(confadapt)
    student, tokenizer = load_student(model, base=base, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    encoded = tokenizer(prompt, return_tensors="pt").to(student.device)
    console = Console()
    if mtp_k is None and getattr(student.generation_config, "mtp_k", None) is None:
        mtp_k = student.config.mtp["k_max"]
    with torch.inference_mode():
        output = student.generate(
            **encoded,
            streamer=ColouredStreamer(tokenizer, console),
            do_sample=False,
            return_dict_in_generate=True,
            confadapt=confadapt,
            mtp_k=mtp_k,
            verify=verify,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    token_ids = output.sequences[0, encoded["input_ids"].shape[1] :].tolist()
    passes = int(output.forward_passes[0])
    speed = f"{len(token_ids)} tokens in {passes} forward passes: {output.acceleration:.2f} per pass"
    console.print(speed, style="dim", highlight=False)
    if html_file is not None:
        texts = block_texts(tokenizer, token_ids, output.block_lengths[0])
        write_atomically(html_file, html_page(prompt, texts, f"{speed}."))

"""`mtp-trl app MODEL`: a page with an answer coloured by forward pass, the plain answer and the ratio of their speeds."""

from __future__ import annotations

import html
import time
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..custom_generate.mtp_config import checked_thresholds
from ..evaluation.loading import load_student
from ..training.samples import block_texts
from .show import as_html

# Prompts whose continuation a model predicts with high confidence.
EXAMPLES = (
    "Count from 1 to 40: 1, 2, 3,",
    "Repeat ten times: the quick brown fox jumps over the lazy dog.",
    "Question: Finn has 73 candles and buys 8 more. How many candles does he have?\nAnswer:",
)

RUNS = 3  # of each decoding, in alternation; the fastest run counts


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, max_new_tokens: int, **options: Any
) -> tuple[list[str], int, float]:
    """Decode greedily and return the text of each forward pass, the number of tokens and the seconds taken."""
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            **encoded,
            do_sample=False,
            return_dict_in_generate=True,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    ids = output.sequences[0, encoded["input_ids"].shape[1] :].tolist()  # synchronises with the device
    seconds = time.perf_counter() - started
    return block_texts(tokenizer, ids, output.block_lengths[0]), len(ids), seconds


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, threshold: float, verify: bool, tokens: float
) -> tuple[str, str, str]:
    """Return the coloured answer, the plain answer and a summary of the comparison, as HTML with all text escaped."""
    if not prompt.strip():
        return "", "", "Write a prompt first."
    length = int(tokens)
    seconds: list[float] = []
    plain_seconds: list[float] = []
    for _ in range(RUNS):
        plain_texts, plain_count, plain_taken = answer(model, tokenizer, prompt, max_new_tokens=length, mtp_k=1, verify=False)
        texts, count, taken = answer(model, tokenizer, prompt, max_new_tokens=length, confadapt=threshold, verify=verify)
        seconds, plain_seconds = [*seconds, taken], [*plain_seconds, plain_taken]
    ratio = (count / min(seconds)) / (plain_count / min(plain_seconds))
    same = "the same text" if "".join(texts) == "".join(plain_texts) else "a different text"
    summary = (
        f"<b>{count / len(texts):.2f}</b> tokens per forward pass ({count} in {len(texts)}), <b>{ratio:.2f}</b> times as many "
        f"tokens per second as plain decoding; {same}."
    )
    plain = f'<div style="white-space:pre-wrap;font-family:monospace;line-height:1.7">{html.escape("".join(plain_texts))}</div>'
    return as_html(texts), plain, summary


def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the page, a `gradio.Blocks`. Nothing is decoded until the button is clicked."""
    import gradio

    defaults = model.generation_config
    thresholds = checked_thresholds(getattr(defaults, "confadapt", None) or 0.5)  # the slider shows the strictest position
    with gradio.Blocks(title="mtp-trl") as page:
        gradio.Markdown("## Several tokens per forward pass\nEvery colour is one pass.")
        prompt = gradio.Textbox(EXAMPLES[-1], label="Prompt", lines=3)
        with gradio.Row():
            threshold = gradio.Slider(0, 1, max(thresholds), step=0.01, label="threshold")
            tokens = gradio.Slider(16, 512, 128, step=16, label="longest answer, tokens")
            verify = gradio.Checkbox(bool(getattr(defaults, "verify", False)), label="verify: exactly the model's own text")
        button = gradio.Button("Answer", variant="primary")
        summary = gradio.HTML()
        with gradio.Row():
            with gradio.Column():
                gradio.Markdown("**In blocks**")
                blocks = gradio.HTML()
            with gradio.Column():
                gradio.Markdown("**Plain, one token per pass**")
                plain = gradio.HTML()
        gradio.Examples([[example] for example in EXAMPLES], [prompt])
        button.click(
            lambda *values: compare(model, tokenizer, *values), [prompt, threshold, verify, tokens], [blocks, plain, summary]
        )
    return page


def run_app(
    name: str,
    *,
    base: str | None = None,
    gguf_file: str | None = None,
    port: int | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Load an adapted model and serve the page on the loopback interface until interrupted."""
    model, tokenizer = load_student(name, base=base, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    answer(model, tokenizer, EXAMPLES[0], max_new_tokens=4)  # warm up, so that one-time costs do not affect the speeds
    build(model, tokenizer).launch(server_name="127.0.0.1", server_port=port)

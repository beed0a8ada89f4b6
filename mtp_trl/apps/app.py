"""`mtp-trl app MODEL`: an answer coloured by forward pass, plain decoding beside it and the ratio of their speeds."""

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

# What a first look should try: text that a model is sure of.
EXAMPLES = (
    "Count from 1 to 40: 1, 2, 3,",
    "Repeat ten times: the quick brown fox jumps over the lazy dog.",
    "Question: Finn has 73 candles and buys 8 more. How many candles does he have?\nAnswer:",
)

RUNS = 3  # in turns, of which the fastest counts


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, *, max_new_tokens: int, **options: Any
) -> tuple[list[str], int, float]:
    """The text of each forward pass, the number of tokens and the seconds they took; greedy."""
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
    ids = output.sequences[0, encoded["input_ids"].shape[1] :].tolist()  # waits for the device
    seconds = time.perf_counter() - started
    return block_texts(tokenizer, ids, output.block_lengths[0]), len(ids), seconds


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, threshold: float, verify: bool, tokens: float
) -> tuple[str, str, str]:
    """The coloured answer, the plain one and what sets them apart, as HTML; all text of the model and the user is escaped."""
    if not prompt.strip():
        return "", "", "Write a prompt first."
    length = int(tokens)
    seconds: list[float] = []
    own_seconds: list[float] = []
    for _ in range(RUNS):
        own, own_tokens, own_time = answer(model, tokenizer, prompt, max_new_tokens=length, mtp_k=1, verify=False)
        texts, count, taken = answer(model, tokenizer, prompt, max_new_tokens=length, confadapt=threshold, verify=verify)
        seconds, own_seconds = [*seconds, taken], [*own_seconds, own_time]
    ratio = (count / min(seconds)) / (own_tokens / min(own_seconds))
    same = "the same text" if "".join(texts) == "".join(own) else "another text"
    summary = (
        f"<b>{count / len(texts):.2f}</b> tokens per forward pass ({count} in {len(texts)}), <b>{ratio:.2f}</b> times as many "
        f"tokens per second as plain decoding; {same}."
    )
    plain = f'<div style="white-space:pre-wrap;font-family:monospace;line-height:1.7">{html.escape("".join(own))}</div>'
    return as_html(texts), plain, summary


def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The page, a `gradio.Blocks`; nothing is decoded before somebody asks."""
    import gradio

    defaults = model.generation_config
    thresholds = checked_thresholds(getattr(defaults, "confadapt", None) or 0.5)  # one for each place: shown as the strictest
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


def run_app(name: str, *, base: str | None = None, port: int | None = None, trust_remote_code: bool = False) -> None:
    """Load an adapted model and serve the page on loopback until interrupted."""
    model, tokenizer = load_student(name, base=base, trust_remote_code=trust_remote_code)
    answer(model, tokenizer, EXAMPLES[0], max_new_tokens=4)  # what is slow once should not count against either side
    build(model, tokenizer).launch(server_name="127.0.0.1", server_port=port)

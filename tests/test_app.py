"""The page shows what the model decodes, escaped. Its layout is tested by hand in a browser."""

import pytest
import torch

from mtp_trl.apps.app import EXAMPLES, compare
from mtp_trl.cli import main
from mtp_trl.custom_generate.generate import attach_decoder


class Tokenizer:
    """A tokenizer with one character per token, for the tiny model's vocabulary of 64."""

    pad_token_id = 0

    def __call__(self, text, return_tensors):
        return Encoded(input_ids=torch.tensor([[2 + ord(letter) % 58 for letter in text]]))

    def decode(self, ids, skip_special_tokens=True):
        return "".join("<&" if token == 5 else chr(60 + token) for token in ids)


class Encoded(dict):
    def to(self, device):
        return self


def test_verified_blocks_are_the_plain_text_and_everything_is_escaped(tiny_model):
    model = attach_decoder(tiny_model("llama", context=0.05))
    blocks, plain, summary = compare(model, Tokenizer(), "abc <b>", 0.2, True, 16)
    assert "the same text" in summary
    assert "times as many tokens per second" in summary
    assert blocks.count("<span") >= 1
    assert "<&" not in blocks + plain


def test_whole_blocks_take_fewer_passes(tiny_model):
    model = attach_decoder(tiny_model("llama"))
    blocks, _, summary = compare(model, Tokenizer(), "abc", 0.0, False, 16)
    assert "<b>8.00</b> tokens per forward pass (16 in 2)" in summary
    assert blocks.count("<span") == 2


def test_an_empty_prompt_is_answered_with_a_request_for_one():
    assert compare(None, None, "  ", 0.5, True, 16) == ("", "", "Write a prompt first.")


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("mtp_trl.argument_types.find_spec", lambda name: None)
    assert main(["app", "nowhere"]) == 2
    assert "pip install 'mtp-trl[app]'" in capsys.readouterr().err


PAGE = """
from types import SimpleNamespace
from mtp_trl.apps.app import build
page = build(SimpleNamespace(generation_config=SimpleNamespace(confadapt=0.3, verify=True)), None)
print(*(type(block).__name__ for block in page.blocks.values()))
print(*(block.value for block in page.blocks.values() if getattr(block, "label", None) == "threshold"))
"""


def test_the_page_has_its_controls_with_the_models_defaults(run_program):
    pytest.importorskip("gradio")
    done = run_program(["-c", PAGE])  # in a subprocess, because gradio leaves an event loop open
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"Textbox", "Slider", "Checkbox", "Button", "HTML"} <= set(done.stdout.split())
    assert done.stdout.split()[-1] == "0.3"
    assert len(EXAMPLES) == 3

"""Coloured blocks: no text is lost or added, the bytes of a character stay together, and HTML is escaped."""

import io
import re
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mtp_trl.apps.show import ColouredStreamer, as_html, html_page
from mtp_trl.training.samples import block_texts, coloured


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with one token per byte and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", clean_up_tokenization_spaces=False)


def encode(tokenizer, text):
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_blocks_joined_are_the_answer(tokenizer, length):
    text = "Tom pays 3 * 4 = €12 — “done” 🙂\n#### 12"
    ids = encode(tokenizer, text)
    blocks = [min(length, len(ids) - i) for i in range(0, len(ids), length)]
    texts = block_texts(tokenizer, ids, blocks)
    assert "".join(texts) == text
    assert len(texts) == len(blocks)
    assert not any("\ufffd" in part for part in texts)


def test_a_split_character_belongs_to_the_block_that_completes_it(tokenizer):
    ids = tokenizer("a€b")["input_ids"]
    assert block_texts(tokenizer, ids, [2, 3]) == ["a", "€b"]


def test_bytes_that_never_complete_a_character_are_still_shown(tokenizer):
    ids = tokenizer("a€")["input_ids"][:2]
    assert block_texts(tokenizer, ids, [1, 1]) == ["a", "\ufffd"]


def test_a_pass_without_tokens_adds_no_text(tokenizer):
    ids = tokenizer("abc")["input_ids"]
    assert block_texts(tokenizer, ids, [2, 0, 1]) == ["ab", "", "c"]


def test_blocks_of_another_answer_are_refused(tokenizer):
    with pytest.raises(ValueError, match="blocks sum to 3 tokens, got 2"):
        block_texts(tokenizer, tokenizer("ab")["input_ids"], [3])


def test_terminal_text_is_the_answer_with_bars_between_blocks_of_different_colour():
    line = coloured(["one ", "", "two ", "three"])
    assert line.plain == "one │two │three"
    styles = [str(span.style) for span in line.spans if "on" in str(span.style)]
    assert len(styles) == 3
    assert all(a != b for a, b in pairwise(styles))


def test_markup_in_an_answer_stays_text():
    assert coloured(["[bold]x[/bold]"]).plain == "[bold]x[/bold]"


def test_html_escapes_the_answer():
    hostile = '<script>alert("x")</script> & \' >'
    page = as_html([hostile[:9], hostile[9:]])
    assert not re.search(r"<(?!/?(?:div|span)\b)", page)
    assert "&lt;script" in page
    assert page.count("<span") == 2


@pytest.mark.parametrize("length", [1, 3, 7])
def test_streamed_blocks_are_those_of_the_whole_answer(tokenizer, length):
    """Each block is printed when its pass is done. An incomplete character waits for its remaining bytes."""
    text = "Tom pays €12 — “done” 🙂\n#### 12"
    ids = encode(tokenizer, text)
    parts = [ids[start : start + length] for start in range(0, len(ids), length)]
    console = Console(width=30, record=True, force_terminal=True, file=io.StringIO())
    streamer = ColouredStreamer(tokenizer, console)
    streamer.put(torch.tensor([[5, 6]]))
    seen = []
    for part in parts:
        streamer.put(torch.tensor(part))
        seen.append(console.export_text(clear=False))
    streamer.end()
    whole = coloured(block_texts(tokenizer, ids, map(len, parts))).plain
    assert console.export_text() == whole + "\n"
    assert all(whole.startswith(part) for part in seen)
    assert len(set(seen)) > 1
    assert not any("\ufffd" in part for part in seen)


def test_the_page_is_self_contained_and_escaped():
    page = html_page("<b>1 & 2</b>", ["<i>one", " two"], "2 tokens")
    assert page.startswith("<!doctype html>")
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;1 &amp; 2" in page
    assert not re.search(r"(src|href)=|<script", page)

"""Logits processors apply to every token of a block."""

import itertools

import pytest
import torch
from decoding_reference import BARRED, decode, greedy, naive_loop, prompts, texts
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
)

from mtp_trl.custom_generate import choice

PROCESSORS = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(10, 20)] + [[2, 3], [4, 5], [30, 31], [40, 22]]},
    "suppress_tokens": {"suppress_tokens": [*range(20, 40), *BARRED]},
    "prefix_allowed_tokens_fn": {
        "prefix_allowed_tokens_fn": lambda batch, ids: [t for t in range(1, 60) if (t + int(ids[-1]) + batch) % 3]
    },
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "several": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 5, "suppress_tokens": BARRED},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_hold_on_every_token_when_verified(tiny_model, name):
    """The text equals transformers' greedy decoding with the same processors, token for token."""
    model, rows = tiny_model("llama", context=0.6), prompts(6)
    options = PROCESSORS[name]
    expected = greedy(model, rows, **options)
    assert not torch.equal(expected, greedy(model, rows))
    for threshold in (0.0, 0.3):
        assert torch.equal(decode(model, rows, mtp_k=6, confadapt=threshold, verify=True, **options).sequences, expected)
    assert torch.equal(decode(model, rows, mtp_k=1, **options).sequences, expected)


class Ban(LogitsProcessor):
    """Bars the last token and the id after it. It reads `input_ids`, so these must include the tokens of the block."""

    def __call__(self, input_ids, scores):
        last = input_ids[:, -1:]
        return scores.scatter(1, torch.cat([last, (last + 1) % 64], 1), -torch.inf)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_processors_see_the_tokens_of_the_block(tiny_model, threshold):
    model, rows = tiny_model("llama", context=0.3), prompts(6)
    expected = [naive_loop(model, row, k=6, threshold=threshold, processors=[Ban()]) for row in rows]
    output = decode(model, rows, mtp_k=6, confadapt=threshold, logits_processor=LogitsProcessorList([Ban()]))
    assert list(zip(texts(output, rows), output.block_lengths, strict=True)) == expected
    for row, text in zip(rows, texts(output, rows), strict=True):
        assert all(b not in (a, a + 1) for a, b in itertools.pairwise([row[-1], *text]))


def test_all_positions_at_once_equals_position_by_position(tiny_model, monkeypatch):
    model, rows = tiny_model("llama"), prompts(6)
    options = {"confadapt": 0.3, "suppress_tokens": list(range(20, 30)), "temperature": 1.3, "top_k": 20, "top_p": 0.9}
    outputs = []
    for pointwise in (choice.POINTWISE, ()):
        monkeypatch.setattr(choice, "POINTWISE", pointwise)
        for verify in (False, True):
            torch.manual_seed(0)
            outputs.append(decode(model, rows, do_sample=True, verify=verify, **options).sequences)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])

"""Block sizes that `mtp_k="auto"` chooses by the clock."""

import pytest
import torch
from decoding_reference import PAD, decode, greedy, prompts

from mtp_trl.custom_generate import pace


class Clock:
    """A clock that advances only in forward passes, by `seconds(tokens fed)` each."""

    def __init__(self, model, monkeypatch, seconds) -> None:
        self.now, self.widths = 0.0, []
        monkeypatch.setattr(pace.time, "perf_counter", lambda: self.now)

        def passed(module, inputs, output):
            self.widths.append(output.shape[1])
            self.now += seconds(output.shape[0] * output.shape[1])

        model.get_input_embeddings().register_forward_hook(passed)


COSTS = {"flat": lambda tokens: 1.0, "line": lambda tokens: 1 + tokens / 20, "steep": lambda tokens: tokens / 10}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("cost", COSTS)
def test_auto_is_hardly_slower_than_the_best_fixed_block(tiny_model, monkeypatch, cost, rows, static):
    """Time advances by the given cost of a pass. The text is the model's greedy text regardless of it."""
    model, batch = tiny_model("llama", context=0.3), prompts(rows)
    clock = Clock(model, monkeypatch, COSTS[cost])
    options = {"verify": True, "max_new_tokens": 150, "eos_token_id": None, "pad_token_id": PAD}
    if static:
        options["cache_implementation"] = "static"

    def took(k) -> float:
        started = clock.now
        output = decode(model, batch, mtp_k=k, **options)
        assert torch.equal(output.sequences, expected)
        return clock.now - started

    expected = greedy(model, batch, max_new_tokens=150, eos_token_id=None, pad_token_id=PAD)
    fixed = {k: took(k) for k in (1, 2, 4, 8)}
    auto = [took("auto") for _ in range(4)][-1]  # the first calls still measure
    assert auto < 1.1 * (min(fixed[1], fixed[8]) if static else min(fixed.values()))
    assert auto < 1.06 * fixed[1]


def test_auto_decodes_single_tokens_when_wide_passes_are_expensive_and_blocks_when_they_are_cheap(tiny_model, monkeypatch):
    model, (row, *_) = tiny_model("llama", context=0.3), prompts()
    expensive = {"now": True}
    clock = Clock(model, monkeypatch, lambda tokens: float(tokens) if expensive["now"] else 1.0)
    options = {"mtp_k": "auto", "verify": True, "eos_token_id": None, "max_new_tokens": 200}
    decode(model, [row], **options)
    assert sum(width == 1 for width in clock.widths[-100:]) > 80
    expensive["now"] = False  # for example because another program has finished
    for _ in range(12):
        decode(model, [row], **options)
    assert sum(width > 4 for width in clock.widths[-20:]) > 14


def test_auto_measures_each_way_of_decoding_separately(tiny_model):
    model, rows = tiny_model("llama", context=0.3), prompts(2)
    for options in ({}, {"confadapt": 0.9}, {"do_sample": True}):
        decode(model, rows, mtp_k="auto", verify=True, **options)
    assert {key[:3] for key in pace.Pace.measured[model]} == {((0.0,), 8, False), ((0.9,), 8, False), ((0.0,), 8, True)}
    model.generation_config.update(mtp_k="auto", verify=True, allow_custom_entries=True)
    assert torch.equal(decode(model, rows).sequences, greedy(model, rows))

"""Block sizes and numbers of blocks that `mtp_k="auto"` chooses by the clock."""

import pytest
import torch
from decoding_reference import PAD, decode, greedy, prompts, with_random_adapter

from mtp_trl.custom_generate import pace, settings


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
    for _ in range(20):
        decode(model, [row], **options)
    assert sum(width > 4 for width in clock.widths[-20:]) > 14


def test_auto_measures_each_way_of_decoding_separately(tiny_model):
    model, rows = tiny_model("llama", context=0.3), prompts(2)
    for options in ({}, {"confadapt": 0.9}, {"do_sample": True}):
        decode(model, rows, mtp_k="auto", verify=True, **options)
    assert {key[:3] for key in pace.Pace.measured[model]} == {((0.0,), 8, False), ((0.9,), 8, False), ((0.0,), 8, True)}
    model.generation_config.update(mtp_k="auto", verify=True, allow_custom_entries=True)
    assert torch.equal(decode(model, rows).sequences, greedy(model, rows))


def test_auto_is_the_default_of_verified_decoding_in_float32_only(tiny_model, monkeypatch):
    monkeypatch.undo()  # the fixture that keeps the clock out of the other tests
    assert (torch.float32,) == settings.DTYPES_BY_CLOCK
    model, (row, *_) = tiny_model("llama", context=0.3), prompts()
    clock = Clock(model, monkeypatch, lambda tokens: float(tokens))  # blocks do not pay
    options = {"confadapt": 0.3, "max_new_tokens": 60, "eos_token_id": None}
    expected = greedy(model, [row], max_new_tokens=60, eos_token_id=None)

    def share_of_plain_passes(**more) -> float:
        clock.widths.clear()
        assert torch.equal(decode(model, [row], **options, **more).sequences, expected) or not more.get("verify")
        return sum(width == 1 for width in clock.widths) / len(clock.widths)

    assert share_of_plain_passes(verify=True) > 0.8
    for other in ({}, {"verify": True, "mtp_k": 8}, {"verify": True, "mtp_blocks": 2}):
        assert share_of_plain_passes(**other) == 0
    model.to(torch.bfloat16)
    clock.widths.clear()
    decode(model, [row], verify=True, **options)
    assert 1 not in clock.widths


def test_auto_uses_several_blocks_of_masks_if_wide_passes_cost_nothing(tiny_model, monkeypatch):
    model, (row, *_) = tiny_model("llama", context=0.3), prompts()
    clock = Clock(model, monkeypatch, COSTS["flat"])
    options = {"mtp_k": "auto", "verify": True, "eos_token_id": None, "max_new_tokens": 200}
    for _ in range(3):
        clock.widths.clear()
        decode(model, [row], **options)
    assert sum(width > 15 for width in clock.widths) > 0.8 * len(clock.widths)  # one block of 8 feeds at most 8 + 7 columns
    clock.widths.clear()
    decode(model, [row], mtp_blocks=1, **options)
    assert max(clock.widths[1:]) <= 15


def test_auto_decodes_plainly_without_the_adapter_s_hooks_and_restores_them(tiny_model, monkeypatch):
    """An inactive hook in every layer slows a plain pass down by some percent."""
    model = with_random_adapter(tiny_model("llama", context=0.3))
    (row, *_) = prompts()
    clock = Clock(model, monkeypatch, lambda tokens: float(tokens))
    hooked = []
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda *_: hooked.append((clock.widths[-1], len(layer._forward_hooks))))
    before = len(layer._forward_hooks)
    options = {"confadapt": 0.0, "mtp_k": "auto", "verify": True, "eos_token_id": None, "max_new_tokens": 100}
    decode(model, [row], **options)
    assert sum(width == 1 and hooks == before - 1 for width, hooks in hooked) > 60
    assert all(hooks == before for width, hooks in hooked if width > 8)
    assert len(layer._forward_hooks) == before

    def interrupt(*_):
        if clock.widths[-10:] == [1] * 10:
            raise KeyboardInterrupt

    layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode(model, [row], **options)
    assert len(layer._forward_hooks) == before

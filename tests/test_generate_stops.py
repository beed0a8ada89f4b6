"""Lengths, EOS, stopping criteria and stop strings end a text at the same token as one token per pass."""

import functools

import pytest
import torch
from decoding_reference import (
    EOS,
    NEW,
    PAD,
    StopsAtMultiple,
    decode,
    greedy,
    naive_loop,
    padded,
    prompts,
    texts,
    tiny_tokenizer,
)
from transformers import (
    GenerationConfig,
    MaxTimeCriteria,
)
from transformers.cache_utils import StaticLayer

from mtp_trl.custom_generate.generate import generate
from mtp_trl.custom_generate.output import MTPGenerateOutput


@pytest.mark.parametrize("new", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("verify", [False, True])
def test_lengths_are_never_exceeded(tiny_model, new, verify):
    model, rows = tiny_model("llama", context=0.3), prompts()
    output = decode(model, rows, mtp_k=8, verify=verify, max_new_tokens=new, eos_token_id=None, pad_token_id=PAD)
    assert output.sequences.shape == (4, 9 + new)
    assert [sum(blocks) for blocks in output.block_lengths] == [new] * 4
    if not verify:
        assert output.block_lengths == [[8] * (new // 8) + [new % 8] * (new % 8 > 0)] * 4


def test_max_length_counts_the_prompt(tiny_model):
    output = generate(**padded(prompts()), model=tiny_model("llama"), max_length=14, do_sample=False, eos_token_id=None)
    assert output.shape == (4, 14)


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("pad", [PAD, 30])
def test_rows_end_at_the_first_of_several_eos_ids(tiny_model, verify, pad):
    model, rows = tiny_model("llama", context=0.6), prompts(6)
    eos = [30, 31, *range(40, 50)]
    output = decode(model, rows, mtp_k=8, verify=verify, eos_token_id=eos, pad_token_id=pad, max_new_tokens=40)
    reference = [naive_loop(model, r, k=1 if verify else 8, threshold=0, new=40, eos=eos)[0] for r in rows]
    assert texts(output, rows) == reference
    assert any(len(text) < 40 for text in reference)
    longest = max(map(len, reference))
    for ids, text in zip(output.sequences[:, 9:].tolist(), reference, strict=True):
        assert ids == text + [pad] * (longest - len(text))


def test_passes_are_counted_until_a_row_is_finished(tiny_model):
    model, rows = tiny_model("llama"), prompts(6)
    calls = 0
    forward = model.forward

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    model.forward = functools.wraps(forward)(counted)
    output = decode(model, rows, confadapt=0.4)
    assert isinstance(output, MTPGenerateOutput)
    assert output.forward_passes.tolist() == [len(blocks) for blocks in output.block_lengths]
    assert calls == max(output.forward_passes)
    generated = sum(len(text) for text in texts(output, rows))
    assert output.acceleration == generated / sum(output.forward_passes.tolist())


@pytest.mark.parametrize("verify", [False, True])
def test_a_step_feeds_only_new_tokens_and_masks(tiny_model, verify):
    """No cached token is fed again: a step feeds at most k pending tokens and k - 1 masks."""
    model, widths = tiny_model("llama", context=0.3), []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    output = decode(model, prompts(1), mtp_k=5, verify=verify, eos_token_id=None)
    blocks = output.block_lengths[0]
    assert widths[0] == 9 + 4
    if verify:
        assert max(blocks) == 5
        assert max(widths[1:]) <= 5 + 4
    else:
        assert widths[1:] == [length + 4 for length in blocks[:-1]]


def test_finished_rows_leave_the_batch(tiny_model):
    model, rows = tiny_model("llama"), prompts(8)
    sizes = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    output = decode(model, rows, mtp_k=1)
    passes = output.forward_passes.tolist()
    assert min(passes) < max(passes)
    assert sizes == [sum(p > step for p in passes) for step in range(max(passes))]


def test_memory_is_bounded(tiny_model, monkeypatch):
    allocated = []
    allocate = StaticLayer.lazy_initialization
    monkeypatch.setattr(
        StaticLayer,
        "lazy_initialization",
        lambda layer, *states: (allocate(layer, *states), allocated.append(layer.keys.shape))[0],
    )
    decode(tiny_model("llama"), prompts(), mtp_k=4, eos_token_id=None)
    assert len(allocated) == 2
    assert all(shape[0] == 4 and shape[2] <= 9 + NEW + 2 * 4 for shape in allocated)


def test_min_new_tokens(tiny_model):
    model, rows = tiny_model("llama"), prompts(8)
    eos = list(range(20, 40))
    for options in ({"mtp_k": 8}, {"mtp_k": 8, "verify": True}):
        output = decode(model, rows, eos_token_id=eos, pad_token_id=PAD, min_new_tokens=10, **options)
        assert all(len(text) >= 10 and not set(text[:9]) & set(eos) for text in texts(output, rows))
    assert torch.equal(output.sequences, greedy(model, rows, eos_token_id=eos, pad_token_id=PAD, min_new_tokens=10))


@pytest.mark.parametrize("options", [{"mtp_k": 8}, {"mtp_k": 8, "verify": True}, {"mtp_k": 8, "confadapt": 0.4}])
def test_stopping_criteria_hold_at_the_exact_token(tiny_model, options):
    model, rows = tiny_model("llama"), prompts(8)
    free = texts(decode(model, rows, eos_token_id=None, pad_token_id=PAD, **options), rows)
    expected = [text[: next((i + 1 for i, t in enumerate(text) if t % 11 == 0), len(text))] for text in free]
    assert len({len(text) for text in expected}) > 2
    stop = StopsAtMultiple(11)
    output = decode(model, rows, eos_token_id=None, pad_token_id=PAD, stopping_criteria=[stop], **options)
    assert texts(output, rows) == expected
    assert {rows for rows, _ in stop.shapes} == {8}


def test_a_criterion_gets_the_columns_of_one_token_per_pass(tiny_model):
    model, (row, *_) = tiny_model("llama"), prompts()
    stop = StopsAtMultiple(1000)
    decode(model, [row], mtp_k=8, stopping_criteria=[stop], eos_token_id=None, pad_token_id=PAD)
    assert stop.shapes == [(1, 9 + generated) for generated in range(1, NEW + 1)]


def test_max_time_ends_with_the_first_block(tiny_model):
    model, rows = tiny_model("llama"), prompts()
    output = decode(model, rows, stopping_criteria=[MaxTimeCriteria(max_time=0.0, initial_timestamp=0.0)])
    assert output.forward_passes.tolist() == [1] * 4


@pytest.mark.parametrize("verify", [False, True])
def test_stop_strings_stop_in_the_middle_of_a_block(tiny_model, verify):
    model, rows, tokenizer = tiny_model("llama"), prompts(4), tiny_tokenizer()
    free = texts(decode(model, rows, mtp_k=8, verify=verify), rows)
    # The stop string spans two tokens inside the first block.
    string = tokenizer.decode(free[0][2:4])[1:]
    output = decode(model, rows, mtp_k=8, verify=verify, stop_strings=[string], tokenizer=tokenizer)
    assert texts(output, rows)[0] == free[0][:4]
    config = GenerationConfig(stop_strings=string, max_new_tokens=NEW, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
    again = generate(**padded(rows), model=model, generation_config=config, mtp_k=8, verify=verify, tokenizer=tokenizer)
    assert torch.equal(again, output.sequences)
    with pytest.raises(ValueError, match="tokenizer="):
        decode(model, rows, stop_strings=[string])


def test_lm_evals_criterion_fires_at_the_same_token_as_with_one_token_per_pass(tiny_model):
    utils = pytest.importorskip("lm_eval.models.utils_hf")
    model, rows, tokenizer = tiny_model("llama"), prompts(1), tiny_tokenizer()
    string = tokenizer.decode(texts(decode(model, rows, mtp_k=1), rows)[0][4:6])

    def stopped(**options) -> torch.Tensor:
        criteria = utils.stop_sequences_criteria(tokenizer, [string], 9, 1)
        ids = padded(rows)
        return generate(
            model=model, **ids, max_length=9 + NEW, stopping_criteria=criteria, pad_token_id=PAD, use_cache=True,
            do_sample=False, **options,
        )  # fmt: skip

    assert stopped(mtp_k=1).shape[1] < 9 + NEW
    assert torch.equal(stopped(mtp_k=8, verify=True), stopped(mtp_k=1))

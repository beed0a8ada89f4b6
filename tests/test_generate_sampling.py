"""Sampling is exact in distribution and depends only on the seed."""

import math
from collections import Counter

import pytest
import torch
from decoding_reference import block_logits, decode, lengths_of, prompts, texts

from mtp_trl.custom_generate.sampling import gumbel
from mtp_trl.modeling.exact import add_gated_adapter


def chi_square(observed: Counter, probabilities: dict, draws: int) -> tuple[float, int]:
    statistic = sum((observed[key] - draws * p) ** 2 / (draws * p) for key, p in probabilities.items())
    return statistic, len(probabilities) - 1


@torch.no_grad()
def exact_distribution(model, prompt: list[int], *, tokens: int, top_k: int, temperature: float) -> dict:
    """Probability of every continuation at one token per pass."""
    outcomes = {(): 1.0}
    for _ in range(tokens):
        longer = {}
        for text, probability in outcomes.items():
            logits = block_logits(model, prompt + list(text), 1)[0] / temperature
            values, ids = logits.topk(top_k)
            for p, token in zip(values.softmax(-1).tolist(), ids.tolist(), strict=True):
                longer[*text, token] = probability * p
        outcomes = longer
    return outcomes


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"mtp_k": 1},
        {"mtp_k": 3, "verify": True},
        {"mtp_k": 3, "verify": True, "mtp_blocks": 3},
        {"mtp_k": 6, "confadapt": 1.0},
    ],
)
def test_sampling_is_exact_in_distribution(tiny_model, options, exact):
    """20,000 continuations of three tokens against the enumerated distribution, at the 1 % level, with a fixed seed."""
    model, prompt = tiny_model("llama", context=0.5, logit_scale=1.5), prompts()[1]
    sampling = {"top_k": 3, "temperature": 1.2}
    expected = exact_distribution(model, prompt, tokens=3, **sampling)
    if exact:  # the adapter must not change the distribution of the base
        for update in add_gated_adapter(model, rank=4, alpha=8).updates:
            torch.nn.init.normal_(update.lora_B, std=0.3, generator=torch.Generator().manual_seed(0))
    draws = 20_000
    sampling |= {"do_sample": True, "num_return_sequences": draws, "eos_token_id": None, "max_new_tokens": 3}
    torch.manual_seed(0)
    output = decode(model, [prompt], **sampling, **options)
    observed = Counter(map(tuple, output.sequences[:, len(prompt) :].tolist()))
    assert set(observed) <= set(expected)
    statistic, freedom = chi_square(observed, expected, draws)
    assert freedom == 26
    assert statistic < 45.6  # the 99th percentile at 26 degrees of freedom


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"repetition_penalty": 1.3, "min_p": 0.02},
        {"top_k": 0, "temperature": 2.0},
    ],
)
def test_a_seed_gives_one_text_for_every_block_threshold_and_batch(tiny_model, options):
    model, rows = tiny_model("llama", context=0.5, logit_scale=2.0), prompts(4)

    def sampled(rows, **kwargs):
        torch.manual_seed(7)
        return texts(decode(model, rows, do_sample=True, **options, **kwargs), rows)

    plain = sampled(rows, mtp_k=1)
    assert len({tuple(text) for text in plain}) == 4
    for k, threshold in [(2, 0.0), (5, 0.2), (8, 0.0), (8, 0.6)]:
        assert sampled(rows, mtp_k=k, confadapt=threshold, verify=True) == plain
    assert sampled(rows[::-1], verify=True) == plain[::-1]
    for row, text in zip(rows, plain, strict=True):
        assert sampled([row], mtp_k=6, verify=True) == [text]


def test_copies_of_a_prompt_and_different_seeds_draw_differently(tiny_model):
    model, (row, *_) = tiny_model("llama", logit_scale=1.0), prompts()
    options = {"do_sample": True, "verify": True, "num_return_sequences": 8}
    torch.manual_seed(0)
    first, second = decode(model, [row], **options), decode(model, [row], **options)
    # Equal copies would give at most 2 texts, equal calls at most 8. A few short texts may coincide by chance.
    assert len({tuple(ids) for ids in first.sequences.tolist() + second.sequences.tolist()}) > 10


def test_verified_sampling_accepts_drafts(tiny_model):
    """Drafting and verification use the same noise, so that close distributions often agree."""
    model, rows = tiny_model("llama", context=0.3), prompts(8)
    torch.manual_seed(0)
    output = decode(model, rows, do_sample=True, verify=True, max_new_tokens=60)
    assert output.acceleration > 1.3


def test_plain_confadapt_samples_only_blocks_of_one_token(tiny_model):
    model, rows = tiny_model("llama"), prompts(8)
    torch.manual_seed(0)
    output = decode(model, rows, do_sample=True, temperature=2.0, mtp_k=6, confadapt=0.4)
    sampled = 0
    for row, text, blocks in zip(rows, texts(output, rows), output.block_lengths, strict=True):
        start = 0
        for length in blocks:
            argmax = block_logits(model, row + text[:start], 6).argmax(-1).tolist()
            if length > 1:
                assert text[start : start + length] == argmax[:length]
            sampled += length == 1 and text[start] != argmax[0]
            start += length
    assert sampled > 10
    assert max(lengths_of(output)) > 2


def test_a_block_cut_to_one_token_by_the_length_is_sampled(tiny_model):
    """Static k = 4 and five tokens: the first four are the argmax, the fifth is a block of its own and is sampled."""
    model, (row, *_) = tiny_model("llama", logit_scale=1.0), prompts()
    output = decode(
        model, [row], do_sample=True, mtp_k=4, max_new_tokens=5, num_return_sequences=16, eos_token_id=None
    )  # fmt: skip
    assert output.block_lengths == [[4, 1]] * 16
    assert len({tuple(ids) for ids in output.sequences[:, :-1].tolist()}) == 1
    assert len(set(output.sequences[:, -1].tolist())) > 3


def test_noise_is_gumbel_and_a_function_of_key_and_position():
    keys = torch.tensor([5, 5, -(2**62)])
    noise = gumbel(keys, torch.tensor([0, 1, 0]), 100_000)
    assert noise.mean(-1).tolist() == pytest.approx([0.5772] * 3, abs=0.015)
    assert noise.var(-1).tolist() == pytest.approx([math.pi**2 / 6] * 3, abs=0.04)
    assert torch.corrcoef(noise).triu(1).abs().max() < 0.015
    assert torch.equal(gumbel(keys[1:2], torch.tensor([1]), 10), noise[1:2, :10])

"""The decoder equals a naive loop without a cache, transformers' greedy decoding, and other ways to call the decoder."""

import copy
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from tokenizers import Tokenizer, decoders, models
from torch._dynamo.backends.common import aot_autograd
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.cache_utils import StaticLayer

from mtp_trl.custom_generate import choice, forward, forward_base, pace, recurrent_forward
from mtp_trl.custom_generate import generate as decoder
from mtp_trl.custom_generate.adapter_file import adapter_from, by_file_name, metadata_of
from mtp_trl.custom_generate.choice import ConfAdaptLogitsProcessor, accept_confident_prefix
from mtp_trl.custom_generate.generate import attach_decoder, generate
from mtp_trl.custom_generate.mtp_config import mask_ids_by_name
from mtp_trl.custom_generate.output import MTPGenerateOutput
from mtp_trl.custom_generate.sampling import gumbel
from mtp_trl.modeling.exact import add_gated_adapter

PAD, EOS, MASK, BARRED = 0, 1, 60, [60, 61, 62, 63]
NEW = 24
CACHED = [
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "cohere",
    "granite",
    "phi3",
    "olmo2",
    "gpt2",
    "deepseek_v3",
]
RECURRENT = ["falcon_h1", "granitemoehybrid", "qwen3_next", "qwen3_5_text", "bamba", "lfm2", "mamba2"]
# In this order: windows by column, states that start over in each pass, no attention mask, ALiBi, keys selected by an indexer.
UNCACHED = ["gpt_neo", "jamba", "rwkv", "bloom", "deepseek_v32"]


# --- references -------------------------------------------------------------------------------------------------------


def prompts(rows: int = 4, *, seed: int = 1) -> list[list[int]]:
    """Ragged prompts of 9, 6, 4, 1, 9, 6, ... tokens."""
    lengths = list(itertools.islice(itertools.cycle([9, 6, 4, 1]), rows))
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 60, (length,), generator=rng).tolist() for length in lengths]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Input ids and attention mask, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def decode(model, rows: list[list[int]], **kwargs) -> MTPGenerateOutput:
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    return generate(**padded(rows), model=model, **options)


def texts(output: MTPGenerateOutput, rows: list[list[int]]) -> list[list[int]]:
    """Generated tokens of each row without the padding after its end."""
    width = max(map(len, rows))
    lengths = [sum(blocks) for blocks in output.block_lengths]
    return [ids[width : width + n] for ids, n in zip(output.sequences.tolist(), lengths, strict=True)]


def greedy(model, rows: list[list[int]], **kwargs) -> torch.Tensor:
    """transformers' greedy decoding with the barred ids suppressed."""
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": BARRED, **kwargs}
    return GenerationMixin.generate(model, **padded(rows), **options)


@torch.no_grad()
def block_logits(model, ids: list[int], k: int) -> torch.Tensor:
    """Predictions of a block [K, V], from one forward pass over the whole text, without a cache."""
    fed = torch.tensor([ids + [MASK] * (k - 1)])
    logits = model(input_ids=fed, attention_mask=torch.ones_like(fed), use_cache=False).logits[0, -k:].float()
    logits[:, BARRED] = -torch.inf
    return logits


def naive_loop(model, prompt: list[int], *, k: int, threshold, new: int = NEW, eos=(EOS,), processors=()):
    """Decode as the method is defined. Return (generated tokens, block lengths).

    The last one of a list of thresholds holds for all later positions.
    """
    thresholds = threshold if isinstance(threshold, list) else [threshold]
    ids, blocks = list(prompt), []
    while True:
        logits = block_logits(model, ids, k)
        block, accepting = [], True
        for position in range(k):
            scores = logits[position][None].clone()
            for processor in processors:
                scores = processor(torch.tensor([ids + block]), scores)
            token = int(scores.argmax())
            confident = logits[position].softmax(-1)[token] >= thresholds[min(position, len(thresholds) - 1)]
            if position > 0 and not (accepting and confident):
                break
            accepting = accepting and bool(confident)
            block.append(token)
        for length, token in enumerate(block, start=1):
            if token in eos or len(ids) - len(prompt) + length == new:
                break
        ids += block[:length]
        blocks.append(length)
        if ids[-1] in eos or len(ids) - len(prompt) == new:
            return ids[len(prompt) :], blocks


@torch.no_grad()
def naive_verified_loop(model, prompt: list[int], *, k: int, threshold, new: int, branches: int = 1):
    """Decode as verified decoding is defined. Return (generated tokens, number of tokens that each step confirms).

    `branches` is the number of rejection points with a block of masks: a step gets new drafts if it rejects fewer drafts.
    """
    ids, drafts, blocks = list(prompt), [], []
    while len(ids) - len(prompt) < new and ids[-1] != EOS:
        before = len(ids)
        while drafts and int(block_logits(model, ids, 1).argmax()) == drafts[0]:
            ids.append(drafts.pop(0))
        logits = block_logits(model, ids, k if len(drafts) < branches else 1)
        block = logits.argmax(-1).tolist()
        accepted = int(accept_confident_prefix(logits.softmax(-1).amax(-1)[None], threshold=threshold))
        ids, drafts = [*ids, block[0]], block[1:accepted]
        ids = ids[: len(prompt) + new]
        if EOS in ids[before:]:
            ids, drafts = ids[: ids.index(EOS, before) + 1], []
        if EOS in drafts:
            drafts = drafts[: drafts.index(EOS)]
        blocks.append(len(ids) - before)
    return ids[len(prompt) :], blocks


def lengths_of(output: MTPGenerateOutput) -> Counter:
    return Counter(length for blocks in output.block_lengths for length in blocks)


# --- blocks and acceptance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "threshold", [0.0, 0.4, 0.7, 1.0, [0.0, 0.7, 0.4], [0.7, 0.0], [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]]
)
@pytest.mark.parametrize("k", [2, 5, 8])
def test_decoding_equals_the_naive_loop(tiny_model, k, threshold):
    model, rows = tiny_model("llama"), prompts(8)
    expected = [naive_loop(model, row, k=k, threshold=threshold) for row in rows]
    batched = decode(model, rows, mtp_k=k, confadapt=threshold)
    assert list(zip(texts(batched, rows), batched.block_lengths, strict=True)) == expected
    for row, expected_row in zip(rows[:3], expected, strict=False):
        single = decode(model, [row], mtp_k=k, confadapt=threshold)
        assert (texts(single, [row])[0], single.block_lengths[0]) == expected_row


def test_the_comparisons_cover_blocks_of_every_length(tiny_model):
    """Otherwise the other tests could pass with blocks of one token only."""
    options = {"max_new_tokens": 60, "eos_token_id": None}
    plain = decode(tiny_model("mistral"), prompts(8), mtp_k=8, confadapt=0.4, **options)
    assert set(lengths_of(plain)) >= set(range(1, 9))
    verified = decode(tiny_model("llama", context=0.3), prompts(8), mtp_k=8, verify=True, **options)
    assert set(lengths_of(verified)) >= set(range(1, 9))


@pytest.mark.parametrize("architecture", CACHED + RECURRENT)
def test_every_architecture_equals_the_naive_loop_and_greedy(tiny_model, architecture):
    model, rows, new = tiny_model(architecture, context=0.6), prompts(), 16
    expected = [naive_loop(model, row, k=5, threshold=0.3, new=new) for row in rows]
    batched = decode(model, rows, mtp_k=5, confadapt=0.3, max_new_tokens=new)
    blocks = [[length for length in lengths if length] for lengths in batched.block_lengths]
    assert list(zip(texts(batched, rows), blocks, strict=True)) == expected

    reference = greedy(model, rows, max_new_tokens=new)
    assert torch.equal(decode(model, rows, mtp_k=1, max_new_tokens=new).sequences, reference)
    assert torch.equal(decode(model, rows, mtp_k=5, verify=True, max_new_tokens=new).sequences, reference)
    single = decode(model, rows[1:2], mtp_k=5, confadapt=0.3, max_new_tokens=new)
    assert texts(single, rows[1:2])[0] == texts(batched, rows)[1]


@pytest.mark.parametrize("architecture", UNCACHED)
def test_architectures_without_a_known_cache_equal_the_naive_loop(tiny_model, architecture):
    """The reference decodes single rows, since padded batches in transformers depend on the padding for some of these."""
    model, rows, new = tiny_model(architecture, context=0.6), prompts(), 12
    with pytest.warns(UserWarning, match="without a cache"):
        batched = decode(model, rows, mtp_k=4, confadapt=0.3, max_new_tokens=new)
    expected = [naive_loop(model, row, k=4, threshold=0.3, new=new) for row in rows]
    assert list(zip(texts(batched, rows), batched.block_lengths, strict=True)) == expected
    with pytest.warns(UserWarning, match="without a cache"):
        verified = decode(model, rows, mtp_k=4, confadapt=0.3, verify=True, max_new_tokens=new)
    assert texts(verified, rows) == [naive_loop(model, row, k=1, threshold=0, new=new)[0] for row in rows]


@pytest.mark.parametrize(("architecture", "changes", "later"), [("xlm", {"causal": False}, "tokens"), ("cpmant", {}, "tokens")])
def test_models_that_are_not_causal_are_refused(tiny_model, architecture, changes, later):
    model = tiny_model(architecture, **changes)
    with pytest.raises(ValueError, match=f"its logits depend on {later} after them"):
        decode(model, prompts(2), verify=True)


def test_a_default_of_use_cache_false_is_ignored(tiny_model):
    model, rows = tiny_model("llama"), prompts(2)
    expected = decode(model, rows, verify=True)
    model.generation_config.use_cache = False
    assert torch.equal(decode(model, rows, verify=True).sequences, expected.sequences)
    with pytest.raises(ValueError, match="use_cache=False"):
        decode(model, rows, use_cache=False)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_verified_decoding_equals_greedy_when_drafts_are_often_right(tiny_model, architecture, k):
    model, rows = tiny_model(architecture, context=0.3), prompts(6)
    verified = decode(model, rows, mtp_k=k, verify=True, max_new_tokens=60)
    assert torch.equal(verified.sequences, greedy(model, rows, max_new_tokens=60))
    assert verified.acceleration > 1.05


@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_verified_decoding_takes_the_passes_of_the_naive_loop(tiny_model, threshold):
    model, rows = tiny_model("llama", context=0.3), prompts(6)
    expected = [naive_verified_loop(model, row, k=6, threshold=threshold, new=40) for row in rows]
    output = decode(model, rows, mtp_k=6, confadapt=threshold, verify=True, max_new_tokens=40)
    assert list(zip(texts(output, rows), output.block_lengths, strict=True)) == expected


@pytest.mark.parametrize("threshold", [0.0, 0.25])
@pytest.mark.parametrize("branches", [2, 3, 6])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_blocks_at_several_rejection_points_take_the_passes_of_the_naive_loop(tiny_model, architecture, branches, threshold):
    model, rows = tiny_model(architecture, context=0.3), prompts(6)
    options = {"mtp_k": 6, "confadapt": threshold, "verify": True, "max_new_tokens": 40}
    output = decode(model, rows, mtp_blocks=branches, **options)
    assert torch.equal(output.sequences, greedy(model, rows, max_new_tokens=40))
    expected = [naive_verified_loop(model, row, k=6, threshold=threshold, new=40, branches=branches) for row in rows]
    assert list(zip(texts(output, rows), output.block_lengths, strict=True)) == expected
    assert decode(model, rows[1:2], mtp_blocks=branches, **options).block_lengths[0] == output.block_lengths[1]


def test_blocks_at_every_rejection_point_save_passes(tiny_model):
    model, rows = tiny_model("llama", context=0.3), prompts(6)
    options = {"mtp_k": 6, "verify": True, "max_new_tokens": 60}
    passes = [int(decode(model, rows, mtp_blocks=blocks, **options).forward_passes.sum()) for blocks in (1, 6)]
    assert passes[1] < passes[0]


def test_a_default_of_mtp_blocks_affects_only_verified_decoding(tiny_model):
    model, rows = tiny_model("llama", context=0.3), prompts(4)
    plain = decode(model, rows, confadapt=0.3)
    several = decode(model, rows, verify=True, mtp_blocks=8, max_new_tokens=40)
    model.generation_config.mtp_blocks = 8
    assert decode(model, rows, confadapt=0.3).block_lengths == plain.block_lengths
    assert decode(model, rows, verify=True, max_new_tokens=40).block_lengths == several.block_lengths


def test_processors_that_read_the_text_use_one_block(tiny_model):
    model, rows = tiny_model("llama", context=0.3), prompts(4)
    options = {"mtp_k": 6, "verify": True, "max_new_tokens": 40, "repetition_penalty": 1.3}
    one, several = (decode(model, rows, mtp_blocks=blocks, **options) for blocks in (1, 6))
    assert several.block_lengths == one.block_lengths
    assert torch.equal(several.sequences, greedy(model, rows, max_new_tokens=40, repetition_penalty=1.3))


@pytest.mark.parametrize("options", [{}, {"confadapt": 0.3}, {"verify": True}, {"verify": True, "mtp_blocks": 3}, {"mtp_k": 1}])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_static_shapes_change_nothing(tiny_model, architecture, options):
    model, rows = tiny_model(architecture, context=0.3), prompts(5)
    options = {"mtp_k": 5, **options}
    widths = []
    hook = model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[:2]))
    output = decode(model, rows, cache_implementation="static", **options)
    hook.remove()
    assert len(set(widths[1:])) == 1
    expected = decode(model, rows, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.block_lengths == expected.block_lengths


def with_random_adapter(model):
    """Add an exact-mode adapter that changes the predictions at masks."""
    adapter = add_gated_adapter(model, rank=2, alpha=4)
    noise = torch.Generator().manual_seed(5)
    for update in adapter.updates:
        torch.nn.init.normal_(update.lora_B, std=0.3, generator=noise)
    torch.nn.init.normal_(adapter.mask_row.weight, generator=noise)
    return model


def test_threads_that_share_an_exact_model_do_not_disturb_each_other(tiny_model):
    """Concurrent calls give the text of sequential calls, although they detach the adapter and set its gate."""
    model = with_random_adapter(tiny_model("llama", context=0.3))
    calls = [(prompt, k) for prompt in prompts(3) for k in (1, 4, 8)]

    def text(call):
        prompt, k = call
        options = {"mtp_k": k, "confadapt": 0.1, "verify": k == 8, "eos_token_id": None, "max_new_tokens": 24}
        return decode(model, [prompt], **options).sequences.tolist()

    expected = [text(call) for call in calls]
    with ThreadPoolExecutor(len(calls)) as threads:
        assert list(threads.map(text, calls * 3)) == expected * 3
    assert model.mtp_adapter.state[0] == 0


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_static_step_compiles_once_as_one_graph(tiny_model, exact, verify):
    model, rows = tiny_model("llama", context=0.3), prompts(3)
    options = {"mtp_k": 4, "verify": verify, "confadapt": 0.1, "eos_token_id": None, "max_new_tokens": 40}
    if exact:
        without = decode(model, rows, **options)
        with_random_adapter(model)
    expected = decode(model, rows, **options)
    if exact:
        assert expected.block_lengths != without.block_lengths or not torch.equal(expected.sequences, without.sequences)
    seen = {}

    def inspect_graph(graph, inputs):
        found = torch._guards.TracingContext.get().fw_metadata
        seen["static"] = set(found.static_input_indices)
        seen["written"] = {i for i, info in enumerate(found.input_info) if info.mutates_data}
        return make_boxed_func(graph.forward)

    compiled = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=aot_autograd(fw_compiler=inspect_graph))
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    output = decode(model, rows, cache_implementation="static", compile_config=compiled, **options)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert torch.equal(output.sequences, expected.sequences)
    assert output.block_lengths == expected.block_lengths
    assert len(seen["written"]) == 4  # keys and values of two layers; CUDA graphs need them at fixed addresses
    assert seen["written"] <= seen["static"]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", *RECURRENT])
def test_cached_equals_uncached(tiny_model, architecture, monkeypatch):
    model, rows = tiny_model(architecture), prompts()
    options = {"mtp_k": 6, "confadapt": 0.4, "max_new_tokens": 40}
    cached = decode(model, rows, **options)
    monkeypatch.setattr(forward, "ATTENTION_LAYERS", set())
    monkeypatch.setattr(forward, "_RECURRENT_LAYERS", set())
    with pytest.warns(UserWarning, match="without a cache"):
        uncached = decode(model, rows, **options)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert [[length for length in lengths if length] for lengths in cached.block_lengths] == uncached.block_lengths


@pytest.mark.parametrize("k", [2, 8])
@pytest.mark.parametrize("architecture", RECURRENT)
def test_recurrent_states_advance_over_confirmed_tokens_only(tiny_model, architecture, k):
    """Prompts and texts are longer than a state may lag, and drafts are both confirmed and rejected."""
    model, rows = tiny_model(architecture, context=0.4), [row * 6 for row in prompts()]
    output = decode(model, rows, mtp_k=k, verify=True, max_new_tokens=60)
    assert torch.equal(output.sequences, greedy(model, rows, max_new_tokens=60))
    assert len(lengths_of(output) & Counter(range(k + 1))) > 2


@pytest.mark.parametrize("architecture", RECURRENT)
def test_a_recurrent_models_steps_do_not_grow_with_the_text(tiny_model, architecture):
    model, widths = tiny_model(architecture), []
    decode(model, prompts(1), max_new_tokens=1)  # the first call probes whether states can be continued
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    output = decode(model, prompts(1), mtp_k=4, verify=True, eos_token_id=None, max_new_tokens=100)
    assert len(widths) == int(output.forward_passes[0])
    assert max(widths[1:]) < recurrent_forward.STATE_TOKENS + 2 * 4
    assert output.block_lengths[0].count(0) <= 1 + 100 // recurrent_forward.STATE_TOKENS


@pytest.mark.parametrize("rows", [[[7]], [[7], [9]], [[7], [9, 3]]])
@pytest.mark.parametrize("architecture", RECURRENT)
def test_recurrent_states_start_from_prompts_of_one_token(tiny_model, architecture, rows):
    """Before the first step, a prompt of one token leaves nothing to read into the state."""
    model = tiny_model(architecture, context=0.4)
    output = decode(model, rows, mtp_k=5, verify=True)
    assert torch.equal(output.sequences, greedy(model, rows))


@pytest.mark.parametrize("exact", [False, True])
def test_recurrent_models_decode_in_exact_mode_and_with_auto(tiny_model, exact):
    model, rows = tiny_model("granitemoehybrid", context=0.4), prompts(4)
    if exact:
        with_random_adapter(model)
    expected = greedy(model, rows, max_new_tokens=60)
    for k in (6, "auto", "auto"):
        assert torch.equal(decode(model, rows, mtp_k=k, verify=True, max_new_tokens=60).sequences, expected)


def test_recurrent_layers_refuse_unsupported_arguments(tiny_model):
    model = tiny_model("qwen3_next")
    with pytest.raises(ValueError, match="leave cache_implementation='static' out"):
        decode(model, prompts(1), cache_implementation="static")
    with pytest.raises(ValueError, match="mtp_blocks=2 needs a model with attention layers only"):
        decode(model, prompts(1), verify=True, mtp_blocks=2)
    with pytest.raises(ValueError, match="past_key_values= needs a model with attention layers only"):
        decode(model, prompts(1), past_key_values=DynamicCache(config=model.config))


def test_acceptance_takes_the_longest_confident_prefix_and_at_least_one():
    probs = torch.tensor([[0.9, 0.8, 0.7], [0.9, 0.5, 0.9], [0.1, 0.9, 0.9], [0.7, 0.7, 0.7]])
    assert accept_confident_prefix(probs, threshold=0.7).tolist() == [3, 1, 1, 3]
    assert accept_confident_prefix(probs, threshold=0.0).tolist() == [3, 3, 3, 3]
    assert accept_confident_prefix(probs, threshold=torch.tensor([0.8, 0.0, 0.8])).tolist() == [2, 3, 1, 1]


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"verify": True, "mtp_blocks": 3}, {"do_sample": True}], ids=str)
def test_equal_thresholds_by_position_decode_like_one_threshold(tiny_model, options):
    """The last entry of a list is repeated, entries beyond the block are ignored, and generation_config may hold the list."""
    model, rows = tiny_model("llama", context=0.3), prompts(6)

    def sequences(**thresholds):
        torch.manual_seed(0)
        output = decode(model, rows, mtp_k=4, max_new_tokens=40, **options, **thresholds)
        return output.sequences.tolist(), output.block_lengths

    one = sequences(confadapt=0.25)
    assert sequences(confadapt=[0.25]) == sequences(confadapt=(0.25,) * 3) == one
    assert sequences(confadapt=[0.25] * 4 + [0.99] * 20) == one
    assert sequences(confadapt=[0.0, 0.9]) != one
    model.generation_config.confadapt = [0.25, 0.25]
    assert sequences() == one


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("threshold", [[0.0, 0.3, 0.2], [0.1, 0.0, 0.0, 0.4]], ids=str)
def test_verified_decoding_drafts_with_thresholds_by_position(tiny_model, threshold, branches):
    model, rows = tiny_model("llama", context=0.3), prompts(6)
    by_position = torch.tensor([*threshold, *[threshold[-1]] * 6][:6])
    expected = [naive_verified_loop(model, row, k=6, threshold=by_position, new=40, branches=branches) for row in rows]
    options = {"mtp_k": 6, "verify": True, "mtp_blocks": branches, "max_new_tokens": 40}
    output = decode(model, rows, confadapt=threshold, **options)
    assert list(zip(texts(output, rows), output.block_lengths, strict=True)) == expected
    uniform = [decode(model, rows, confadapt=one, **options).block_lengths for one in threshold]
    assert output.block_lengths not in uniform


@pytest.mark.parametrize(
    ("confadapt", "message"),
    [
        ([], "empty list"), ([0.9, "x"], "at every position, got 'x'"), ([0.9, 1.5], "got 1.5"), ([[0.9]], "got \\[0.9\\]"),
        ([True], "got True"), ({"1": 0.9}, "got {'1': 0.9}"), ([float("nan")], "got nan"),
    ],
)  # fmt: skip
def test_invalid_thresholds_are_refused(tiny_model, confadapt, message):
    with pytest.raises(ValueError, match=message):
        decode(tiny_model("llama"), prompts(1), confadapt=confadapt)


def test_a_probability_equal_to_the_threshold_is_accepted(tiny_model):
    """Use the lower probability of a block of two as the threshold, and the next larger float32."""
    model, (prompt, *_) = tiny_model("llama"), prompts()
    probs = block_logits(model, prompt, 2).softmax(-1).amax(-1)
    at = min(probs.tolist())
    above = torch.nextafter(torch.tensor(at), torch.tensor(1.0)).item()
    assert accept_confident_prefix(probs[None], threshold=at).tolist() == [2]
    assert accept_confident_prefix(probs[None], threshold=above).tolist() == [1]


def test_acceptance_reads_the_probability_of_the_emitted_token_without_processors_and_temperature(tiny_model):
    """If the likeliest tokens are suppressed, the emitted tokens are improbable, although their processed scores are not."""
    model, rows = tiny_model("llama", logit_scale=8.0), prompts()
    suppressed = sorted({token for text in texts(decode(model, rows), rows) for token in text})
    output = decode(model, rows, confadapt=0.6, suppress_tokens=suppressed)
    assert set(lengths_of(output)) == {1}


def test_processor_bars_ids_and_records_the_confidence():
    processor = ConfAdaptLogitsProcessor([2, 3])
    scores = torch.tensor([[0.0, 1.0, 9.0, 9.0], [2.0, 2.0, 0.0, 0.0]], dtype=torch.bfloat16)
    barred = processor(torch.zeros(2, 1, dtype=torch.long), scores)
    assert barred.dtype == torch.float32
    assert barred[:, 2:].tolist() == [[-math.inf] * 2] * 2
    barred.zero_()  # another processor may write in place
    assert processor.confidence(torch.tensor([1, 0])).tolist() == pytest.approx([1 / (1 + math.exp(-1)), 0.5])
    assert scores[0, 2] == 9


def test_barred_ids_are_never_emitted(tiny_model):
    """The model assigns its highest logits to them."""
    model, rows = tiny_model("llama"), prompts()
    model.lm_head.weight.data[BARRED] = model.lm_head.weight.data[:60].norm(dim=-1).max() * 10
    for options in ({"mtp_k": 1}, {}, {"confadapt": 0.5}, {"verify": True}, {"do_sample": True, "temperature": 5.0}):
        for text in texts(decode(model, rows, **options), rows):
            assert not set(text) & set(BARRED)


# --- lengths and stops ------------------------------------------------------------------------------------------------


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


class StopsAtMultiple(StoppingCriteria):
    """Reads the last token only, as transformers' criteria do, and records the shapes of its inputs."""

    def __init__(self, divisor: int) -> None:
        self.divisor, self.shapes = divisor, []

    def __call__(self, input_ids, scores, **kwargs):
        self.shapes.append(tuple(input_ids.shape))
        return input_ids[:, -1] % self.divisor == 0


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


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """64 tokens of one to three letters, joined without spaces."""
    words = ["<pad>", "<eos>"] + ["".join(chr(97 + (i * j) % 26) for j in range(1, 2 + i % 3)) + str(i) for i in range(2, 64)]
    words[MASK], words[59] = "<|mtp|>", "abcdef"  # transformers' StopStringCriteria asks every tokenizer for "abcdef"
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


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


# --- processors -------------------------------------------------------------------------------------------------------

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


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("options", [{"mtp_k": 1}, {"mtp_k": 6, "verify": True}, {"mtp_k": 6, "verify": True, "mtp_blocks": 6}])
def test_scores_and_logits_are_those_of_one_token_per_pass(tiny_model, options, processors):
    model, rows = tiny_model("llama", context=0.3), prompts(4)
    requested = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, **processors}
    theirs, ours = greedy(model, rows, **requested), decode(model, rows, **options, **requested)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(ours.logits) == len(theirs.scores)
    lengths = torch.tensor([sum(blocks) for blocks in ours.block_lengths])
    for token in range(len(theirs.scores)):
        alive = lengths > token
        torch.testing.assert_close(ours.logits[token][alive], theirs.logits[token][alive], atol=1e-4, rtol=1e-4)
        barred = ours.scores[token].isinf()
        assert torch.equal(barred[alive], theirs.scores[token].isinf()[alive])
        torch.testing.assert_close(ours.scores[token][alive], theirs.scores[token][alive], atol=1e-4, rtol=1e-4)
        assert ours.scores[token][~alive].argmax(-1).eq(PAD).all()
    ours_by_token = model.compute_transition_scores(ours.sequences, ours.scores, normalize_logits=True)
    theirs_by_token = model.compute_transition_scores(theirs.sequences, theirs.scores, normalize_logits=True)
    generated = torch.arange(len(theirs.scores)) < lengths[:, None]
    torch.testing.assert_close(ours_by_token[generated], theirs_by_token[generated], atol=1e-4, rtol=1e-4)
    assert not ours_by_token[~generated].any()


def test_scores_of_a_block_are_those_at_the_masks(tiny_model):
    model, (row, *_) = tiny_model("llama"), prompts()
    output = decode(model, [row], mtp_k=4, output_scores=True, eos_token_id=None, max_new_tokens=8)
    text = texts(output, [row])[0]
    expected = torch.cat([block_logits(model, row, 4), block_logits(model, row + text[:4], 4)])
    torch.testing.assert_close(torch.cat(output.scores), expected, atol=1e-4, rtol=1e-4)
    assert decode(model, [row]).scores is None
    assert torch.is_tensor(decode(model, [row], output_scores=True, return_dict_in_generate=False))


@pytest.mark.parametrize("options", [{}, {"confadapt": 0.3}, {"verify": True}, {"verify": True, "mtp_blocks": 3}, {"mtp_k": 1}])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_a_conversation_continues_from_its_cache(tiny_model, architecture, options):
    """Three turns of ragged rows give the text of decoding without the cache, and only new tokens are fed."""
    model = tiny_model(architecture, context=0.5)
    batch, past = padded(prompts(3)), DynamicCache(config=model.config)
    options = {
        "max_new_tokens": 10,
        "do_sample": False,
        "eos_token_id": None,
        "return_dict_in_generate": True,
        "mtp_k": 5,
        **options,
    }
    fed = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: fed.append(output.shape[1]))
    for turn in range(3):
        uncached = generate(**batch, model=model, pad_token_id=PAD, **options)
        fed.clear()
        output = generate(**batch, model=model, pad_token_id=PAD, past_key_values=past, **options)
        assert output.past_key_values is past
        assert torch.equal(output.sequences, uncached.sequences)
        assert output.block_lengths == uncached.block_lengths
        width = batch["input_ids"].shape[1]
        assert fed[0] <= width + 12 if turn == 0 else fed[0] < width
        assert width <= past.get_seq_length() < output.sequences.shape[1]
        reply = torch.randint(2, 60, (3, 4), generator=torch.Generator().manual_seed(turn))
        ids = torch.cat([output.sequences, reply], 1)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.cat([batch["attention_mask"], torch.ones(3, 14, dtype=torch.long)], 1),
        }


@pytest.mark.parametrize("stop", [{"eos_token_id": list(range(20, 40))}, {"stopping_criteria": [StopsAtMultiple(3)]}])
@pytest.mark.parametrize("verify", [False, True])
def test_a_cache_of_finished_rows_covers_the_columns_of_all_rows(tiny_model, verify, stop):
    model, rows, past = tiny_model("llama", context=0.3), prompts(4), DynamicCache()
    options = {"mtp_k": 8, "verify": verify, "pad_token_id": PAD, **stop}
    output = decode(model, rows, past_key_values=past, **options)
    ended = texts(output, rows)
    assert len({len(text) for text in ended}) > 1
    assert past.get_seq_length() <= 9 + min(map(len, ended))
    width = output.sequences.shape[1] - 9
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in ended])
    batch = {
        "input_ids": torch.cat([output.sequences, torch.full((4, 1), 50)], 1),
        "attention_mask": torch.cat([padded(rows)["attention_mask"], mask, torch.ones(4, 1, dtype=torch.long)], 1),
    }
    options |= {"max_new_tokens": 8, "do_sample": False}
    again = generate(**batch, model=model, past_key_values=past, **options)
    assert torch.equal(again, generate(**batch, model=model, **options))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_a_cache_of_the_whole_prompt_or_with_padding_inside_is_used_as_far_as_possible(tiny_model, architecture):
    """Sliding layers keep only their last columns. Padding among these displaces tokens that are still within the window."""
    model = tiny_model(architecture)
    ids = torch.randint(2, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 12:18] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, "mtp_k": 4}
    for columns in (20, 24):
        past = DynamicCache(config=model.config)
        positions = (mask[:, :columns].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            model(ids[:, :columns], attention_mask=mask[:, :columns], position_ids=positions, past_key_values=past)
        expected = generate(ids, attention_mask=mask, model=model, **options)
        # With padding inside the text, transformers' window is in columns and ours in tokens.
        rows = slice(None) if architecture == "llama" else slice(1, None)
        past.batch_select_indices(torch.arange(2)[rows])
        output = generate(ids[rows], attention_mask=mask[rows], model=model, past_key_values=past, **options)
        assert torch.equal(output, expected[rows])
    past = DynamicCache(config=model.config)
    generate(ids[:, :20], attention_mask=mask[:, :20], model=model, past_key_values=past, **{**options, "max_new_tokens": 1})
    assert torch.equal(generate(ids, attention_mask=mask, model=model, past_key_values=past, **options), expected)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_transformers_continues_from_the_cache_and_vice_versa(tiny_model, architecture):
    model, rows = tiny_model(architecture, context=0.5), prompts(3)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, "suppress_tokens": BARRED}
    expected = greedy(model, rows, **options | {"max_new_tokens": 30})
    past, batch = DynamicCache(config=model.config), padded(rows)
    for new, decoder_of in ((10, generate), (20, None), (30, generate)):
        options["max_length"] = 9 + new
        if decoder_of is None:
            ids = GenerationMixin.generate(model, **batch, past_key_values=past, **options)
        else:
            ids = generate(**batch, model=model, verify=True, past_key_values=past, **options)
        assert torch.equal(ids, expected[:, : 9 + new])
        batch = {"input_ids": ids, "attention_mask": torch.cat([padded(rows)["attention_mask"], torch.ones(3, new).long()], 1)}


def test_a_cache_that_does_not_fit_is_refused(tiny_model):
    model, past = tiny_model("llama"), DynamicCache()
    decode(model, prompts(2), past_key_values=past)
    with pytest.raises(ValueError, match=r"holds 2 rows of .* the prompts are 1 rows of 9"):
        decode(model, prompts(1), past_key_values=past)


def test_ranks_that_share_weights_run_the_same_number_of_passes(tiny_model, monkeypatch):
    """Another rank needs 20 passes more than this one, so this one runs 20 additional passes."""
    model, passes, reduced = tiny_model("llama"), [], []
    model.register_forward_hook(lambda module, inputs, output: passes.append(1))
    expected = decode(model, prompts(2), confadapt=0.3)
    needed = len(passes)
    needed_by_other = int(expected.forward_passes.max()) + 20
    passes.clear()

    def all_reduce(count):
        reduced.append(int(count))
        count += len(reduced) <= needed_by_other

    monkeypatch.setattr(forward_base.dist, "all_reduce", all_reduce)
    output = decode(model, prompts(2), confadapt=0.3, synced_gpus=True)
    assert torch.equal(output.sequences, expected.sequences)
    assert len(passes) == needed_by_other
    assert reduced == [1] * needed + [0] * 21


# --- mtp_k="auto" -----------------------------------------------------------------------------------------------------


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


# --- sampling ---------------------------------------------------------------------------------------------------------


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


# --- the call ---------------------------------------------------------------------------------------------------------


def test_defaults_come_from_the_generation_config(tiny_model):
    model, rows = tiny_model("llama"), prompts()
    model.generation_config.update(confadapt=0.4, mtp_k=5, allow_custom_entries=True)
    explicit = decode(tiny_model("llama"), rows, confadapt=0.4, mtp_k=5).block_lengths
    assert decode(model, rows).block_lengths == explicit
    assert decode(model, rows, confadapt=0.0, eos_token_id=None, max_new_tokens=10).block_lengths == [[5, 5]] * 4
    model.generation_config.update(verify=True, allow_custom_entries=True)
    assert torch.equal(decode(model, rows).sequences, greedy(model, rows))
    assert decode(model, rows, verify=False).block_lengths == explicit
    request = GenerationConfig(confadapt=0.0, mtp_k=2, verify=False, max_new_tokens=6, do_sample=False, eos_token_id=59)
    output = generate(**padded(rows), model=model, generation_config=request, return_dict_in_generate=True)
    assert output.block_lengths == [[2, 2, 2]] * 4


def test_the_default_block_is_the_one_trained(tiny_model):
    model = tiny_model("llama")
    assert decode(model, prompts(1), eos_token_id=None, max_new_tokens=16).block_lengths == [[8, 8]]
    with pytest.warns(UserWarning, match="exceeds the trained block size, 8"):
        decode(model, prompts(1), mtp_k=9)


class QuantoLike(DynamicCache):
    """A cache with unsupported layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [StaticLayer(8)]


REFUSED = {
    "confadapt=True": ({"confadapt": True}, r"\[0, 1\], got True"),
    "confadapt=1.5": ({"confadapt": 1.5}, r"\[0, 1\], got 1.5"),
    "confadapt=nan": ({"confadapt": math.nan}, "got nan"),
    "confadapt='0.9'": ({"confadapt": "0.9"}, "got '0.9'"),
    "mtp_k=0": ({"mtp_k": 0}, "mtp_k must be a whole number from 1 to 1024, or 'auto', got 0"),
    "mtp_k=True": ({"mtp_k": True}, "got True"),
    "mtp_k=2.5": ({"mtp_k": 2.5}, "got 2.5"),
    "mtp_blocks=0": ({"mtp_blocks": 0, "verify": True}, "mtp_blocks must be a whole number >= 1, got 0"),
    "mtp_blocks=True": ({"mtp_blocks": True, "verify": True}, "mtp_blocks must be a whole number >= 1, got True"),
    "mtp_blocks without verify": ({"mtp_blocks": 2}, "pass verify=True"),
    "cache_implementation": ({"cache_implementation": "offloaded"}, "has its own cache"),
    "paged cache": ({"cache_implementation": "paged"}, "has its own cache"),
    "verify=1": ({"verify": 1}, "verify must be True or False, got 1"),
    "mtp_token_id": ({"mtp_token_id": 5}, "contradicts config.mtp"),
    "num_beams": ({"num_beams": 2, "verify": True}, "num_beams=2 .*GenerationMixin.generate"),
    "prompt_lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
    "guidance_scale": ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
    "use_cache": ({"use_cache": False}, "use_cache=False"),
    "output_attentions": ({"output_attentions": True}, "output_attentions=True"),
    "auto without verify": ({"mtp_k": "auto"}, "chooses block sizes by measured times, and only verified text"),
    "auto with blocks": ({"mtp_k": "auto", "verify": True, "mtp_blocks": 2}, "mtp_blocks=2 is not supported with mtp_k='auto'"),
    "auto with synced_gpus": ({"mtp_k": "auto", "verify": True, "synced_gpus": True}, "must use the same sizes"),
    "assistant_model": ({"assistant_model": object()}, "assistant_model="),
    "past_key_values": ({"past_key_values": QuantoLike()}, "must be a DynamicCache, got QuantoLike"),
    "inputs_embeds": ({"inputs_embeds": torch.zeros(1, 1, 32)}, "inputs_embeds="),
    "custom_generate": ({"custom_generate": "somewhere"}, "custom_generate="),
    "typo": ({"confadpat": 0.9}, "confadpat"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_unsupported_arguments_are_refused(tiny_model, name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        decode(tiny_model("llama"), prompts(1), **options)


@pytest.mark.parametrize(
    "hostile",
    [
        {"k_max": 10**9}, {"k_max": "8"}, {"k_max": 0}, {"mask_token_id": -5}, {"mask_token_id": "x"}, {"mask_token_id": 10**9},
        {"barred_token_ids": [10**9]}, {"barred_token_ids": "abc"}, {"barred_token_ids": [-1]},
        {"barred_token_ids": list(range(64))},
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_config_is_refused(tiny_model, hostile):
    model = tiny_model("llama")
    model.config.mtp |= hostile
    with pytest.raises(ValueError, match=f"config.mtp has {next(iter(hostile))}="):
        decode(model, prompts(1))


def test_a_streamer_takes_one_row(tiny_model):
    with pytest.raises(ValueError, match="one row, got 4"):
        decode(tiny_model("llama"), prompts(), streamer=Collect())


def test_flash_attention_is_refused_with_the_remedy(tiny_model):
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="set_attn_implementation\\('sdpa'\\)"):
        decode(model, prompts(1))


def test_an_empty_row_is_refused(tiny_model):
    batch = padded(prompts(2))
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="Row 1 of the batch has no tokens"):
        generate(**batch, model=tiny_model("llama"), max_new_tokens=2)


def test_padding_may_be_anywhere(tiny_model):
    """The prompt consists of the columns that the attention mask marks: padding on the right or inside changes nothing."""
    model, (row, *_) = tiny_model("llama"), prompts()
    ids = torch.tensor([[PAD, *row[:4], PAD, *row[4:], PAD]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]])
    output = generate(ids, attention_mask=mask, model=model, max_new_tokens=NEW, do_sample=False)
    assert output[0, 12:].tolist() == texts(decode(model, [row]), [row])[0]


def test_a_checkpoint_without_config_mtp_needs_the_mask_token_as_an_argument(tiny_model):
    model, rows = tiny_model("llama"), prompts()
    expected = decode(model, rows, suppress_tokens=BARRED).sequences
    model = tiny_model("llama")
    del model.config.mtp
    with pytest.raises(ValueError, match=r"no mask token.*mtp_token_id="):
        decode(model, rows)
    assert torch.equal(decode(model, rows, mtp_k=1, suppress_tokens=BARRED).sequences, greedy(model, rows))
    options = {"mtp_k": 8, "suppress_tokens": BARRED}
    assert torch.equal(decode(model, rows, mtp_token_id=MASK, **options).sequences, expected)
    assert torch.equal(decode(model, rows, tokenizer=tiny_tokenizer(), **options).sequences, expected)
    with pytest.raises(ValueError, match="0 to 63, got 64"):
        decode(model, rows, mtp_token_id=64)


def test_the_papers_token_names_are_known():
    words = {"<pad>": 0, "<eos>": 1, "<|mtp_special_token_1|>": 5, "<|mtp_special_token_0|>": 9}
    named = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")))
    assert mask_ids_by_name(named) == [9, 5]


@pytest.mark.parametrize("training", [True, False])
def test_every_modules_mode_is_restored(tiny_model, training):
    model, rows = tiny_model("llama"), prompts()
    expected = decode(model, rows).sequences
    model.train(training)
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert torch.equal(decode(model, rows).sequences, expected)
    with pytest.raises(ValueError, match="mtp_k"):
        decode(model, rows, mtp_k=0)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_half_precision_decodes(tiny_model, architecture, dtype):
    output = decode(tiny_model(architecture).to(dtype), prompts(), confadapt=0.5)
    assert all(0 < len(text) <= NEW for text in texts(output, prompts()))


class Collect:
    """A streamer that records its input."""

    def __init__(self) -> None:
        self.values, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("verify", [False, True])
def test_the_streamer_gets_each_block_once(tiny_model, verify):
    model, (row, *_) = tiny_model("llama", context=0.3), prompts()
    streamer = Collect()
    output = decode(model, [row], verify=verify, streamer=streamer)
    prompt, *blocks = streamer.values
    assert prompt.tolist() == [row]
    assert [len(block) for block in blocks] == output.block_lengths[0]
    assert torch.cat(blocks).tolist() == texts(output, [row])[0]
    assert streamer.ended


def test_transformers_text_streamer_prints_the_text(tiny_model):
    model, (row, *_), tokenizer = tiny_model("llama"), prompts(), tiny_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    output = decode(model, [row], streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(texts(output, [row])[0])


def test_attached_decoder_is_the_models_generate(tiny_model):
    model, rows = tiny_model("llama"), prompts()
    expected = decode(model, rows, confadapt=0.4).sequences
    assert attach_decoder(model) is model
    assert torch.equal(model.generate(**padded(rows), confadapt=0.4, max_new_tokens=NEW, do_sample=False), expected)
    twin = copy.deepcopy(model)
    assert twin.generate.keywords["model"] is twin


def test_a_peft_model_decodes_with_its_adapter(tiny_model):
    peft = pytest.importorskip("peft")
    model, rows = tiny_model("llama"), prompts()
    plain = decode(model, rows, confadapt=0.4).sequences
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wrapped = attach_decoder(wrapped.eval())
    options = {"max_new_tokens": NEW, "do_sample": False}
    adapted = wrapped.generate(**padded(rows), confadapt=0.4, **options)
    assert not torch.equal(adapted, plain)
    assert torch.equal(wrapped.generate(**padded(rows), verify=True, **options), greedy(model, rows))
    with wrapped.disable_adapter():
        assert torch.equal(wrapped.generate(**padded(rows), confadapt=0.4, **options), plain)


# --- random arguments -------------------------------------------------------------------------------------------------

VALUES = {
    "confadapt": [0.0, 0.3, 0.9, 1.0, 1, -0.1, 2, "0.5", True],
    "mtp_k": [1, 2, 3, 8, 8, "auto", 0, -1, "8", 10**6],
    "verify": [True, True, False, 1],
    "mtp_blocks": [1, 2, 3, 100, 0],
    "max_new_tokens": [1, 2, 5, 9, 9, 0, -3],
    "min_new_tokens": [1, 4, 20],
    "do_sample": [True, False],
    "temperature": [0.3, 1.0, 3.0, 0.0, -1.0],
    "top_k": [0, 1, 5, 200],
    "top_p": [0.1, 0.9, 1.0, 1.5],
    "min_p": [0.1, 2.0],
    "repetition_penalty": [1.0, 1.5, -1.0],
    "no_repeat_ngram_size": [0, 2],
    "bad_words_ids": [[[5], [6, 7]], [[]]],
    "suppress_tokens": [[4, 5, 6], [*BARRED, 2], list(range(2, 64))],
    "eos_token_id": [1, [30, 31], [*range(40, 60)], [], -1],
    "pad_token_id": [0, 30, None],
    "num_return_sequences": [1, 2, 3],
    "num_beams": [1, 1, 1, 2],
    "use_cache": [True, True, True, False],
    "cache_implementation": ["static", "dynamic", "dynamic", "quantized"],
    "return_dict_in_generate": [True, False],
    "output_scores": [True, False],
    "output_logits": [True, False],
    "max_time": [0.0, 10.0],
    "max_length": [3, 20],
    "stop_strings": ["b", ["ab", "zz"]],
    "tokenizer": [tiny_tokenizer(), tiny_tokenizer(), None],
    "guidance_scale": [1.0, 1.5],
    "mtp_token_id": [MASK, MASK, 3, -5],
    "forced_eos_token_id": [1],
    "typical_p": [0.5, 1.0],
    # Not exponential_decay_length_penalty: transformers itself fails on it without an EOS token.
    "sequence_bias": [{(5,): 3.0, (6, 7): -2.0}],
    "renormalize_logits": [True],
    "encoder_no_repeat_ngram_size": [2],
}


@pytest.mark.parametrize("part", range(4))
@pytest.mark.filterwarnings("ignore")
def test_any_arguments_give_clean_text_or_a_clear_error(tiny_model, part):
    """MTP_FUZZ=2500 runs 10,000 calls."""
    rng = random.Random(part)
    tried, decoded, refused = int(os.environ.get("MTP_FUZZ", "150")), 0, Counter()
    compared = 0
    for number in range(tried):
        if number % 50 == 0:
            model = tiny_model(["llama", "mistral", "qwen3_next", "gpt_oss"][part], seed=number, context=0.3)
        names = rng.sample(list(VALUES), rng.randint(1, 7))
        options = {name: rng.choice(VALUES[name]) for name in names}
        batch = padded(prompts(rng.choice([1, 1, 2, 3]), seed=number))
        try:
            output = generate(**batch, model=model, **{"max_new_tokens": 9, **options})
        except ValueError as error:
            refused[re.sub(r"[\d.]+", "N", str(error))[:40]] += 1
            continue
        except Exception as error:
            raise AssertionError(f"{options} with rows of {batch['attention_mask'].sum(1).tolist()}") from error
        ids = output if torch.is_tensor(output) else output.sequences
        pads = {options.get("pad_token_id"), PAD, EOS}
        new = set(ids[:, batch["input_ids"].shape[1] :].flatten().tolist()) - pads
        assert not new & set(BARRED), options
        assert ids.shape[1] <= batch["input_ids"].shape[1] + max(1, options.get("max_new_tokens", 9)), options
        decoded += 1
        if options.get("verify") is True and not options.get("do_sample"):
            plain = {name: value for name, value in options.items() if name not in ("mtp_k", "mtp_blocks", "max_time")}
            if "max_time" not in options:
                again = generate(**batch, model=model, **{"max_new_tokens": 9, **plain, "mtp_k": 1})
                assert torch.equal(ids, again if torch.is_tensor(again) else again.sequences), options
                compared += 1
    assert decoded > tried / 5
    assert compared > 0
    assert len(refused) > 10
    assert not [m for m in refused if re.match(r"zip\(|expected sequence|too many dim|not enough values", m)], refused


# --- device maps and offloading ---------------------------------------------------------------------------------------

LAYERS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("offloaded", [[], ["model.layers.1"], ["model.embed_tokens", "model.layers.0", "lm_head"]])
def test_a_device_map_with_layers_on_disk_decodes_alike(tiny_model, tmp_path, offloaded, exact):
    model, rows = tiny_model("llama", context=0.3), prompts(3)
    model.save_pretrained(tmp_path / "model")
    device_map = {layer: "disk" if layer in offloaded else "cpu" for layer in LAYERS} if offloaded else "auto"
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )  # fmt: skip
    assert any(weight.is_meta for weight in spread.parameters()) == bool(offloaded)
    if exact:
        adapter = with_random_adapter(model).mtp_adapter
        adapter_from(by_file_name(adapter), metadata_of(adapter)).attach(spread)
    for options in ({"confadapt": 0.3}, {"verify": True}, {"mtp_k": 1}):
        expected, output = decode(model, rows, **options), decode(spread, rows, **options)
        assert torch.equal(output.sequences, expected.sequences)
        assert output.block_lengths == expected.block_lengths


# --- publication ------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tiny_model, tmp_path) -> Path:
    """A folder as it is uploaded: weights, configs, tokenizer and decoder."""
    model = tiny_model("llama")
    model.generation_config.update(confadapt=0.4, verify=True, allow_custom_entries=True)
    model.generation_config._from_model_config = False
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    shutil.copytree(
        Path(decoder.__file__).parent,
        tmp_path / "model" / "custom_generate",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path / "model"


def test_a_published_folder_decodes_alike(repository, tiny_model):
    model, rows = tiny_model("llama"), prompts()
    loaded = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)
    assert loaded.generation_config.confadapt == 0.4
    assert loaded.generation_config.verify is True
    assert loaded.config.mtp == model.config.mtp
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(loaded.generate(**padded(rows), **options), greedy(model, rows))
    torch.manual_seed(0)
    ours = decode(model, rows, confadapt=0.4, verify=False)
    theirs = loaded.generate(**padded(rows), verify=False, return_dict_in_generate=True, **options)
    assert torch.equal(theirs.sequences, ours.sequences)
    assert theirs.block_lengths == ours.block_lengths
    assert sys.modules[type(theirs).__module__].__file__ != decoder.__file__


def test_decoding_defaults_survive_another_round_trip(repository, tmp_path):
    AutoModelForCausalLM.from_pretrained(repository).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert saved["confadapt"] == 0.4
    assert saved["verify"] is True


def test_without_remote_code_the_folder_is_the_plain_model(repository, tiny_model):
    loaded, rows = AutoModelForCausalLM.from_pretrained(repository), prompts()
    plain = loaded.generate(**padded(rows), max_new_tokens=NEW, do_sample=False, suppress_tokens=BARRED)
    assert torch.equal(plain, greedy(tiny_model("llama"), rows))


def test_a_model_loaded_without_a_decoder_uses_that_of_a_folder(repository, tiny_model):
    """It is called with `custom_generate=FOLDER`."""
    model, rows = tiny_model("llama"), prompts()
    output = model.generate(
        **padded(rows), custom_generate=str(repository), trust_remote_code=True, confadapt=0.4, max_new_tokens=NEW,
        do_sample=False, tokenizer=AutoTokenizer.from_pretrained(repository),
    )  # fmt: skip
    assert torch.equal(output, decode(model, rows, confadapt=0.4).sequences)

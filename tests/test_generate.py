"""The decoder equals a naive loop without a cache and transformers' greedy decoding: blocks, caches and acceptance."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decoding_reference import (
    BARRED,
    CACHED,
    RECURRENT,
    UNCACHED,
    block_logits,
    decode,
    greedy,
    lengths_of,
    naive_loop,
    naive_verified_loop,
    prompts,
    texts,
    with_random_adapter,
)
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from transformers import (
    CompileConfig,
    DynamicCache,
)

from mtp_trl.custom_generate import forward, recurrent_forward
from mtp_trl.custom_generate.choice import ConfAdaptLogitsProcessor, accept_confident_prefix
from mtp_trl.custom_generate.probes import CACHE_NAMES


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
    with pytest.raises(ValueError, match=f"{CACHE_NAMES[0]}= needs a model with attention layers only"):
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

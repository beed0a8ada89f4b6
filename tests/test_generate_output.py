"""Scores, logits and the caller's cache are those of one token per pass."""

import pytest
import torch
import torch.distributed as dist
from decoding_reference import BARRED, PAD, StopsAtMultiple, block_logits, decode, greedy, padded, prompts, texts
from torch.distributed.fsdp import FSDPModule
from transformers import (
    DynamicCache,
    GenerationMixin,
)

from mtp_trl.custom_generate import forward_base
from mtp_trl.custom_generate.generate import generate
from mtp_trl.custom_generate.probes import CACHE_NAMES
from mtp_trl.custom_generate.sharding import ranks_wait_for_each_other


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
    again = generate(**batch, model=model, **{CACHE_NAMES[0]: past}, **options)  # its name in this version of transformers
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
            model(ids[:, :columns], attention_mask=mask[:, :columns], position_ids=positions, **{CACHE_NAMES[0]: past})
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
            ids = GenerationMixin.generate(model, **batch, **{CACHE_NAMES[0]: past}, **options)
        else:
            ids = generate(**batch, model=model, verify=True, past_key_values=past, **options)
        assert torch.equal(ids, expected[:, : 9 + new])
        batch = {"input_ids": ids, "attention_mask": torch.cat([padded(rows)["attention_mask"], torch.ones(3, new).long()], 1)}


def test_a_cache_that_does_not_fit_is_refused(tiny_model):
    model, past = tiny_model("llama"), DynamicCache()
    decode(model, prompts(2), past_key_values=past)
    with pytest.raises(ValueError, match=r"holds 2 rows of .* the prompts are 1 rows of 9"):
        decode(model, prompts(1), past_key_values=past)


def test_sharded_modules_are_found_wherever_they_are_in_the_model(tiny_model, monkeypatch):
    """accelerate shards the layers and not the model itself, which transformers' own check looks at."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    model = tiny_model("llama")
    assert not ranks_wait_for_each_other(model)
    layer = model.model.layers[1]
    layer.__class__ = type("FSDPLayer", (FSDPModule, type(layer)), {})  # as `fully_shard` does
    assert ranks_wait_for_each_other(model)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert not ranks_wait_for_each_other(model)


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

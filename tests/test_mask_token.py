"""The mask token: its embedding row, and what config.mtp records."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mtp_trl.modeling.mask_token import MASK_TOKEN, add_mask_token, chosen_mask_token


def build(tokens: int, rows: int, *, tied: bool = True, extra: tuple[str, ...] = ()):
    words = ["<s>", "</s>", *extra]
    words += [f"w{i}" for i in range(tokens - len(words))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0")),
        eos_token="</s>",
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_a_row_beyond_the_last_token_is_used(tied):
    model, tokenizer = build(100, 128, tied=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    mask_id = add_mask_token(model, tokenizer, k_max=8)
    after = model.get_input_embeddings().weight.detach()
    assert mask_id == tokenizer.convert_tokens_to_ids(MASK_TOKEN) == 100
    assert after.shape == before.shape
    unchanged = torch.arange(128) != mask_id
    assert torch.equal(after[unchanged], before[unchanged])
    assert not torch.equal(after[mask_id], before[mask_id])
    assert model.config.mtp == {
        "mask_token": MASK_TOKEN, "mask_token_id": 100, "k_max": 8, "barred_token_ids": [100], "base_vocab_size": 128,
    }  # fmt: skip
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_matrix_grows_to_a_multiple_of_64_and_every_new_row_is_barred(tied):
    model, tokenizer = build(128, 128, tied=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    head_before = model.get_output_embeddings().weight.detach().clone()
    mask_id = add_mask_token(model, tokenizer)
    assert mask_id == 128
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 192
    assert torch.equal(model.get_input_embeddings().weight[:128], before)
    assert torch.equal(model.get_output_embeddings().weight[:128], head_before)
    assert model.config.mtp["barred_token_ids"] == list(range(128, 192))
    assert model.config.mtp["base_vocab_size"] == 128


@pytest.mark.parametrize("reserved", ["<|reserved_special_token_{}|>", "<unused{}>"])
def test_a_full_matrix_uses_its_last_reserved_token(reserved):
    names = tuple(reserved.format(i) for i in (0, 2, 1))
    model, tokenizer = build(64, 64, extra=names)
    mask_id = add_mask_token(model, tokenizer)
    assert model.config.mtp["mask_token"] == reserved.format(2)
    assert mask_id == tokenizer.convert_tokens_to_ids(reserved.format(2)) == 3
    assert model.get_input_embeddings().weight.shape[0] == 64
    assert MASK_TOKEN not in tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("tokens", "rows", "extra", "named"),
    [(100, 128, (), "<|mtp|>"), (128, 128, (), "<|mtp|>"), (64, 64, ("<unused0>", "<unused1>"), "<|mtp|>"),
     (60, 64, ("<unused0>",), "<|mtp|>"), (64, 64, ("<unused0>", "<mine>"), "<mine>")],
)  # fmt: skip
def test_the_token_is_chosen_from_the_config_without_weights(tokens, rows, extra, named):
    model, tokenizer = build(tokens, rows, extra=extra)
    chosen = chosen_mask_token(model.config, tokenizer, mask_token=named)
    assert len(tokenizer) == tokens
    add_mask_token(model, tokenizer, mask_token=named)
    assert model.config.mtp["mask_token"] == chosen
    assert chosen_mask_token(model.config, tokenizer, mask_token="<other>") == chosen  # recorded by the call above


def test_the_row_has_the_mean_and_spread_of_the_rows_in_use():
    """Over many seeds, each dimension has the mean and standard deviation of the rows in use, not of spare rows."""
    rows = []
    for seed in range(300):
        model, tokenizer = build(100, 128)
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            weight[:100] += 3.0
            weight[101:] = 1000.0
        used = weight[:100].detach().clone()
        rows.append(weight[add_mask_token(model, tokenizer, seed=seed)].detach().clone())
    drawn = torch.stack(rows)
    standard_error = used.std(0) / len(rows) ** 0.5
    assert ((drawn.mean(0) - used.mean(0)).abs() < 5 * standard_error).all()
    assert ((drawn.std(0) / used.std(0)) - 1).abs().max() < 0.25


def test_a_second_call_changes_nothing_but_k_max():
    model, tokenizer = build(128, 128)
    first = add_mask_token(model, tokenizer, k_max=8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert add_mask_token(model, tokenizer, k_max=12, seed=5) == first
    assert len(tokenizer) == 129
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.config.mtp["k_max"] == 12


def test_equal_seeds_give_equal_rows():
    rows = []
    for seed in (1, 1, 2):
        model, tokenizer = build(100, 128, tied=False)
        mask_id = add_mask_token(model, tokenizer, seed=seed)
        rows.append(torch.cat([model.get_input_embeddings().weight[mask_id], model.lm_head.weight[mask_id]]))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_a_second_model_with_the_same_tokenizer_gets_the_same_row():
    """The student and the teacher, loaded from one checkpoint, are extended one after the other."""
    first, tokenizer = build(100, 128)
    second, _ = build(100, 128)
    mask_id = add_mask_token(first, tokenizer)
    assert add_mask_token(second, tokenizer) == mask_id
    assert torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)


def test_config_survives_saving(tmp_path):
    model, tokenizer = build(100, 128)
    add_mask_token(model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.mtp == model.config.mtp
    fresh = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert fresh.encode(f"w1{MASK_TOKEN}w2", add_special_tokens=False)[1] == 100

"""Packed and suffix layouts give the same logits as separate forward passes, on every supported architecture."""

import logging

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import OPTConfig, OPTForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mtp_trl.modeling import attention
from mtp_trl.modeling.attention import check_attention_backend, flex_attention_fault, take_flex_attention
from mtp_trl.modeling.checks import can_pack, check_output_logits, check_positions
from mtp_trl.modeling.logits import output_logits
from mtp_trl.training import readers
from mtp_trl.training.readers import check_layout, masks_of, read_rows
from mtp_trl.training.regions import Layout, Regions, pack_regions, row_generator, sample_regions, suffix_regions

K, SLOTS, MASK, PAD = 6, 18, 60, 2
PACKED = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss", "cohere", "granite"]
PACKED += ["llama4_text", "opt", "gemma3n_text", "gemma4_text"]
RECURRENT = ["falcon_h1", "qwen3_next", "granitemoehybrid", "gpt_neo", "openai-gpt", "recurrent_gemma"]  # and others


def texts_and_regions():
    lengths_B = torch.tensor([20, 13, 17])
    clean_BN = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(1))
    clean_BN = clean_BN.masked_fill(torch.arange(20) >= lengths_B[:, None], PAD)
    regions = sample_regions(
        [4, 3, 9],
        [18, 11, 15],
        k_min=2,
        k_max=K,
        slots=SLOTS,
        generators=[row_generator(0, 0, row) for row in range(3)],
    )
    return clean_BN, lengths_B, regions


def layout_for(model) -> Layout:
    clean_BN, lengths_B, regions = texts_and_regions()
    if can_pack(model):
        return pack_regions(clean_BN, lengths_B, regions, k_max=K, slots=SLOTS, mask_token_id=MASK)
    return suffix_regions(clean_BN, lengths_B, regions, k_max=K, mask_token_id=MASK, pad_token_id=PAD)


@torch.no_grad()
def largest_gap(model, layout: Layout) -> float:
    """Return the largest difference between the layout's logits and those of one forward pass per region."""
    clean_BN, _, regions = texts_and_regions()
    hidden = read_rows(model, layout, layout.ids_XT)
    logits = output_logits(model, hidden[layout.read_BRK.flatten()]).view(*layout.read_BRK.shape, -1)
    gap = 0.0
    for row, region in (regions.size_BR > 0).nonzero().tolist():
        anchor, size = int(regions.anchor_BR[row, region]), int(regions.size_BR[row, region])
        ids = torch.cat([clean_BN[row, : anchor + 1], torch.full((size - 1,), MASK)])
        separate = model(input_ids=ids[None]).logits[0, anchor:]
        gap = max(gap, (separate - logits[row, region, :size]).abs().max().item())
    return gap


@pytest.mark.parametrize("architecture", PACKED + RECURRENT)
def test_layout_equals_separate_forward_passes(tiny_model, architecture):
    model = tiny_model(architecture)
    assert can_pack(model) is (architecture in PACKED)
    layout = layout_for(model)
    assert largest_gap(model, layout) <= 1e-5


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_the_comparison_notices_a_wrong_mask(tiny_model, architecture):
    """Plain causal attention over the packed row lets regions see each other, so the logits must differ."""
    model = tiny_model(architecture)
    layout = layout_for(model)
    causal = torch.ones_like(layout.allowed_XTT).tril()
    wrong = Layout(**{**vars(layout), "allowed_XTT": causal})
    assert largest_gap(model, wrong) > 1e-3


@pytest.mark.parametrize("architecture", PACKED + RECURRENT)
def test_output_logits_equal_those_of_the_model(tiny_model, architecture):
    model = tiny_model(architecture)
    check_output_logits(model)
    assert not model.training


def test_unknown_logit_rules_are_refused(tiny_model):
    model = tiny_model("llama")
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output * (1 + inputs[0].ndim))
    with pytest.raises(ValueError, match="post-processes its logits"):
        check_output_logits(model)


def test_a_table_of_positions_that_slots_would_exceed_is_refused(tiny_model):
    """The last block fits into the table at the largest allowed length, but not at a length of one more."""
    longest = 32 - K + 2
    small_opt = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=32
    )
    for model in (tiny_model("gpt2", n_positions=32, max_position_embeddings=32), OPTForCausalLM(small_opt)):
        check_positions(model, max_length=longest, k_max=K)
        with pytest.raises(ValueError, match=f"need 33 positions, .* has 32; set max_length to {longest} or less"):
            check_positions(model, max_length=longest + 1, k_max=K)
        clean_BN = torch.randint(3, 60, (1, longest), generator=torch.Generator().manual_seed(1))
        regions = Regions(torch.tensor([[longest - 2]]), torch.tensor([[K]]))
        layout = pack_regions(clean_BN, torch.tensor([longest]), regions, k_max=K, slots=SLOTS, mask_token_id=MASK)
        assert layout.positions_XT.max() == 31
        read_rows(model, layout, layout.ids_XT)


@pytest.mark.parametrize("name", [*PACKED, "falcon_h1"])
def test_packed_rows_are_compared_with_separate_passes_before_training(tiny_model, monkeypatch, name):
    model = tiny_model(name)
    check_layout(model, MASK)
    if name == "falcon_h1":  # it uses one row per region
        return
    build = readers.attention_masks
    monkeypatch.setattr(readers, "attention_masks", lambda config, allowed, *rest: build(config, unmasked(allowed), *rest))
    with pytest.raises(ValueError, match="computes different hidden states for blocks that share a row"):
        check_layout(model, MASK)


@pytest.mark.parametrize("name", ["llama", "falcon_h1"])
def test_weights_with_nan_are_refused_as_such(tiny_model, name):
    model = tiny_model(name)
    model.get_input_embeddings().weight.data[3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"computes NaN .* in torch.float32 .* check its weights"):
        check_output_logits(model)


def test_a_packed_row_with_nan_is_refused_as_such(tiny_model, monkeypatch):
    """Only few positions are NaN, so their median is a number."""
    model, read = tiny_model("llama"), readers.read_rows

    def read_with_nan(*given):
        hidden = read(*given)
        hidden[-1] = torch.nan
        return hidden

    monkeypatch.setattr(readers, "read_rows", read_with_nan)
    with pytest.raises(ValueError, match=r"computes NaN for mask tokens, with attn_implementation='sdpa' in torch.float32"):
        check_layout(model, MASK)


def unmasked(allowed):
    """Return a plain causal mask, with which every slot sees the whole text."""
    return torch.ones_like(allowed).tril()


def test_computed_positions_have_no_limit(tiny_model):
    check_positions(tiny_model("llama"), max_length=10_000, k_max=K)


def test_flash_attention_is_refused_with_the_remedy(tiny_model):
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="sdpa"):
        check_attention_backend(model, torch.device("cpu"))


def test_eager_and_sdpa_give_equal_hidden_states(tiny_model):
    model = tiny_model("llama")
    layout = layout_for(model)
    outputs = []
    for backend in ("sdpa", "eager"):
        model.set_attn_implementation(backend)
        with torch.no_grad():
            outputs.append(read_rows(model, layout, layout.ids_XT)[layout.read_BRK[layout.drawn_BRK]])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch deprecates what transformers calls
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # compiling takes a minute
@torch.no_grad()
def test_flex_attention_with_block_masks_equals_sdpa(tiny_model):
    """The masks include regions and windows in positions. FlexAttention has no backward on CPUs, so only forward is tested."""
    model = tiny_model("mistral")
    layout = layout_for(model)
    read = layout.read_BRK[layout.drawn_BRK]
    hidden = {}
    for backend in ("sdpa", "flex_attention"):
        model.set_attn_implementation(backend)
        with torch.compiler.set_stance("force_eager"):
            hidden[backend] = read_rows(model, layout, layout.ids_XT)[read]
    assert isinstance(masks_of(model, layout), BlockMask)
    torch.testing.assert_close(hidden["flex_attention"], hidden["sdpa"], atol=2e-5, rtol=1e-4)


CUDA = torch.device("cuda")  # only a name; no test needs the device


@pytest.mark.parametrize(
    ("name", "tokens", "device", "fault", "taken"),
    [
        ("mistral", 512, CUDA, None, True), ("mistral", 511, CUDA, None, False), ("mistral", 512, CUDA, "slow", False),
        ("mistral", 512, torch.device("cpu"), None, False), ("falcon_h1", 512, CUDA, None, False),
        ("gemma2", 512, CUDA, None, False),  # eager by choice
    ],
)  # fmt: skip
def test_long_rows_on_cuda_use_flex_attention(tiny_model, monkeypatch, name, tokens, device, fault, taken):
    model = tiny_model(name)
    before = model.config._attn_implementation
    monkeypatch.setattr(attention, "flex_attention_fault", lambda *shape: fault)
    monkeypatch.setattr(attention, "logger", logging.getLogger("plain"))
    take_flex_attention(model, tokens, device)
    assert model.config._attn_implementation == ("flex_attention" if taken else before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch deprecates what transformers calls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trial_detects_whether_flex_attention_works(tiny_model, monkeypatch, dtype):
    """FlexAttention is replaced by SDPA with the same mask, which must pass, and by SDPA without a mask, which must fail."""
    config = tiny_model("mistral").config
    cpu, sdpa = torch.device("cpu"), ALL_ATTENTION_FUNCTIONS["sdpa"]
    build = attention._backend_mask
    monkeypatch.setattr(attention, "_backend_mask", lambda *options: build(*options[:-1], "sdpa"))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", sdpa)
    assert flex_attention_fault(config, dtype, cpu) is None
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", lambda *given, **named: sdpa(*given[:4], None, **named))
    assert "its output is off by" in str(flex_attention_fault(config, dtype, cpu))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch deprecates what transformers calls
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_fault_of_a_device_without_backward_is_one_line(tiny_model):
    with torch.compiler.set_stance("force_eager"):
        fault = flex_attention_fault(tiny_model("mistral").config, torch.float32, torch.device("cpu"))
    assert fault is not None
    assert "backward" in fault
    assert "\n" not in fault


def test_flex_attention_that_fails_its_trial_is_refused_with_the_remedy(tiny_model, monkeypatch):
    model = tiny_model("mistral")
    model.set_attn_implementation("flex_attention")
    monkeypatch.setattr(attention, "flex_attention_fault", lambda *shape: None)
    check_attention_backend(model, CUDA)
    monkeypatch.setattr(attention, "flex_attention_fault", lambda *shape: "its dq is off by 90%.")
    with pytest.raises(ValueError, match=r"cannot train this model on cuda; .*'sdpa'\. The cause: its dq is off by 90%"):
        check_attention_backend(model, CUDA)

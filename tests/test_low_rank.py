"""The fused low-rank updates of decoding, against the updates computed one layer at a time."""

import copy

import pytest
import torch
from decoding_reference import with_random_adapter

from mtp_trl.custom_generate.low_rank import FusedUpdates


def logits(model, *, rows: int, width: int, masks: int) -> torch.Tensor:
    ids = torch.randint(3, 50, (rows, width), generator=torch.Generator().manual_seed(rows + width))
    with torch.no_grad(), model.mtp_adapter.acting_on(masks):
        return model(input_ids=ids).logits


@pytest.fixture
def unfused(monkeypatch):
    """Return a function that turns a model's fused updates into one update after another."""

    def apply(model):
        fused = model.mtp_adapter._fused

        def add(index, output, x):
            fused.updates[index](output[:, fused.text :], x[:, fused.text :])

        monkeypatch.setattr(fused, "add", add)
        return model

    return apply


@pytest.mark.parametrize("masks", [7, 12])  # mostly text, mostly masks, and masks only
@pytest.mark.parametrize("width", [12, 20])
@pytest.mark.parametrize("rows", [1, 3])
def test_fused_updates_equal_one_update_per_layer(tiny_model, unfused, rows, width, masks):
    model = with_random_adapter(tiny_model("llama"))
    shape = {"rows": rows, "width": width, "masks": masks}
    first, later = logits(model, **shape), logits(model, **shape)  # the first pass finds the layers that share an input
    expected = logits(unfused(model), **shape)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(later, expected, rtol=1e-5, atol=1e-5)


def test_layers_that_read_the_same_input_share_a_product(tiny_model):
    model = with_random_adapter(tiny_model("llama"))
    logits(model, rows=1, width=8, masks=7)
    fused, names = model.mtp_adapter._fused, model.mtp_adapter.names
    groups = {tuple(names[index].split(".", 3)[-1] for index in group) for group in fused.groups if len(group) > 1}
    assert groups == {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    }
    assert fused.input is None  # released after the pass


def test_a_layer_of_a_group_with_another_input_gets_its_own_product():
    """Groups are only observed, so every pass has to compare the inputs."""
    from mtp_trl.custom_generate.low_rank import LowRankUpdate

    updates = [LowRankUpdate(4, 6, rank=2, scale=0.5) for _ in range(2)]
    for update in updates:
        torch.nn.init.normal_(update.lora_A)
        torch.nn.init.normal_(update.lora_B)
    fused = FusedUpdates(updates)
    same, other = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    with torch.no_grad():
        for second in (same, other):
            fused.start_pass(same, masks=3)
            outputs = [torch.randn(1, 5, 6) for _ in updates]
            expected = [output.clone() for output in outputs]
            for index, x in enumerate((same, second)):
                fused.add(index, outputs[index], x)
                updates[index](expected[index][:, 2:], x[:, 2:])
            torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize("change", ["in place", "new data", "new dtype"])
def test_fused_weights_follow_the_adapter_s_weights(tiny_model, unfused, change):
    model = with_random_adapter(tiny_model("llama"))
    shape = {"rows": 1, "width": 8, "masks": 7}
    before = [logits(model, **shape) for _ in range(2)][1]
    for update in model.mtp_adapter.updates:
        if change == "in place":
            with torch.no_grad():
                update.lora_B.mul_(2)
        else:
            update.lora_B.data = (update.lora_B.data * 2).to(torch.float64 if change == "new dtype" else torch.float32)
    after = logits(model, **shape)
    assert (after - before).abs().max() > 1e-3
    for update in model.mtp_adapter.updates:
        update.lora_B.data = update.lora_B.data.float()
    torch.testing.assert_close(after, logits(unfused(model), **shape), rtol=1e-5, atol=1e-5)


def test_fused_updates_of_a_bfloat16_base_are_as_close_to_float32_as_unfused_ones(tiny_model, unfused):
    exact = with_random_adapter(tiny_model("llama"))
    model = copy.deepcopy(exact).to(torch.bfloat16)
    shape = {"rows": 2, "width": 8, "masks": 7}
    expected = logits(exact, **shape)
    fused_error = (logits(model, **shape).float() - expected).abs().mean()
    unfused_error = (logits(unfused(model), **shape).float() - expected).abs().mean()
    assert 0 < fused_error < 1.2 * unfused_error


def test_text_columns_stay_bit_for_bit_the_base_s(tiny_model):
    model = with_random_adapter(tiny_model("llama"))
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for update in model.mtp_adapter.updates:
            torch.nn.init.normal_(update.lora_B, std=100.0)
        for _ in range(2):
            with model.mtp_adapter.acting_on(3):
                output = model(input_ids=ids).logits
            assert torch.equal(output[:, :6], expected[:, :6])
            assert not torch.isclose(output[:, 6:], expected[:, 6:]).all(-1).any()


def test_a_pass_with_gradients_after_one_without_is_not_fused(tiny_model):
    model = with_random_adapter(tiny_model("llama"))
    ids = torch.randint(3, 50, (1, 8), generator=torch.Generator().manual_seed(0))
    with model.mtp_adapter.acting_on(4):
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        output = model(input_ids=ids).logits
    output.sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert all(update.lora_B.grad.abs().sum() > 0 for update in model.mtp_adapter.updates)

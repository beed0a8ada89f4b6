"""MuonAdamW: against torch's optimizers, and with schedulers, checkpoints and accelerate."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_trl.training.optimizer import MuonAdamW, muon_adamw, orthogonalise


class Net(nn.Module):
    """Wide, tall and square matrices, an embedding and vectors."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.wide, self.tall, self.square = nn.Linear(6, 4), nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return self.square(self.tall(self.wide(self.embedding(ids)).tanh()))


def net():
    torch.manual_seed(0)
    return Net()


def backward(model, step):
    ids = torch.arange(5) + step
    model.zero_grad()
    model(ids).square().sum().backward()


def tiny_llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 4, 9)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_equals_torch_muon_and_torch_adamw():
    ours, theirs = net(), net()
    optimizer = muon_adamw(ours, lr=0.01, momentum=0.9, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    matrices = [theirs.wide.weight, theirs.tall.weight, theirs.square.weight]
    others = [theirs.embedding.weight, theirs.wide.bias, theirs.tall.bias, theirs.square.bias]
    muon = torch.optim.Muon(matrices, lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)
    for step in range(3):
        for model in (ours, theirs):
            backward(model, step)
        optimizer.step()
        muon.step()
        adamw.step()
    for (name, mine), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # torch's Newton-Schulz runs in bfloat16, ours in float32
        tolerance = 2e-3 if name.split(".")[0] in ("wide", "tall", "square") and mine.ndim == 2 else 2e-4
        torch.testing.assert_close(mine, reference, atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_heads_use_adamw(tied):
    model = tiny_llama(tied)
    muon, adamw = muon_adamw(model, lr=0.1).param_groups
    assert all(p.ndim == 2 for p in muon["params"])
    in_muon = {id(p) for p in muon["params"]}
    assert id(model.get_input_embeddings().weight) not in in_muon
    assert id(model.get_output_embeddings().weight) not in in_muon
    assert id(model.model.layers[0].self_attn.q_proj.weight) in in_muon
    assert len(muon["params"]) + len(adamw["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = net()
    model.wide.requires_grad_(False)
    chosen = {id(p) for group in muon_adamw(model, lr=0.1).param_groups for p in group["params"]}
    assert chosen == {id(p) for p in model.parameters() if p.requires_grad}


def test_parameters_without_a_gradient_are_unchanged():
    model = net()
    before = copy.deepcopy(model.state_dict())
    optimizer = muon_adamw(model, lr=0.1)
    model.square.weight.grad = torch.ones_like(model.square.weight)
    optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["square.weight"]


def test_weight_decay_moves_matrices_only():
    model = net()
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    muon_adamw(model, lr=0.5, weight_decay=0.1).step()
    for name, value in model.state_dict().items():
        factor = 0.95 if name in ("wide.weight", "tall.weight", "square.weight") else 1.0
        torch.testing.assert_close(value, before[name] * factor)


def test_an_optimizer_loaded_from_a_state_dict_takes_the_same_steps(tmp_path):
    uninterrupted = net()
    optimizer = muon_adamw(uninterrupted, lr=0.05)
    for step in range(2):
        backward(uninterrupted, step)
        optimizer.step()
    torch.save({"model": uninterrupted.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt")
    resumed = net()
    resumed.load_state_dict(saved["model"])
    loaded = muon_adamw(resumed, lr=0.7)
    loaded.load_state_dict(saved["optimizer"])
    for model, model_optimizer in ((uninterrupted, optimizer), (resumed, loaded)):
        backward(model, 2)
        model_optimizer.step()
    for mine, reference in zip(resumed.parameters(), uninterrupted.parameters(), strict=True):
        assert torch.equal(mine, reference)


def test_a_scheduler_changes_both_learning_rates():
    model = net()
    optimizer = muon_adamw(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    backward(model, 0)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_it_takes_the_same_step_when_wrapped_by_accelerate():
    accelerator = Accelerator(cpu=True)
    model = net()
    plain = net()
    wrapped = accelerator.prepare(muon_adamw(model, lr=0.1))
    reference = muon_adamw(plain, lr=0.1)
    for network, optimizer in ((model, wrapped), (plain, reference)):
        backward(network, 0)
        optimizer.step()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_closure_is_evaluated_with_gradients():
    model = net()
    optimizer = muon_adamw(model, lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.arange(3)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_bfloat16_parameters_stay_bfloat16():
    model = net().to(torch.bfloat16)
    backward(model, 0)
    muon_adamw(model, lr=0.1).step()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": -1.0}, "lr must be >= 0"), ({"lr": 0.1, "momentum": 1.0}, "momentum must be in")],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        muon_adamw(net(), **options)


def test_flattened_parameters_are_refused():
    with pytest.raises(ValueError, match=r"2-D weights, got a parameter of shape \(12,\).*ZeRO-3"):
        MuonAdamW([nn.Parameter(torch.zeros(12))], [], lr=0.1)

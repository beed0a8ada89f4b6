"""Losses, the EOS rule and block statistics against plain loops."""

import math

import pytest
import torch

from mtp_trl.training.objective import (
    OBJECTIVES,
    bar_tokens,
    block_metrics,
    block_sums,
    kl_divergence,
    position_losses,
    positions_with_loss,
)

V, BARRED = 7, torch.tensor([5, 6])


def logits(seed: int) -> torch.Tensor:
    return bar_tokens(torch.randn(4, V, generator=torch.Generator().manual_seed(seed)) * 3, BARRED)


def naive_loss(objective: str, student: torch.Tensor, teacher: torch.Tensor, rollout: int, target: int) -> float:
    p = [math.exp(x) for x in student.tolist()]
    q = [math.exp(x) for x in teacher.tolist()]
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    allowed = [v for v in range(V) if v not in BARRED.tolist()]
    return {
        "hard": -math.log(p[target]),
        "ground_truth": -math.log(p[target]),
        "soft": sum(q[v] * (math.log(q[v]) - math.log(p[v])) for v in allowed),
        "reward": -sum(p[v] * max(math.log(q[v]), -20.0) for v in allowed),
        "reward_literal": -q[rollout] * math.log(p[rollout]),
    }[objective]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_equals_its_formula(objective):
    student, teacher = logits(0), logits(1)
    rollout, target = student.argmax(-1), teacher.argmax(-1)
    losses = position_losses(student.log_softmax(-1), teacher.log_softmax(-1), rollout, target, objective=objective)
    for position in range(4):
        ids = int(rollout[position]), int(target[position])
        expected = naive_loss(objective, student[position], teacher[position], *ids)
        assert losses[position].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_barred_tokens_give_no_nan_in_value_or_gradient(objective):
    raw = torch.randn(4, V, requires_grad=True)
    student = bar_tokens(raw, BARRED)
    logs = student.log_softmax(-1), logits(1).log_softmax(-1)
    losses = position_losses(*logs, student.argmax(-1), torch.tensor([0, 1, 2, 3]), objective=objective)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(raw.grad).all()
    assert (raw.grad[:, BARRED] == 0).all()
    assert (raw.grad != 0).any()


def test_reward_gradient_is_the_expected_policy_gradient():
    """The gradient equals the exact expectation E[R grad log p] over all tokens, without a baseline."""
    raw = torch.randn(1, V, requires_grad=True)
    teacher = logits(3)[:1]
    student_log, teacher_log = bar_tokens(raw, BARRED).log_softmax(-1), teacher.log_softmax(-1)
    position_losses(student_log, teacher_log, torch.tensor([0]), torch.tensor([0]), objective="reward").sum().backward()
    policy = torch.zeros(V)
    reward = teacher.log_softmax(-1)[0].clamp(min=-20.0)
    for token in range(5):
        fresh = raw.detach().clone().requires_grad_()
        log_p = bar_tokens(fresh, BARRED).log_softmax(-1)[0, token]
        log_p.backward()
        policy -= log_p.exp().detach() * reward[token] * fresh.grad[0]
    torch.testing.assert_close(raw.grad[0], policy, atol=1e-5, rtol=1e-4)


def test_kl_between_equal_distributions_is_zero():
    log_p = logits(0).log_softmax(-1)
    assert kl_divergence(log_p, log_p).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("rollout", "target", "expected"),
    [
        ([3, 3, 3, 3], [3, 3, 3, 3], [1, 1, 1, 1]),
        ([3, 1, 3, 3], [3, 3, 3, 3], [1, 1, 0, 0]),  # the rollout ends too early
        ([3, 3, 3, 3], [3, 9, 3, 3], [1, 1, 0, 0]),  # the target ends, with the second EOS id
        ([1, 1, 1, 1], [3, 1, 1, 1], [1, 0, 0, 0]),  # a rollout of only EOS carries loss at its first position only
    ],
)
def test_a_block_carries_loss_up_to_and_including_its_first_eos(rollout, target, expected):
    drawn = torch.ones(1, 1, 4, dtype=torch.bool)
    valid = positions_with_loss(torch.tensor([[rollout]]), torch.tensor([[target]]), drawn, eos_ids=torch.tensor([1, 9]))
    assert valid[0, 0].int().tolist() == expected


def test_eos_at_an_undrawn_position_does_not_end_the_loss():
    drawn = torch.tensor([[[True, False, True]]])
    ids = torch.tensor([[[3, 1, 3]]])
    assert positions_with_loss(ids, ids, drawn, eos_ids=torch.tensor([1])).tolist() == drawn.tolist()


def test_block_statistics_equal_a_plain_count():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(2, 3, 4, generator=generator)
    agree = torch.rand(2, 3, 4, generator=generator) > 0.5
    reward = -torch.rand(2, 3, 4, generator=generator)
    valid = torch.tensor([[[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]] * 2).bool()
    metrics = block_metrics(block_sums(confidence, agree, reward, valid, thresholds=[0.3]), thresholds=[0.3])
    positions = [(b, r, k) for b in range(2) for r in range(3) for k in range(4) if valid[b, r, k]]
    assert metrics["reward"] == pytest.approx(sum(reward[p].item() for p in positions) / len(positions))
    second = [p for p in positions if p[2] == 1]
    assert metrics["agreement/place_2"] == pytest.approx(sum(agree[p].item() for p in second) / len(second))
    assert metrics["confidence/place_2"] == pytest.approx(sum(confidence[p].item() for p in second) / len(second))
    survival, expected = 1.0, 1.0
    for position in range(4):
        reached = [
            (b, r)
            for b in range(2)
            for r in range(3)
            if valid[b, r, position] and all(confidence[b, r, j] >= 0.3 for j in range(position))
        ]
        accepted = sum(bool(confidence[b, r, position] >= 0.3) for b, r in reached)
        survival *= accepted / len(reached) if reached else 0.0
        expected += survival if position else 0.0
    assert metrics["acceleration/confadapt_0.3"] == pytest.approx(expected)
    assert 1.0 < expected < 4.0


def test_sums_of_two_halves_add_up_to_the_whole():
    confidence = torch.rand(4, 3, 4)
    agree, reward, valid = confidence > 0.5, -confidence, torch.rand(4, 3, 4) > 0.2
    whole = block_sums(confidence, agree, reward, valid, thresholds=[0.4])
    halves = [block_sums(confidence[h], agree[h], reward[h], valid[h], thresholds=[0.4]) for h in (slice(0, 2), slice(2, 4))]
    for name, value in whole.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], value)


def test_eos_in_the_rollout_does_not_end_the_loss_if_the_text_is_the_target():
    """The rule exists because the teacher reads the rollout. The text itself continues."""
    drawn, text = torch.ones(1, 1, 4, dtype=torch.bool), torch.tensor([[[3, 5, 1, 3]]])
    assert positions_with_loss(None, text, drawn, eos_ids=torch.tensor([1]))[0, 0].int().tolist() == [1, 1, 1, 0]

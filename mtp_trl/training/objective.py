"""Student-forced losses, rollout rewards and block statistics. Pure tensor functions; no model, no I/O.

Names follow arXiv 2602.06019: y' is the rollout (the student's argmax block), and p_teacher reads prefix + y'.
"""

# Shapes: B rows of the batch, K positions of a block, P positions read, R regions of a row, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

OBJECTIVES = ("hard", "soft", "reward", "reward_literal", "ground_truth")


def bar_tokens(logits: Tensor, barred_ids: Tensor) -> Tensor:
    """Return logits [..., V] in float32 with -inf at the barred ids (mask token and padding rows). Apply before any softmax."""
    return logits.float().index_fill(-1, barred_ids, float("-inf"))


def position_losses(
    student_log_PV: Tensor,
    teacher_log_PV: Tensor | None,
    rollout_P: Tensor,
    target_P: Tensor,
    *,
    objective: str,
    floor: float = -20.0,
) -> Tensor:
    """Return the loss of each position in nats. Gradient flows only through the student's log-probabilities.

    Args:
        student_log_PV, teacher_log_PV: float32 log-probabilities, -inf at barred tokens; the teacher's may be None for `hard`
            and `ground_truth`.
        rollout_P: the student's token y'.
        target_P: the teacher's argmax, or the token of the text for `ground_truth`.
        objective: one of `OBJECTIVES`.
        floor: smallest teacher log-probability that `reward` uses.

    Returns:
        float32 [P].
    """
    if objective in ("hard", "ground_truth"):
        return torch.nn.functional.nll_loss(student_log_PV, target_P, reduction="none")
    assert teacher_log_PV is not None
    if objective == "soft":
        return kl_divergence(teacher_log_PV, student_log_PV)
    if objective == "reward":
        return -(student_log_PV.exp() * teacher_log_PV.clamp(min=floor)).sum(-1)
    reward_P = teacher_log_PV.gather(-1, rollout_P[:, None]).squeeze(-1).exp()
    return -reward_P * student_log_PV.gather(-1, rollout_P[:, None]).squeeze(-1)


def kl_divergence(teacher_log_PV: Tensor, student_log_PV: Tensor) -> Tensor:
    """Return KL(teacher, student) per position, float32 [P]. Both log-probabilities may be -inf at barred tokens."""
    possible = torch.isfinite(teacher_log_PV)  # 0 times -inf is NaN, in value and in gradient
    gap = teacher_log_PV.masked_fill(~possible, 0.0) - student_log_PV.masked_fill(~possible, 0.0)
    return (teacher_log_PV.exp() * gap).sum(-1)


def positions_with_loss(rollout_BRK: Tensor | None, target_BRK: Tensor, drawn_BRK: Tensor, *, eos_ids: Tensor) -> Tensor:
    """Return which positions carry loss: those up to and including the first EOS of the rollout or of the target.

    The rollout has to be included, or else a student that predicts EOS everywhere would be rewarded: a teacher that reads
    the student's EOS predicts EOS again. If the targets are the tokens of the text, there is no such reward; pass None as
    the rollout.
    """
    ends_BRK = torch.isin(target_BRK, eos_ids) & drawn_BRK
    if rollout_BRK is not None:
        ends_BRK |= torch.isin(rollout_BRK, eos_ids) & drawn_BRK
    ended_before_BRK = ends_BRK.cumsum(-1) - ends_BRK.long() > 0
    return drawn_BRK & ~ended_before_BRK


def position_weights(size: int, decay: float) -> Tensor:
    """Return the weight decay ** (j - 1) of each position j = 1..K of a block in the loss, float32 [K]."""
    return decay ** torch.arange(size, dtype=torch.float)


def block_sums(
    confidence_BRK: Tensor,
    agree_BRK: Tensor,
    reward_BRK: Tensor | None,
    valid_BRK: Tensor,
    *,
    thresholds: list[float],
) -> dict[str, Tensor]:
    """Return sums that can be added over micro-batches and ranks, and that `block_metrics` turns into logs.

    Args:
        confidence_BRK: the student's probability of its own token.
        agree_BRK: whether the student's token is the target.
        reward_BRK: the teacher's log-likelihood of the student's token (nats); None if no teacher ran.
        valid_BRK: positions that carry loss.
        thresholds: ConfAdapt thresholds for which tokens per pass are estimated.
    """
    valid = valid_BRK.float()
    sums = {
        "positions_K": valid.sum((0, 1)),
        "agree_K": (agree_BRK & valid_BRK).sum((0, 1)).float(),
        "confidence_K": (confidence_BRK * valid).sum((0, 1)),
    }
    if reward_BRK is not None:
        sums["reward"] = reward_BRK.masked_fill(~valid_BRK, 0.0).sum()
        sums["reward_positions"] = valid.sum()
    for threshold in thresholds:
        accepted_BRK = (confidence_BRK >= threshold) & valid_BRK
        reached_BRK = accepted_BRK.long().cumprod(-1).bool()
        at_risk_BRK = valid_BRK.clone()
        at_risk_BRK[..., 1:] &= reached_BRK[..., :-1]
        sums[f"at_risk_K@{threshold}"] = at_risk_BRK.sum((0, 1)).float()
        sums[f"accepted_K@{threshold}"] = (at_risk_BRK & accepted_BRK).sum((0, 1)).float()
    return sums


def block_metrics(sums: dict[str, Tensor], *, thresholds: list[float]) -> dict[str, float]:
    """Compute logs from `block_sums`: reward per token, agreement and confidence by position, expected tokens per pass.

    Blocks have random sizes and end at EOS, so their accepted lengths are censored. The expectation therefore uses the
    product-limit (Kaplan-Meier) estimate of "still accepted at position j". The first token is always accepted.
    """
    positions_K = sums["positions_K"]
    metrics: dict[str, float] = {}
    if "reward" in sums:
        metrics["reward"] = float(sums["reward"] / sums["reward_positions"].clamp(min=1))
    for index, count in enumerate(positions_K.tolist()):
        if count:
            metrics[f"agreement/place_{index + 1}"] = float(sums["agree_K"][index]) / count
            metrics[f"confidence/place_{index + 1}"] = float(sums["confidence_K"][index]) / count
    for threshold in thresholds:
        at_risk_K, accepted_K = sums[f"at_risk_K@{threshold}"], sums[f"accepted_K@{threshold}"]
        survival_K = (accepted_K / at_risk_K.clamp(min=1)).cumprod(-1)
        metrics[f"acceleration/confadapt_{threshold}"] = 1.0 + float(survival_K[1:].sum())
    if sums.get("drift_positions"):
        metrics["drift/kl"] = float(sums["drift_kl"] / sums["drift_positions"])
        metrics["drift/agreement"] = float(sums["drift_agree"] / sums["drift_positions"])
    return metrics

"""Student-forced losses, rollout rewards and block statistics. Pure tensors; no model, no I/O.

Names follow arXiv 2602.06019: y' is the rollout (the student's own argmax block), p_teacher reads prefix + y'.
"""

# Shapes: B rows of the batch, K positions of a block, P positions read, R regions of a row, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

OBJECTIVES = ("hard", "soft", "reward", "reward_literal", "ground_truth")


def bar_tokens(logits: Tensor, barred_ids: Tensor) -> Tensor:
    """Logits [..., V] in float32 with -inf at the mask token and the padding rows, before any softmax."""
    return logits.float().index_fill(-1, barred_ids, float("-inf"))


def position_losses(
    student_PV: Tensor,
    teacher_PV: Tensor | None,
    rollout_P: Tensor,
    target_P: Tensor,
    *,
    objective: str,
    floor: float = -20.0,
) -> Tensor:
    """The loss of each place (nats), student logits with gradient, everything else without (method section 2).

    Args:
        student_PV, teacher_PV: barred float32 logits; the teacher's may be None for `hard` and `ground_truth`.
        rollout_P: the student's token y'.
        target_P: argmax of the teacher, or the text's own token for `ground_truth`.
        floor: smallest teacher log-probability that `reward` uses.

    Returns:
        float32 [P].
    """
    if objective in ("hard", "ground_truth"):
        return torch.nn.functional.cross_entropy(student_PV, target_P, reduction="none")
    assert teacher_PV is not None
    student_log_PV, teacher_log_PV = student_PV.log_softmax(-1), teacher_PV.log_softmax(-1)
    if objective == "soft":
        return kl_divergence(teacher_log_PV, student_log_PV)
    if objective == "reward":
        return -(student_log_PV.exp() * teacher_log_PV.clamp(min=floor)).sum(-1)
    reward_P = teacher_log_PV.gather(-1, rollout_P[:, None]).squeeze(-1).exp()
    return -reward_P * student_log_PV.gather(-1, rollout_P[:, None]).squeeze(-1)


def kl_divergence(teacher_log_PV: Tensor, student_log_PV: Tensor) -> Tensor:
    """KL(teacher, student) per place from log-probabilities that may both be -inf at barred tokens: float32 [P]."""
    possible = torch.isfinite(teacher_log_PV)  # 0 times -inf is NaN, in value and in gradient
    gap = teacher_log_PV.masked_fill(~possible, 0.0) - student_log_PV.masked_fill(~possible, 0.0)
    return (teacher_log_PV.exp() * gap).sum(-1)


def positions_with_loss(rollout_BRK: Tensor | None, target_BRK: Tensor, drawn_BRK: Tensor, *, eos_ids: Tensor) -> Tensor:
    """A block carries loss through the first position where the rollout OR the target ends the text, and none after it.

    Without the rollout's side of the rule a student that answers end-of-text everywhere would be rewarded for it: after
    its own EOS the teacher sees EOS and says EOS again. Where the targets are the text's own tokens, whatever the student
    said, there is no such reward: then pass None as the rollout.
    """
    ends_BRK = torch.isin(target_BRK, eos_ids) & drawn_BRK
    if rollout_BRK is not None:
        ends_BRK |= torch.isin(rollout_BRK, eos_ids) & drawn_BRK
    ended_before_BRK = ends_BRK.cumsum(-1) - ends_BRK.long() > 0
    return drawn_BRK & ~ended_before_BRK


def position_weights(places: int, decay: float) -> Tensor:
    """How much place j = 1..K of a block counts in the loss, decay ** (j - 1): float32 [K]."""
    return decay ** torch.arange(places, dtype=torch.float)


def block_sums(
    confidence_BRK: Tensor,
    agree_BRK: Tensor,
    reward_BRK: Tensor | None,
    valid_BRK: Tensor,
    *,
    thresholds: list[float],
) -> dict[str, Tensor]:
    """Sums that add up over micro-batches and ranks, to be turned into logs by `block_metrics`.

    Args:
        confidence_BRK: student probability of its own token.
        agree_BRK: the student's token is the teacher's argmax.
        reward_BRK: teacher log-likelihood of the student's token (nats); None where no teacher ran.
        valid_BRK: places that carry loss.
        thresholds: ConfAdapt thresholds whose acceleration is estimated.
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
    """Logs from `block_sums`: reward per token, agreement and confidence by place, expected tokens per pass.

    Blocks are drawn with random sizes and end at EOS, so their accepted lengths are censored: the expectation uses the
    product-limit (Kaplan-Meier) estimate of "still accepted at place j"; one token is always accepted.
    """
    positions_K = sums["positions_K"]
    metrics: dict[str, float] = {}
    if "reward" in sums:
        metrics["reward"] = float(sums["reward"] / sums["reward_positions"].clamp(min=1))
    for place, count in enumerate(positions_K.tolist()):
        if count:
            metrics[f"agreement/place_{place + 1}"] = float(sums["agree_K"][place]) / count
            metrics[f"confidence/place_{place + 1}"] = float(sums["confidence_K"][place]) / count
    for threshold in thresholds:
        at_risk_K, accepted_K = sums[f"at_risk_K@{threshold}"], sums[f"accepted_K@{threshold}"]
        survival_K = (accepted_K / at_risk_K.clamp(min=1)).cumprod(-1)
        metrics[f"acceleration/confadapt_{threshold}"] = 1.0 + float(survival_K[1:].sum())
    if sums.get("drift_positions"):
        metrics["drift/kl"] = float(sums["drift_kl"] / sums["drift_positions"])
        metrics["drift/agreement"] = float(sums["drift_agree"] / sums["drift_positions"])
    return metrics

"""One self-distillation pass: student block, rollout, teacher, loss and statistics.

The order of operations (arXiv 2602.06019, sections 2 and 3):

    append masks to the text -> student forward -> y' = argmax at every position -> teacher reads the text with y' in the slots
    -> loss at every position of a block up to and including its first EOS

The output head is applied only to the positions that are read, in chunks. If there are several, backward recomputes the logits
of each chunk. Therefore at most `logits_chunk_size` x vocabulary logits of each model exist at one time.
"""

# Shapes: B rows of the batch, H hidden features, K positions of a block, N clean tokens of a row, P positions read,
# R regions of a row, V vocabulary

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..modeling.checks import can_pack
from ..modeling.logits import output_logits
from .config import MTPDistillConfig
from .objective import bar_tokens, block_sums, kl_divergence, position_losses, position_weights, positions_with_loss
from .readers import Reader
from .regions import Layout, Regions, pack_regions, student_forced_ids, suffix_regions


@dataclass(frozen=True)
class Batch:
    """Right-padded texts, the lengths of their prompts and of the whole texts, and the regions drawn on them."""

    clean_BN: Tensor
    prompt_lengths_B: Tensor
    lengths_B: Tensor
    regions: Regions


@dataclass(frozen=True)
class Tokens:
    """Token ids that the objective needs.

    Attributes:
        mask_id: the mask token.
        pad_id: the padding token.
        barred: ids that are never emitted.
        eos: ids that end a text.
    """

    mask_id: int
    pad_id: int
    barred: Tensor
    eos: Tensor


@dataclass
class PassOutput:
    """Local sums of one micro-batch.

    Attributes:
        loss: weighted sum of the losses of all positions that carry loss, with gradient.
        weight: sum of the weights of all drawn positions.
        prefix_kl: sum of KL(teacher, student) over the compared clean positions, with gradient if `ntp_coef` is positive.
        sums: statistics that can be added over micro-batches and ranks.
    """

    loss: Tensor
    weight: Tensor
    prefix_kl: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


def build_layout(model: PreTrainedModel, batch: Batch, tokens: Tokens, args: MTPDistillConfig) -> Layout:
    """Return packed rows if the architecture allows them, else one row per region."""
    if can_pack(model):
        return pack_regions(
            batch.clean_BN,
            batch.lengths_B,
            batch.regions,
            k_max=args.k_max,
            slots=args.slots_per_row,
            mask_token_id=tokens.mask_id,
        )
    return suffix_regions(
        batch.clean_BN,
        batch.lengths_B,
        batch.regions,
        k_max=args.k_max,
        mask_token_id=tokens.mask_id,
        pad_token_id=tokens.pad_id,
    )


def distillation_pass(reader: Reader, batch: Batch, tokens: Tokens, args: MTPDistillConfig, *, objective: str) -> PassOutput:
    """Compute loss and statistics of one micro-batch. `objective` is `args.objective`, or `ground_truth` during warm-up."""
    student = reader.student
    layout = build_layout(student, batch, tokens, args)
    hidden = reader.read_student(layout)
    read_P = layout.read_BRK[layout.drawn_BRK]
    student_PH = hidden[read_P]
    one_chunk = len(student_PH) <= args.logits_chunk_size
    student_log_PV = _log_probabilities(student, student_PH, tokens) if one_chunk else None
    rollout_P, confidence_P, entropy = _rollout(student, student_PH, student_log_PV, tokens, args.logits_chunk_size)
    rollout_BRK = _scatter(rollout_P, layout.drawn_BRK)
    teacher_hidden = reader.read_teacher(layout, student_forced_ids(layout, rollout_BRK))

    truth_BRK, in_text_BRK = _ground_truth(batch, layout)
    losses_P, target_P, reward_P = _losses(
        reader,
        student_PH,
        student_log_PV,
        None if teacher_hidden is None else teacher_hidden[read_P],
        rollout_P,
        truth_BRK[layout.drawn_BRK],
        tokens,
        args,
        objective,
    )

    target_BRK = _scatter(target_P, layout.drawn_BRK)
    counted_BRK = layout.drawn_BRK & in_text_BRK if objective == "ground_truth" else layout.drawn_BRK
    # If the target is the text, it continues after a rollout that ends too early, so EOS of the rollout does not count.
    ending_rollout = None if objective == "ground_truth" else rollout_BRK
    valid_BRK = positions_with_loss(ending_rollout, target_BRK, counted_BRK, eos_ids=tokens.eos)
    weight_BRK = layout.drawn_BRK * position_weights(args.k_max, args.place_decay).to(losses_P.device)
    weight_BRK[..., 0] *= not reader.base_reads_text
    loss = torch.where(valid_BRK[layout.drawn_BRK], losses_P * weight_BRK[layout.drawn_BRK], 0.0).sum()
    output = PassOutput(loss=loss, weight=weight_BRK.sum(), prefix_kl=loss.new_zeros(()))
    output.sums = block_sums(
        _scatter(confidence_P, layout.drawn_BRK),
        rollout_BRK == target_BRK,
        _scatter(reward_P, layout.drawn_BRK) if reward_P is not None else None,
        positions_with_loss(rollout_BRK, target_BRK, counted_BRK, eos_ids=tokens.eos),  # decoding ends at the rollout's EOS
        thresholds=args.thresholds,
    )
    output.sums["entropy"] = entropy
    output.sums["drawn"] = layout.drawn_BRK.sum().float()
    if teacher_hidden is not None and not reader.base_reads_text:
        output.prefix_kl, agree, compared = _prefix_drift(reader, hidden, teacher_hidden, batch, layout, tokens, args)
        output.sums |= {"drift_kl": output.prefix_kl.detach(), "drift_agree": agree, "drift_positions": compared}
    return output


def _scatter(values_P: Tensor, drawn_BRK: Tensor) -> Tensor:
    """Put values of the drawn positions back into their blocks, [B, R, K]; 0 elsewhere."""
    return torch.zeros(drawn_BRK.shape, dtype=values_P.dtype, device=values_P.device).masked_scatter(drawn_BRK, values_P)


def _log_probabilities(student: PreTrainedModel, hidden_PH: Tensor, tokens: Tokens) -> Tensor:
    """Return the student's log-probabilities [P, V] in float32, with -inf at barred tokens."""
    return bar_tokens(output_logits(student, hidden_PH), tokens.barred).log_softmax(-1)


@torch.no_grad()
def _rollout(
    student: PreTrainedModel, hidden_PH: Tensor, log_PV: Tensor | None, tokens: Tokens, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's block y', its probability at each position, and the summed entropy of the predictions (nats).

    `log_PV` are the student's log-probabilities if all positions fit into one chunk, else None.
    """
    ids, confidences = [], []
    entropy = torch.zeros((), device=hidden_PH.device)
    for part_PH in hidden_PH.split(chunk):
        part_log_PV = _log_probabilities(student, part_PH, tokens) if log_PV is None else log_PV
        best = part_log_PV.max(-1)
        ids.append(best.indices)
        confidences.append(best.values.exp())
        entropy -= (part_log_PV.exp() * part_log_PV.clamp(min=-1e4)).sum()  # 0 times -inf would be NaN
    return torch.cat(ids), torch.cat(confidences), entropy


def _ground_truth(batch: Batch, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the text's token at every position and whether the text is that long, [B, R, K] each."""
    B, R, K = layout.drawn_BRK.shape
    index = batch.regions.anchor_BR[..., None].to(batch.clean_BN.device) + 1
    index = index + torch.arange(K, device=index.device)
    in_text = index < batch.lengths_B[:, None, None]
    flat = index.clamp(max=batch.clean_BN.shape[1] - 1).view(B, R * K)
    return batch.clean_BN.gather(1, flat).view(B, R, K), in_text


def _losses(
    reader: Reader,
    student_PH: Tensor,
    student_log_PV: Tensor | None,
    teacher_PH: Tensor | None,
    rollout_P: Tensor,
    truth_P: Tensor,
    tokens: Tokens,
    args: MTPDistillConfig,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return, per position, the loss (with gradient), the target, and the teacher's log-likelihood of the rollout.

    `student_log_PV` are the student's log-probabilities if all positions fit into one chunk, else None.
    """

    def chunk_losses(part_PH: Tensor, teacher_part_PH: Tensor | None, rollout: Tensor, truth: Tensor) -> tuple[Tensor, ...]:
        log_PV = _log_probabilities(reader.student, part_PH, tokens) if student_log_PV is None else student_log_PV
        teacher_log_PV, target, reward = None, truth, torch.zeros_like(truth, dtype=torch.float)
        if teacher_part_PH is not None:
            with torch.no_grad():
                teacher_log_PV = bar_tokens(reader.teacher_logits(teacher_part_PH), tokens.barred).log_softmax(-1)
                reward = teacher_log_PV.gather(-1, rollout[:, None]).squeeze(-1)
                if objective != "ground_truth":
                    target = teacher_log_PV.argmax(-1)
        losses = position_losses(log_PV, teacher_log_PV, rollout, target, objective=objective, floor=args.reward_floor)
        return losses, target, reward

    chunk = args.logits_chunk_size
    teacher_parts = teacher_PH.split(chunk) if teacher_PH is not None else [None] * -(-len(student_PH) // chunk)
    parts = [
        # with several chunks, keep only their hidden states for backward
        chunk_losses(*inputs) if student_log_PV is not None else checkpoint(chunk_losses, *inputs, use_reentrant=False)
        for inputs in zip(student_PH.split(chunk), teacher_parts, rollout_P.split(chunk), truth_P.split(chunk), strict=True)
    ]
    losses_P, target_P, reward_P = (torch.cat(column) for column in zip(*parts, strict=True))
    return losses_P, target_P, reward_P if teacher_PH is not None else None


def _prefix_drift(
    reader: Reader,
    hidden: Tensor,
    teacher_hidden: Tensor,
    batch: Batch,
    layout: Layout,
    tokens: Tokens,
    args: MTPDistillConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Measure the drift of single-token prediction.

    With `ntp_coef`, all positions of the completion are compared, with gradient; otherwise only the anchors, without gradient.

    Returns:
        The summed KL(teacher, student), the number of positions whose argmax agrees, and the number of compared positions.
    """
    if args.ntp_coef > 0:
        column = torch.arange(batch.clean_BN.shape[1], device=hidden.device)
        predicts_completion = (column >= batch.prompt_lengths_B[:, None] - 1) & (column < batch.lengths_B[:, None] - 1)
        read = layout.clean_index(*predicts_completion.nonzero(as_tuple=True))
    else:
        read = layout.read_BRK[..., 0][layout.drawn_BRK[..., 0]]

    def chunk_drift(student_part: Tensor, teacher_part: Tensor) -> tuple[Tensor, Tensor]:
        student_log = bar_tokens(output_logits(reader.student, student_part), tokens.barred).log_softmax(-1)
        with torch.no_grad():
            teacher_log = bar_tokens(reader.teacher_logits(teacher_part), tokens.barred).log_softmax(-1)
        agree = (student_log.argmax(-1) == teacher_log.argmax(-1)).sum()
        return kl_divergence(teacher_log, student_log).sum(), agree.float()

    kl, agree = hidden.new_zeros((), dtype=torch.float), hidden.new_zeros((), dtype=torch.float)
    with torch.set_grad_enabled(torch.is_grad_enabled() and args.ntp_coef > 0):
        both = (hidden[read], teacher_hidden[read])
        for parts in zip(*(states.split(args.logits_chunk_size) for states in both), strict=True):
            part_kl, part_agree = (
                checkpoint(chunk_drift, *parts, use_reentrant=False) if torch.is_grad_enabled() else chunk_drift(*parts)
            )
            kl, agree = kl + part_kl, agree + part_agree
    return kl, agree, torch.tensor(float(len(read)), device=hidden.device)

"""`distillation_pass` against a reference that runs a separate forward pass for each region."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mtp_trl.modeling.logits import output_logits
from mtp_trl.modeling.lora import adapters_disabled
from mtp_trl.training import readers, step
from mtp_trl.training.config import MTPDistillConfig
from mtp_trl.training.objective import OBJECTIVES, bar_tokens, kl_divergence, position_losses
from mtp_trl.training.readers import WholeRowReader
from mtp_trl.training.regions import row_generator, sample_regions
from mtp_trl.training.step import Batch, Tokens, distillation_pass

K, SLOTS, MASK, PAD, EOS = 5, 14, 60, 2, 1
TOKENS = Tokens(MASK, PAD, torch.tensor([MASK, 61, 62, 63]), torch.tensor([EOS]))


def arguments(tmp_path, **changes) -> MTPDistillConfig:
    options = {
        "k_max": K,
        "slots_per_row": SLOTS,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "thresholds": [0.02],
    }
    return MTPDistillConfig(str(tmp_path), **{**options, **changes})


def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([15, 11])
    clean = torch.randint(3, 60, (2, 15), generator=generator).masked_fill(torch.arange(15) >= lengths[:, None], PAD)
    regions = sample_regions(
        [3, 2], [13, 9], k_min=2, k_max=K, slots=SLOTS, generators=[row_generator(0, 0, row) for row in range(2)]
    )
    return Batch(clean, torch.tensor([4, 3]), lengths, regions)


def pair(tiny_model, architecture: str = "llama"):
    student = tiny_model(architecture)
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():  # move the student away from the teacher, so that no quantity is trivially zero
        for index, parameter in enumerate(student.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.02)
    return student, teacher


def naive(student, teacher, data: Batch, args: MTPDistillConfig):
    """Compute loss, reward and prefix KL with one unpacked forward pass per region."""
    loss, rewards, kl = torch.zeros(()), [], torch.zeros(())
    for row in range(2):
        text = data.clean_BN[row, : data.lengths_B[row]]
        for anchor, size in zip(data.regions.anchor_BR[row].tolist(), data.regions.size_BR[row].tolist(), strict=True):
            if not size:
                continue
            prefix = text[: anchor + 1]
            masked = torch.cat([prefix, torch.full((size - 1,), MASK)])
            block = bar_tokens(student(input_ids=masked[None]).logits[0, anchor:], TOKENS.barred).log_softmax(-1)
            rollout = block.argmax(-1)
            forced = torch.cat([prefix, rollout[:-1]])
            with torch.no_grad():
                reference = bar_tokens(teacher(input_ids=forced[None]).logits[0, anchor:], TOKENS.barred).log_softmax(-1)
            target = reference.argmax(-1)
            if args.objective == "ground_truth":
                target = text[anchor + 1 : anchor + 1 + size]
            decoding_ended = False
            for position in range(len(target)):
                one = slice(position, position + 1)
                one_loss = position_losses(block[one], reference[one], rollout[one], target[one], objective=args.objective)
                loss = loss + args.place_decay**position * one_loss.sum()
                if not decoding_ended:
                    rewards.append(reference[position][rollout[position]])
                decoding_ended = decoding_ended or int(rollout[position]) == EOS
                if int(target[position]) == EOS or (decoding_ended and args.objective != "ground_truth"):
                    break
        whole = student(input_ids=text[None]).logits[0, data.prompt_lengths_B[row] - 1 : -1]
        base = teacher(input_ids=text[None]).logits[0, data.prompt_lengths_B[row] - 1 : -1]
        both = [bar_tokens(x, TOKENS.barred).log_softmax(-1) for x in (base, whole)]
        kl = kl + kl_divergence(*both).sum()
    return loss, torch.stack(rewards).sum(), kl


def run(student, teacher, args):
    def read(function):
        with torch.no_grad():
            return function(teacher)

    return distillation_pass(WholeRowReader(student, teacher, read), batch(), TOKENS, args, objective=args.objective)


def gradient(model) -> torch.Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


@pytest.mark.parametrize("place_decay", [1.0, 0.7])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pass_equals_separate_forward_passes(tiny_model, tmp_path, objective, place_decay):
    student, teacher = pair(tiny_model)
    args = arguments(tmp_path, objective=objective, ntp_coef=0.5, place_decay=place_decay)
    output = run(student, teacher, args)
    expected, reward, kl = naive(student, teacher, batch(), args)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    sizes = [size for size in batch().regions.size_BR.flatten().tolist() if size]
    assert float(output.weight) == pytest.approx(sum(place_decay**position for size in sizes for position in range(size)))
    torch.testing.assert_close(output.sums["reward"], reward, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.prefix_kl, kl, rtol=1e-4, atol=1e-5)
    (output.loss + output.prefix_kl).backward()
    actual = gradient(student)
    (expected + kl).backward()
    torch.testing.assert_close(actual, gradient(student), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gemma3_text", "mixtral", "gpt_oss", "falcon_h1"])
def test_architectures_equal_separate_forward_passes(tiny_model, tmp_path, architecture):
    student, teacher = pair(tiny_model, architecture)
    args = arguments(tmp_path)
    output = run(student, teacher, args)
    expected, reward, _ = naive(student, teacher, batch(), args)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.sums["reward"], reward, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    actual = gradient(student)
    expected.backward()
    torch.testing.assert_close(actual, gradient(student), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["hard", "soft"])
def test_chunked_logits_change_neither_value_nor_gradient(tiny_model, tmp_path, objective):
    student, teacher = pair(tiny_model)
    outcomes = []
    for size in (10_000, 7):
        output = run(student, teacher, arguments(tmp_path, objective=objective, ntp_coef=1.0, logits_chunk_size=size))
        (output.loss + output.prefix_kl).backward()
        outcomes.append((output.loss.detach(), gradient(student)))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-5, atol=1e-6)


def test_no_more_than_a_chunk_of_logits_is_alive(tiny_model, tmp_path, monkeypatch):
    """The output head runs on one chunk at a time, and only the hidden states of chunks are kept for backward."""
    student, teacher = pair(tiny_model)
    read: list[int] = []

    def counted(model, hidden):
        read.append(len(hidden))
        return output_logits(model, hidden)

    for module in (step, readers):
        monkeypatch.setattr(module, "output_logits", counted)
    saved = {}
    for size in (4, 10_000):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            output = run(student, teacher, arguments(tmp_path, logits_chunk_size=size))
        saved[size] = sum(kept)
        assert max(read) <= size
        read.clear()
    positions, vocabulary = int(output.sums["drawn"]), student.config.vocab_size
    assert positions > 8
    assert saved[4] <= saved[10_000] - positions * vocabulary


def test_without_ntp_coef_the_drift_is_measured_at_the_anchors_without_gradient(tiny_model, tmp_path):
    student, teacher = pair(tiny_model)
    output = run(student, teacher, arguments(tmp_path))
    assert not output.prefix_kl.requires_grad
    assert output.sums["drift_positions"] == (batch().regions.size_BR > 0).sum()
    assert output.sums["drift_kl"] > 0
    same = run(teacher, teacher, arguments(tmp_path))
    assert same.sums["drift_kl"].abs() < 1e-5
    assert same.sums["drift_agree"] == same.sums["drift_positions"]


def test_ground_truth_needs_no_teacher(tiny_model, tmp_path):
    student, _ = pair(tiny_model)
    output = distillation_pass(
        WholeRowReader(student, student, None), batch(), TOKENS, arguments(tmp_path), objective="ground_truth"
    )
    assert "reward" not in output.sums
    assert output.loss.requires_grad


def test_ground_truth_is_learned_after_a_rollout_that_ended_too_early(tiny_model, tmp_path, monkeypatch):
    """A student that predicts EOS at every position is trained on every position, but its statistics end at the first."""
    student, teacher = pair(tiny_model)
    data, args = batch(), arguments(tmp_path, objective="ground_truth")
    rollout = step._rollout

    def ends_at_once(*inputs):
        ids, *others = rollout(*inputs)
        return torch.full_like(ids, EOS), *others

    monkeypatch.setattr(step, "_rollout", ends_at_once)
    output = run(student, teacher, args)
    torch.testing.assert_close(output.loss, naive(student, teacher, data, args)[0], rtol=1e-5, atol=1e-5)
    assert output.sums["positions_K"].sum() == (data.regions.size_BR > 0).sum()


@pytest.mark.parametrize("chunk", [1024, 5])
def test_teacher_logits_come_from_the_base_head_if_peft_trains_the_head(tiny_model, tmp_path, chunk):
    """PEFT's `modules_to_save` wraps the output head, which is the base's only while adapters are off."""
    base = tiny_model("llama")
    teacher = copy.deepcopy(base).requires_grad_(False)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    student = adapted.get_base_model()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)

    def run_teacher(read):
        with torch.no_grad(), adapters_disabled(adapted):
            return read(student)

    args = arguments(tmp_path, objective="soft", ntp_coef=1.0, logits_chunk_size=chunk)
    shared = WholeRowReader(student, student, run_teacher, lambda: adapters_disabled(adapted))
    separate = WholeRowReader(student, teacher, torch.no_grad()(lambda read: read(teacher)))
    outcomes = []
    for reader in (shared, separate):
        output = distillation_pass(reader, batch(), TOKENS, args, objective="soft")
        (output.loss + output.prefix_kl).backward()
        gradients = torch.cat([p.grad.flatten() for p in adapted.parameters() if p.grad is not None])
        adapted.zero_grad()
        outcomes.append((output.loss.detach(), output.prefix_kl.detach(), output.sums["reward"], gradients))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-5, atol=1e-6)

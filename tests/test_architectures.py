"""50 training steps lower the loss with each kind of architecture, in full fine-tuning and in exact mode.

`test_step.py` (full) and `test_exact.py` (exact) test for each of them that one packed pass equals separate passes, in value
and gradient.
"""

import copy

import pytest
import torch

from mtp_trl.modeling.exact import add_gated_adapter
from mtp_trl.training.config import MTPDistillConfig
from mtp_trl.training.readers import ExactReader, WholeRowReader
from mtp_trl.training.regions import row_generator, sample_regions
from mtp_trl.training.step import Batch, Tokens, distillation_pass

STEPS, LENGTH = 50, 12
TOKENS = Tokens(mask_id=60, pad_id=2, barred=torch.tensor([60, 61, 62, 63]), eos=torch.tensor([1]))
KINDS = {"experts": "mixtral", "sliding": "mistral", "mixed": "gpt_oss", "hybrid": "falcon_h1"}


def batch(step: int, rows: int) -> Batch:
    """Return texts that repeat every two steps, so that 50 steps are enough to learn them."""
    generators = [row_generator(0, step, row) for row in range(rows)]
    clean = torch.randint(3, 60, (rows, LENGTH), generator=torch.Generator().manual_seed(step % 2))
    regions = sample_regions([3] * rows, [LENGTH - 2] * rows, k_min=2, k_max=4, slots=8, generators=generators)
    return Batch(clean, torch.full((rows,), 4), torch.full((rows,), LENGTH), regions)


@pytest.mark.parametrize(
    ("kind", "exact"),
    [(kind, exact) for kind in KINDS for exact in (False, True) if (kind, exact) != ("hybrid", True)],  # slow on a CPU
)
def test_fifty_steps_lower_the_loss(tiny_model, tmp_path, kind, exact):
    model = tiny_model(KINDS[kind])
    args = MTPDistillConfig(str(tmp_path), k_max=4, slots_per_row=8, use_cpu=True, bf16=False, report_to="none")
    if exact:
        add_gated_adapter(model, rank=8, alpha=16)
        reader = ExactReader(model, with_teacher=True)
    else:
        teacher = copy.deepcopy(model).requires_grad_(False)
        reader = WholeRowReader(model, teacher, torch.no_grad()(lambda read: read(teacher)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2 if exact else 1e-3)
    losses, rows = [], 1 if kind == "hybrid" else 4
    for step in range(STEPS):
        output = distillation_pass(reader, batch(step, rows), TOKENS, args, objective="hard")
        loss = output.loss / output.weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10]), losses

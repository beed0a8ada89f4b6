"""Writes docs/api.md from the docstrings of the public API. A test checks that the file is up to date.

python benchmarks/api_reference.py
"""

import importlib
import inspect
import textwrap
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "api.md"
PUBLIC = {
    "Training": [
        "training.trainer.MTPDistillTrainer",
        "training.config.MTPDistillConfig",
        "modeling.mask_token.add_mask_token",
    ],
    "Decoding": [
        "custom_generate.generate.generate",
        "custom_generate.output.MTPGenerateOutput",
        "custom_generate.generate.attach_decoder",
        "custom_generate.repository.attach_adapter",
        "custom_generate.choice.ConfAdaptLogitsProcessor",
    ],
    "Publishing": [
        "publishing.export.export",
        "publishing.push.push",
        "publishing.card.write_card",
        "publishing.card.render_card",
        "publishing.decoder_check.check_decoder",
    ],
    "Measuring": [
        "evaluation.loading.load_student",
        "evaluation.tasks.load_task",
        "evaluation.sweep.decoding_settings",
        "evaluation.sweep.evaluate_decoding",
        "evaluation.calibration.calibrate",
        "evaluation.calibration.problems_needed",
        "evaluation.calibration.net_loss_p_value",
        "evaluation.harness.HarnessModel",
        "evaluation.harness.run_task",
        "evaluation.metrics.Acceleration",
        "evaluation.metrics.BlockAgreement",
        "evaluation.metrics.FinalAnswer",
    ],
}


def entry(name: str) -> str:
    """Return a heading, the parameters of a function, and the docstring."""
    module, _, attribute = name.rpartition(".")
    thing: Any = getattr(importlib.import_module(f"mtp_trl.{module}"), attribute)
    text = inspect.cleandoc(thing.__doc__ or "")
    lines = [f"### `mtp_trl.{name}`", ""]
    if inspect.isfunction(thing):
        names = list(inspect.signature(thing).parameters)
        call = f"{attribute}({', '.join(names)})"
        lines += ["```", textwrap.fill(call, 110, subsequent_indent=" " * (len(attribute) + 1)), "```", ""]
    summary, _, rest = text.partition("\n\n")
    lines += [" ".join(summary.split()), ""]
    if rest:
        lines += ["```text", rest, "```", ""]
    return "\n".join(lines)


def reference() -> str:
    """Return the whole document."""
    lines = ["# API", "", "Written by `python benchmarks/api_reference.py` from the docstrings.", ""]
    for title, names in PUBLIC.items():
        lines += [f"## {title}", "", *(entry(name) for name in names)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(reference(), encoding="utf-8")

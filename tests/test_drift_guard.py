"""DriftGuard: what a run does when single-token prediction drifts from the base."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerControl, TrainerState

import mtp_trl.word_problems
from mtp_trl import MTPDistillConfig, MTPDistillTrainer
from mtp_trl.training.drift_guard import DriftGuard
from mtp_trl.word_problems import load_dataset

TOKENIZER = Path(mtp_trl.word_problems.__file__).parent / "base"


def trainer(folder, *, held_out: bool = False, **changes) -> MTPDistillTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=768, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, bos_token_id=0,
        eos_token_id=1, pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    args = MTPDistillConfig(**{
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "k_max": 4, "slots_per_row": 12,
        "max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 1e-2, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "num_eval_prompts": 0, "save_strategy": "no", "gradient_checkpointing": False,
        "eval_strategy": "steps" if held_out else "no", "eval_steps": 2, **changes,
    })  # fmt: skip
    sets = load_dataset("train", 64, 0), load_dataset("test", 8, 0) if held_out else None
    return MTPDistillTrainer(LlamaForCausalLM(config), args, *sets, processing_class=AutoTokenizer.from_pretrained(TOKENIZER))


@pytest.mark.parametrize("held_out", [False, True])
def test_it_warns_once_for_every_measurement_above_the_limit(tmp_path, caplog, held_out):
    run = trainer(tmp_path, held_out=held_out, drift_limit=1e-3)
    with caplog.at_level(logging.WARNING, logger="mtp_trl.training.drift_guard"):
        run.train()
    key = "eval_drift/kl" if held_out else "drift/kl"
    above = [entry["step"] for entry in run.state.log_history if entry.get(key, 0) > 1e-3]
    assert above
    warned = [record for record in caplog.records if "has drifted from the base" in record.message]
    assert [int(re.search(r"Step (\d+):", record.message)[1]) for record in warned] == above


def test_it_stops_with_a_checkpoint(tmp_path, caplog):
    run = trainer(tmp_path, drift_limit=1e-3, drift_action="stop")
    run.train()
    stopped = run.state.global_step
    assert 1 < stopped < 6  # there is no drift before the first step
    assert (tmp_path / f"checkpoint-{stopped}" / "model.safetensors").is_file()
    assert run.state.log_history[-1].get("drift/kl", 1) > 1e-3


def test_it_raises_ntp_coef_which_limits_drift_and_survives_a_resume(tmp_path):
    options = {"drift_limit": 1e-3, "max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    free = trainer(tmp_path / "free", **options)
    free.train()
    held = trainer(tmp_path / "held", **options, drift_action="raise_ntp_coef")
    held.train()
    raised = [entry["guard/ntp_coef"] for entry in held.state.log_history if "guard/ntp_coef" in entry]
    assert raised[:3] == [0.1, 0.2, 0.4]
    drift = [[e["drift/kl"] for e in run.state.log_history if "drift/kl" in e][-1] for run in (free, held)]
    assert drift[1] < 0.7 * drift[0]
    again = trainer(tmp_path / "held", **options, drift_action="raise_ntp_coef")
    again.train(resume_from_checkpoint=str(tmp_path / "held" / "checkpoint-6"))
    losses = [[e["loss"] for e in run.state.log_history if "loss" in e] for run in (held, again)]
    assert losses[0] == losses[1]
    state = json.loads((tmp_path / "held" / "checkpoint-12" / "trainer_state.json").read_text())
    assert raised == [entry["guard/ntp_coef"] for entry in state["log_history"] if "guard/ntp_coef" in entry]


@pytest.mark.parametrize("options", [{"ground_truth_warmup": 1.0}, {"objective": "ground_truth"}], ids=str)
def test_it_measures_drift_while_the_text_is_the_target(tmp_path, options):
    run = trainer(tmp_path, drift_limit=1e-3, drift_action="stop", **options)
    run.train()
    assert 1 < run.state.global_step < 6


def test_it_warns_when_verified_decoding_slows_down(tmp_path, caplog):
    args, state, control = MTPDistillConfig(str(tmp_path), use_cpu=True, bf16=False), TrainerState(), TrainerControl()
    guard = DriftGuard(held_out=True)
    with caplog.at_level(logging.WARNING, logger="mtp_trl.training.drift_guard"):
        for value in (2.0, 4.0, 3.5, 2.9):
            guard.on_log(args, state, control, {"eval_decoding/verified_0.5": value})
    (record,) = caplog.records
    assert "eval_decoding/verified_0.5 has fallen from 4.00 to 2.90 tokens per pass." in record.message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"drift_action": "wran"}, "drift_action"), ({"drift_limit": -1.0}, "drift_limit"),
     ({"drift_limit": 0.1, "exact": True}, "unset in exact mode")],
)  # fmt: skip
def test_invalid_options_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        MTPDistillConfig(str(tmp_path), use_cpu=True, bf16=False, **wrong)

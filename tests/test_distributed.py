"""ZeRO and DDP on CPU in two real processes: the mask row, the loss and the saved model are those of one process."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mtp_trl.word_problems

TOKENIZER = Path(mtp_trl.word_problems.__file__).parent / "base"

SCRIPT = """
import json
import sys
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from mtp_trl import MTPDistillConfig, MTPDistillTrainer
from mtp_trl.custom_generate.generate import generate
from mtp_trl.word_problems import load_dataset

source, folder, tokenizer, size, zero, exact = sys.argv[1:]
args = MTPDistillConfig(
    output_dir=folder, use_cpu=True, bf16=False, report_to="none", k_max=4, slots_per_row=12, max_steps=3, save_strategy="no",
    per_device_train_batch_size=int(size), logging_steps=1, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
    gradient_checkpointing=False, deepspeed=zero or None, disable_tqdm=True, exact=bool(int(exact)), exact_rank=4,
)
trainer = MTPDistillTrainer(
    source, args, load_dataset("train", 32, 0), processing_class=AutoTokenizer.from_pretrained(tokenizer)
)
# ACCELERATE_USE_CPU, or `accelerate launch --cpu`, would switch DeepSpeed off without a word
assert trainer.is_deepspeed_enabled == bool(zero)
trainer.train()
trainer.save_model()
# each process another prompt and another length: one of them is done long before the other
rank = trainer.accelerator.process_index
ids = torch.arange(5, 9 + 2 * rank, device=trainer.model.device)[None]
for mtp_k in (1, 4):
    text = generate(ids, model=trainer.model, mtp_k=mtp_k, confadapt=0.3, max_new_tokens=3 + 20 * rank, do_sample=False)
    print("DECODED", rank, mtp_k, text[0].tolist(), flush=True)
if trainer.is_world_process_zero():
    print("LOSSES", json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
"""


def train(run_program, script: Path, source: Path, folder: Path, *, exact: bool, processes: int, zero: Path | None):
    command = ["-m", "accelerate.commands.launch"]
    if processes > 1:
        command += ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    command += [script, source, folder, TOKENIZER, 8 // processes, zero or "", int(exact)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = run_program(command, env=environment)
    assert done.returncode == 0, done.stderr[-8000:]
    lines = done.stdout.splitlines()
    line = next(line for line in lines if line.startswith("LOSSES"))
    saved = load_file(folder / "model.safetensors")
    if exact:
        saved |= load_file(folder / "custom_generate" / "mtp_adapter.safetensors")
    decoded = {line for line in lines if line.startswith("DECODED")}
    return json.loads(line.removeprefix("LOSSES")), saved, decoded


# with a spare row for the mask token, and with a matrix that has to grow
@pytest.mark.parametrize(
    ("rows", "exact", "stage"), [(768, False, 3), (766, False, 3), (768, True, 3), (768, True, 2), (768, True, None)]
)
def test_two_processes_equal_one(run_program, tmp_path, rows, exact, stage):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    zero = tmp_path / "zero3.json"
    zero.write_text(json.dumps({
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
        "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
    }))  # fmt: skip
    one, two = (
        train(run_program, script, tmp_path / "source", tmp_path / name, exact=exact, processes=processes, zero=config)
        for name, processes, config in (("one", 1, None), ("two", 2, zero if stage else None))
    )
    assert one[0] == pytest.approx(two[0], rel=1e-4)
    assert len(two[2]) == 4
    assert one[2] <= two[2]
    assert one[1].keys() == two[1].keys()
    for name, value in one[1].items():
        torch.testing.assert_close(two[1][name], value, atol=1e-5, rtol=1e-3)
    if exact:
        assert any("lora_B" in name and value.abs().max() > 0 for name, value in one[1].items())

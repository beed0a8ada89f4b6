"""DDP, every ZeRO stage and FSDP2 in two CPU processes give the same losses and saved model as one process."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

import mtp_trl.word_problems

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = Path(mtp_trl.word_problems.__file__).parent / "base"

SCRIPT = """
import json
import os
import sys
from pathlib import Path
import torch
from accelerate.state import DistributedType, PartialState
from transformers import AutoTokenizer
from mtp_trl import MTPDistillConfig, MTPDistillTrainer
from mtp_trl.custom_generate.generate import generate
from mtp_trl.modeling.parallelism import gathered
from mtp_trl.word_problems import load_dataset

options = json.loads(sys.argv[1])
lora, prompts_only = options.pop("lora", False), options.pop("prompts_only", False)
args = MTPDistillConfig(**{
    "use_cpu": True, "bf16": False, "report_to": "none", "k_max": 4, "slots_per_row": 12, "max_steps": 3,
    "save_strategy": "no", "logging_steps": 1, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant",
    "gradient_checkpointing": False, "disable_tqdm": True, "exact_rank": 4, "max_completion_length": 12,
    **options["arguments"],
})
peft_config = None
if lora:
    from peft import LoraConfig
    from peft.tuners.trainable_tokens import layer

    def gathered_rows(self, weight, rows, embed_dim):  # PEFT's method requires a CUDA device
        with layer.gather_params_ctx([weight], modifier_rank=None):
            return weight[rows].clone()

    layer.TrainableTokensLayer._collect_token_weights = gathered_rows
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # accelerate silently turns FSDP off on CPUs
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
rows = load_dataset("train", 32, 0)
trainer = MTPDistillTrainer(
    options["source"], args, rows.select_columns(["prompt"]) if prompts_only else rows,
    processing_class=AutoTokenizer.from_pretrained(options["tokenizer"]), peft_config=peft_config,
)
# ACCELERATE_USE_CPU or `accelerate launch --cpu` would silently turn DeepSpeed off
assert trainer.is_deepspeed_enabled == bool(args.deepspeed)
assert trainer.is_fsdp_enabled == (os.environ.get("ACCELERATE_USE_FSDP") == "true")
if options["poison"]:
    weight = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad][3]
    weight.register_hook(lambda gradient: gradient * float("nan") if trainer.state.global_step == 1 else gradient)
    try:
        trainer.train()
    except FloatingPointError as error:
        finite = True
        for parameter in trainer.model.parameters():
            with gathered([parameter]):
                finite = finite and bool(parameter.isfinite().all())
        checkpoints = sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*"))
        if trainer.accelerator.is_main_process:
            print("LOSSES", json.dumps([str(error), finite, checkpoints]), flush=True)
    trainer.accelerator.wait_for_everyone()
    os._exit(0)
trainer.train(resume_from_checkpoint=options.get("resume"))
trainer.save_model()
if options["push"]:
    trainer.push_to_hub()
if options["decode"]:  # prompts and lengths differ, so one process finishes long before the other
    rank = trainer.accelerator.process_index
    ids = torch.arange(5, 9 + 2 * rank, device=trainer.accelerator.device)[None]
    limits = {"max_new_tokens": 3 + 20 * rank, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    texts = [generate(ids, model=trainer.model, mtp_k=k, confadapt=0.3, verify=False, **limits) for k in (1, 4)]
    Path(args.output_dir, f"texts_{rank}.json").write_text(json.dumps([text[0].tolist() for text in texts]))
if trainer.is_world_process_zero():
    print("LOSSES", json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]), flush=True)
if torch.distributed.is_initialized():  # as in mtp_trl.launch: normal interpreter shutdown may abort
    trainer.accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Save a model with the given number of embedding rows, with or without a spare one for the mask token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    @functools.cache
    def save(rows: int) -> str:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp(f"source_{rows}")
        LlamaForCausalLM(config).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def train(run_program, source, tmp_path):
    """Run the script in the given number of processes; return its losses and the saved tensors."""

    def run(processes: int, name: str, *, rows: int = 768, launch: tuple = (), resume: str | None = None, lora=False,
            prompts_only=False, decode=False, push=None, poison=False, **arguments):  # fmt: skip
        script = tmp_path / "train.py"
        script.write_text(SCRIPT)
        folder = tmp_path / name
        options = {
            "source": source(rows), "tokenizer": str(TOKENIZER), "resume": resume, "lora": lora, "prompts_only": prompts_only,
            "decode": decode, "push": push is not None, "poison": poison,
            "arguments": {"output_dir": str(folder), "per_device_train_batch_size": 8 // processes, **arguments},
        }  # fmt: skip
        command = ["-m", "accelerate.commands.launch"]
        if processes > 1:
            command += [*(launch or ("--multi_gpu",)), "--num_processes", processes, "--main_process_port", 0]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | (push or {})
        done = run_program([*command, script, json.dumps(options)], env=environment)
        assert done.returncode == 0, done.stderr[-8000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("LOSSES"))
        names = ["model.safetensors", "adapter_model.safetensors", "custom_generate/mtp_adapter.safetensors"]
        saved = {key: value for file in names if (folder / file).is_file() for key, value in load_file(folder / file).items()}
        return json.loads(line.removeprefix("LOSSES")), saved

    return run


FSDP2 = (
    "--use_fsdp", "--fsdp_version", 2, "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_state_dict_type",
    "FULL_STATE_DICT", "--fsdp_reshard_after_forward", "true",
)  # fmt: skip
_single_process: dict[str, tuple] = {}


def deepspeed(name: str, folder: Path) -> str:
    """Copy a published configuration, but disable DeepSpeed's own optimizer, which would take minutes to compile."""
    config = json.loads((ROOT / "recipes" / "deepspeed" / f"{name}.json").read_text())
    config["zero_force_ds_cpu_optimizer"] = False
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ({}, None), ({}, "zero2"), ({"rows": 766}, "zero3"), ({}, "zero3_offload"), ({}, "fsdp2"), ({"lora": True}, "zero3"),
        *(({"exact": True}, how) for how in (None, "zero1", "zero2_offload", "zero3", "fsdp2")),
    ],
    ids=str,
)  # fmt: skip
def test_two_processes_equal_one(train, tmp_path, mode, how):
    if str(mode) not in _single_process:
        _single_process[str(mode)] = train(1, "one", **mode)
    losses, weights = _single_process[str(mode)]
    if how == "fsdp2":
        two = train(2, "two", **mode, launch=FSDP2)
    else:
        two = train(2, "two", **mode, deepspeed=how and deepspeed(how, tmp_path))
    assert losses == pytest.approx(two[0], rel=1e-4)
    assert weights.keys() == two[1].keys()
    for name, value in weights.items():
        torch.testing.assert_close(two[1][name], value, atol=1e-5, rtol=1e-3)
    if mode:
        assert any("lora_B" in name and value.abs().max() > 0 for name, value in weights.items()) or "rows" in mode


@pytest.mark.parametrize("how", ["zero3", "fsdp2"])
def test_sharded_runs_resume_exactly(train, tmp_path, how):
    """The ranks complete bare prompts to texts of different lengths. FSDP2 runs in exact mode."""
    options = {"save_strategy": "steps", "save_steps": 2, "prompts_only": True}
    if how == "zero3":
        options |= {"deepspeed": deepspeed("zero3", tmp_path)}
    else:
        options |= {"exact": True, "launch": FSDP2, "optim": "adamw_torch", "learning_rate": 0.01}
    losses, weights = train(2, "whole", **options)
    resumed_losses, resumed = train(2, "resumed", **options, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed_losses == losses
    assert weights
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


@pytest.mark.parametrize("how", ["zero3", "fsdp2"])
@pytest.mark.parametrize("exact", [False, True])
def test_sharded_weights_decode_rows_of_different_length(train, tmp_path, exact, how):
    """Each process has its own prompt. The one that finishes first must continue its passes, or the other waits forever."""
    options = {"deepspeed": deepspeed("zero3", tmp_path)} if how == "zero3" else {"launch": FSDP2}
    train(2, "two", exact=exact, decode=True, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two", trust_remote_code=True, dtype=torch.float32)
    for rank in range(2):
        ids = torch.arange(5, 9 + 2 * rank)[None]
        limits = {"max_new_tokens": 3 + 20 * rank, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        expected = [model.generate(ids, mtp_k=k, confadapt=0.3, verify=False, **limits)[0].tolist() for k in (1, 4)]
        assert json.loads((tmp_path / "two" / f"texts_{rank}.json").read_text()) == expected


@pytest.mark.parametrize("how", ["zero3", "fsdp2"])
def test_lora_on_a_sharded_base_is_pushed_merged(train, source, hub_server, tmp_path, how):
    """After a checkpoint and at the end, one process merges the adapters into the base; the other does not wait for it."""
    options = {"deepspeed": deepspeed("zero3", tmp_path)} if how == "zero3" else {"launch": FSDP2}
    online = {
        "HF_ENDPOINT": hub_server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_test",
    }  # fmt: skip
    hub = {"push_to_hub": True, "hub_model_id": "me/lora", "save_strategy": "steps", "save_steps": 2}
    train(2, "two", lora=True, push=online, **hub, **options)
    repository = hub_server.repositories["me/lora"]
    assert len(repository.commits) == 3  # repository creation, second step, end of training
    sha256, size = repository.commits[repository.head]["model.safetensors"]
    assert len(hub_server.objects[sha256]) == size
    pushed, trained = load(hub_server.objects[sha256]), load_file(tmp_path / "two" / "adapter_model.safetensors")
    base = load_file(Path(source(768)) / "model.safetensors")
    for name in (name for name in base if "q_proj" in name):
        a, b = (trained[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(pushed[name], base[name] + 2 * b @ a)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_gradients_change_no_weight_under_deepspeed(train, tmp_path, stage):
    """DeepSpeed steps within backward. Without ZeRO it would step on NaN, and a checkpoint would contain it."""
    config = {
        "train_micro_batch_size_per_gpu": "auto", "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(config))
    (message, finite, checkpoints), _ = train(
        2, "two", poison=True, save_strategy="steps", save_steps=1, deepspeed=str(tmp_path / "ds.json")
    )
    assert "gradient norm of step 2 is not finite" in message
    assert finite
    assert checkpoints == ["checkpoint-1"]

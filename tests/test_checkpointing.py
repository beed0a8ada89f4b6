"""Fault tolerance: a run that is killed, stopped, out of disk or has produced NaN resumes like an uninterrupted one."""

import json
import multiprocessing
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

import mtp_trl.word_problems
from mtp_trl import MTPDistillConfig, MTPDistillTrainer, launch
from mtp_trl.training import checkpointing
from mtp_trl.training.checkpointing import PARTIAL
from mtp_trl.word_problems import load_dataset

STEPS = 8


@pytest.fixture(scope="module")
def processes():
    """Processes that start quickly: each is forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mtp_trl.training.trainer", "mtp_trl.launch", "mtp_trl.recipe", "peft"])
    return context


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    AutoTokenizer.from_pretrained(Path(mtp_trl.word_problems.__file__).parent / "base").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=768, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, base):
    """Write a recipe that saves every two steps and resumes from the last checkpoint."""

    def write(folder: str, **changes) -> Path:
        values = {
            "model_name_or_path": str(base), "dataset_name": "word_problems", "dataset_size": 64, "max_steps": STEPS,
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "slots_per_row": 16, "k_max": 4,
            "output_dir": str(tmp_path / folder), "resume_from_checkpoint": "auto", "save_steps": 2, "logging_steps": 1,
            "learning_rate": 0.01, "muon": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "report_to": "none", "disable_tqdm": True, "exact_rank": 4,
        }  # fmt: skip
        path = tmp_path / f"{folder}.yaml"
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in (values | changes).items()))
        return path

    return write


def start(processes, path: Path):
    process = processes.Process(target=_main, args=(path,))
    process.start()
    return process


def _main(path: Path) -> None:
    raise SystemExit(launch.main(path))


def wait(process, condition) -> None:
    """Wait until a condition holds; the process must not end before."""
    while not condition():
        assert process.is_alive(), "the run ended before it could be interrupted"
        time.sleep(0.001)


def losses(folder: Path) -> dict[int, float]:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return {log["step"]: log["loss"] for log in state["log_history"] if "loss" in log}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    names = ["model.safetensors", "adapter_model.safetensors", "custom_generate/mtp_adapter.safetensors"]
    return {key: value for name in names if (folder / name).is_file() for key, value in load_file(folder / name).items()}


@pytest.mark.parametrize("mode", ["full", "exact", "adapters on policy"])
def test_a_run_that_is_killed_and_resumed_equals_an_uninterrupted_one(processes, recipe, tmp_path, mode):
    """SIGKILL comes between checkpoints, while one is written and just after one. Losses and weights are bitwise equal."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tom has {n} apples and"}) + "\n" for n in range(40)))
    changes = {
        "full": {},
        "exact": {"exact": True},
        "adapters on policy": {
            "use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "dataset_name": str(prompts),
            "dataset_size": 32, "max_completion_length": 8, "muon": False,
        },
    }[mode]  # fmt: skip
    whole = start(processes, recipe("whole", **changes))
    path, folder = recipe("killed", **changes), tmp_path / "killed"
    moments = [
        lambda: (folder / PARTIAL / "checkpoint-2").exists(),  # nothing saved yet
        lambda: (folder / "checkpoint-4").exists(),
        # partly written or, on a fast machine, just completed
        lambda: (folder / PARTIAL / "checkpoint-6" / "optimizer.pt").exists() or (folder / "checkpoint-6").exists(),
    ]
    for moment in moments:
        process = start(processes, path)
        wait(process, moment)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    last = start(processes, path)
    for process in (whole, last):
        process.join()
        assert process.exitcode == 0
    assert set(losses(tmp_path / "whole")) == set(range(1, STEPS + 1))
    assert losses(folder) == losses(tmp_path / "whole")
    expected, actual = weights(tmp_path / "whole"), weights(folder)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    assert not (folder / PARTIAL).exists()


def test_sigterm_saves_and_stops_and_the_same_command_resumes(processes, recipe, tmp_path):
    """The run stops after the current step, regardless of the save interval. The exit status is a shell's for SIGTERM."""
    path, folder = recipe("stopped"), tmp_path / "stopped"
    process = start(processes, path)
    wait(process, lambda: (folder / "checkpoint-2").exists())
    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    stopped = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert 2 < stopped < STEPS
    assert not (folder / "model.safetensors").exists()  # an unfinished run saves no final model
    again, whole = start(processes, path), start(processes, recipe("whole"))
    for one in (again, whole):
        one.join()
        assert one.exitcode == 0
    assert losses(folder) == losses(tmp_path / "whole")


class AfterSave(TrainerCallback):
    """Call a function once a given step has been saved."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act = step, act

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.act(kwargs["model"])


def trainer(base: Path, folder: Path, callback: AfterSave) -> MTPDistillTrainer:
    args = MTPDistillConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", k_max=4, slots_per_row=16, max_steps=6, save_steps=2,
        per_device_train_batch_size=4, learning_rate=1e-3, disable_tqdm=True, num_eval_prompts=0,
    )  # fmt: skip
    return MTPDistillTrainer(str(base), args, load_dataset("train", 32, 0), callbacks=[callback])


def test_a_full_disk_raises_and_keeps_the_last_checkpoint(base, tmp_path):
    """A limit on file size simulates the full disk: the weights still fit, the optimizer's state does not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit_file_size(model) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * sum(p.numel() for p in model.parameters()) * 4 // 2, before[1]))

    run = trainer(base, tmp_path, AfterSave(2, limit_file_size))
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written \(.*checkpoint-2 is complete"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "checkpoint-2"]
    run = trainer(base, tmp_path, AfterSave(0, None))
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6


@pytest.mark.parametrize(
    ("where", "message"), [("weights", "loss of step 5 is not finite"), ("gradients", "gradient norm of step 5")]
)
def test_nan_ends_the_run_before_a_checkpoint_contains_it(base, tmp_path, where, message):
    def insert_nan(model) -> None:
        parameter = model.get_input_embeddings().weight
        if where == "weights":
            parameter.data[:, 3] = torch.nan
        else:
            parameter.register_hook(lambda gradient: gradient * torch.nan)

    with pytest.raises(FloatingPointError, match=rf"{message}.*the last one is .*checkpoint-4"):
        trainer(base, tmp_path, AfterSave(4, insert_nan)).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", trust_remote_code=True)
    assert all(torch.isfinite(parameter).all() for parameter in saved.parameters())
    assert saved.generate(torch.tensor([[0, 5, 6]]), confadapt=0.9, max_new_tokens=4).shape[1] <= 7


def test_the_best_checkpoint_is_recorded_by_its_final_path(base, tmp_path):
    run = trainer(base, tmp_path, AfterSave(0, None))
    run.eval_dataset = run.train_dataset.select(range(4))
    run.args.eval_strategy, run.args.eval_steps, run.args.metric_for_best_model = IntervalStrategy.STEPS, 2, "eval_loss"
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)


class SaveEveryStep(TrainerCallback):
    """Save at every step, as SIGTERM does in the last step of an epoch, at which a checkpoint is due anyway."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_save = True


def test_a_step_that_is_saved_twice_is_written_once_and_its_state_updated(base, tmp_path, monkeypatch):
    written = []
    publish = checkpointing._publish
    monkeypatch.setattr(checkpointing, "_publish", lambda part, target: written.append(target.name) or publish(part, target))
    run = trainer(base, tmp_path, SaveEveryStep())
    run.eval_dataset = run.train_dataset.select(range(4))
    run.args.eval_strategy = run.args.save_strategy = IntervalStrategy.EPOCH
    run.args.metric_for_best_model, run.args.greater_is_better = "eval_loss", False
    run.train()
    assert written == [f"checkpoint-{step}" for step in range(1, 7)]
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert "eval_loss" in state["log_history"][-1]  # measured at the end of the epoch, after the step was first saved


def test_a_checkpoint_of_another_run_is_replaced(base, tmp_path):
    saved = []
    for learning_rate in (1e-3, 2e-3):
        run = trainer(base, tmp_path, AfterSave(0, None))
        run.args.learning_rate = learning_rate
        run.train()
        saved.append(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert any(not torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    assert not list(tmp_path.glob(".*checkpoint*"))


def test_a_second_train_call_writes_the_same_step_again(base, tmp_path):
    run = trainer(base, tmp_path, AfterSave(0, None))
    run.args.max_steps = 2
    saved = []
    for _ in range(2):
        run.train()
        saved.append(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(saved[0][name], saved[1][name])
    assert torch.equal(saved[1][name], run.model.state_dict()[name])

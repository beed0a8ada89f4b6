"""launch: `accelerate launch recipe.yaml`, workers that re-execute it, data sources, checkpoints, messages."""

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mtp_trl import launch, word_problems
from mtp_trl.recipe import read_recipe
from mtp_trl.word_problems import train_problems

ROOT = Path(__file__).resolve().parents[1]
LINE = 'launch: str = __import__("mtp_trl.launch", fromlist=["run"]).run(__file__)'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    AutoTokenizer.from_pretrained(Path(word_problems.__file__).parent / "base").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=768,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def write(tmp_path, model):
    def write_recipe(**changes):
        values = {
            "model_name_or_path": str(model),
            "dataset_name": "word_problems",
            "dataset_size": 8,
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "slots_per_row": 8,
            "k_max": 4,
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
        }
        values = {key: value for key, value in (values | changes).items() if value is not None}
        path = tmp_path / "recipe.yaml"
        # true, false and null are the same in JSON and YAML
        path.write_text(LINE + "\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
        return path

    return write_recipe


def test_accelerate_launch_trains_and_the_command_line_overrides(run_program, write, tmp_path):
    path = write(max_steps=50, dataloader_num_workers=1)
    text = path.read_text() + "logging_steps: 1\nwarmup_steps: 0  # a comment\nmodel_revision: null\n"
    path.write_text(text.replace("model_revision: null\n", ""))
    command = ["-m", "accelerate.commands.launch", path, "--max_steps", 2]
    done = run_program(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})  # outside the repository
    assert done.returncode == 0, done.stderr
    assert "Model saved to" in done.stdout
    state = json.loads((tmp_path / "out" / "config.json").read_text())
    assert state["mtp"]["k_max"] == 4
    assert (tmp_path / "out" / "custom_generate" / "generate.py").is_file()


@pytest.mark.parametrize("exact", [False, True])
def test_one_target_module_is_a_name_and_not_a_pattern(write, exact):
    path = write(use_peft=True, lora_target_modules=["q_proj"], lora_r=2, lora_dropout=0.0, exact=exact)
    trainer = launch.train(read_recipe(path))
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    adapted = trainer.model.mtp_adapter.names if exact else [name for name in trained if "lora_" in name]
    assert adapted
    assert all("q_proj" in name for name in adapted)


def test_a_mistake_is_one_line_on_stderr_and_loads_nothing(write, capsys):
    path = write(max_stepz=3)
    assert launch.main(path) == 2
    err = capsys.readouterr().err
    assert err == f"{path}: Unknown in recipe.yaml (trainer: mtp): 'max_stepz' (did you mean 'max_steps'?).\n"


def test_run_raises_system_exit(write, monkeypatch):
    path = write(max_stepz=3)
    monkeypatch.setattr(sys, "argv", ["recipe.yaml"])
    with pytest.raises(SystemExit) as exited:
        exec(compile(path.read_text(), path, "exec"), {"__name__": "__main__", "__file__": str(path)})
    assert exited.value.code == 2


@pytest.mark.parametrize(("processes", "torn_down"), [(1, True), (2, False)])
def test_one_of_several_processes_exits_before_interpreter_teardown(run_program, tmp_path, processes, torn_down):
    """The exit status, exit handlers and output are kept. Interpreter teardown, in which gloo threads abort, is skipped."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "import atexit, mtp_trl.launch as launch\n"
        "class Last:\n"
        "    def __del__(self, print=print): print('torn down')\n"
        "def main(path, overrides):\n"
        "    global last\n"
        "    atexit.register(print, 'handlers ran')\n"
        "    last = Last()\n"
        "    return 3\n"
        "launch.main = main\n"
        "launch.run(__file__)\n"
    )
    done = run_program([recipe], env={**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(processes)})
    assert done.returncode == 3, done.stderr
    assert done.stdout.split("\n")[:-1] == ["handlers ran", *["torn down"] * torn_down]


def test_workers_that_reexecute_the_recipe_do_not_train(write):
    """Spawned workers run the main file again as __mp_main__, so the YAML below the first line must run as Python."""
    path = write(gradient_checkpointing=None)
    path.write_text(path.read_text() + "a: true\nb: false\nc: null\nd: [1, 2.0e-3, true]\ne: {'x': null}\n")
    namespace = {"__name__": "__mp_main__", "__file__": str(path)}
    exec(compile(path.read_text(), path, "exec"), namespace)
    assert namespace["launch"] == str(path)


def test_a_spawned_process_starts_from_a_recipe(run_program, tmp_path):
    """A program whose main file is a recipe starts a real spawned worker."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('launch: str = __import__("worker").run(__file__)\nflag: true\n')
    (tmp_path / "worker.py").write_text(
        "import multiprocessing, sys\n"
        "from mtp_trl import launch\n"
        "def run(path):\n"
        "    if sys._getframe(1).f_globals['__name__'] == '__mp_main__':\n"
        "        sys._getframe(1).f_globals.update(true=True)\n"
        "        return path\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=print, args=('from the worker',))\n"
        "    worker.start(); worker.join(); raise SystemExit(worker.exitcode)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = run_program([recipe], env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "from the worker"), done.stderr


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_local_files_are_read(write, tmp_path, suffix):
    from datasets import Dataset

    rows = Dataset.from_list([{"question": p.question, "answer": p.answer} for p in train_problems(6, seed=1)])
    file = tmp_path / f"data{suffix}"
    rows.to_parquet(file) if suffix == ".parquet" else rows.to_json(file)
    recipe = read_recipe(
        write(
            dataset_name=str(file),
            dataset_size=4,
            column_map={"question": "prompt", "answer": "completion"},
            prompt_format="Q: {} A:",
        )
    )
    train_set, eval_set = launch._load_data(recipe)
    assert eval_set is None
    assert train_set.column_names == ["question", "answer"]  # the trainer renames columns
    assert train_set["question"][3] == f"Q: {train_problems(4, seed=1)[3].question} A:"
    assert len(train_set) == 4


def test_a_folder_of_files_has_splits(write, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, size in (("train", 5), ("test", 3)):
        rows = [{"prompt": p.prompt, "completion": p.completion} for p in train_problems(size, seed=1)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = write(dataset_name=str(folder), dataset_size=None, eval_strategy="steps", eval_steps=1, eval_size=2)
    train_set, eval_set = launch._load_data(read_recipe(path))
    assert (len(train_set), len(eval_set)) == (5, 2)
    assert launch.main(path, ["--dataset_train_split", "validation"]) == 2


def test_the_bundled_problems_need_a_dataset_size(write, capsys):
    assert launch.main(write(dataset_size=None)) == 2
    assert "set dataset_size to the number of problems to draw" in capsys.readouterr().err


def test_an_unknown_split_is_named(write, tmp_path, capsys):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    assert launch.main(write(dataset_name=str(file)), ["--dataset_train_split", "validation"]) == 2
    assert "has the splits train, not 'validation'" in capsys.readouterr().err


def refuse_to_load(monkeypatch):
    """Fail the test if anything loads weights."""

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"column_map": {"question": "prompt"}},
            "renames 'question', but the dataset has the columns 'prompt', 'completion'",
        ),
        ({"dataset_size": 3, "gradient_accumulation_steps": 2}, "fewer than the 4 of one optimizer step"),
        ({"prompt_format": "x"}, "prompt_format must contain exactly one"),
        ({"chat_template": True}, "no chat template"),
    ],
)
def test_invalid_data_is_refused_before_weights_load(write, monkeypatch, changes, message):
    refuse_to_load(monkeypatch)
    with pytest.raises(ValueError, match=message):
        launch.main(write(**changes))


def losses(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return {log["step"]: log["loss"] for log in state["log_history"] if "loss" in log}


def test_auto_resumes_from_the_last_checkpoint_to_the_same_model(write, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "learning_rate": 0.01, "muon": True}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    path = write(**options, resume_from_checkpoint="auto", max_steps=4, lr_scheduler_type="constant")
    assert launch.main(path, ["--output_dir", str(straight)]) == 0
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    assert launch.main(path, ["--output_dir", str(resumed)]) == 0
    assert losses(resumed / "checkpoint-4") == pytest.approx(losses(straight / "checkpoint-4"))
    first, second = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (straight, resumed))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=name)


@pytest.mark.parametrize(
    ("requested", "expected"),
    [(None, None), (False, None), ("auto", "checkpoint-12"), (True, "checkpoint-12"), ("some/folder", "some/folder")],
)
def test_the_checkpoint_to_resume_from(write, tmp_path, requested, expected):
    for step in (4, 12):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
    found = launch._checkpoint(read_recipe(write(resume_from_checkpoint=requested)))
    assert found == (str(tmp_path / "out" / expected) if expected == "checkpoint-12" else expected)


def test_without_a_checkpoint_auto_starts_from_scratch(write):
    assert launch._checkpoint(read_recipe(write(resume_from_checkpoint="auto"))) is None


def test_sft_starts_from_weights_when_no_config_is_given(write, tmp_path, model):
    path = write(trainer="sft", k_max=None, slots_per_row=None, max_steps=1, learning_rate=0.0)
    assert launch.main(path) == 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (model, tmp_path / "out"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("under_accelerate", "omp", "cpu_threads", "expected"),
    [(True, "1", None, "all"), (True, "3", None, None), (False, "1", None, None), (True, "1", 2, 2)],
)
def test_threads_of_a_single_cpu_process(write, monkeypatch, under_accelerate, omp, cpu_threads, expected):
    """accelerate sets OMP_NUM_THREADS=1 by default. Any other value is the user's choice and is kept."""
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if under_accelerate:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    chosen = []
    recipe = read_recipe(write(cpu_threads=cpu_threads))
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launch._use_all_cores(recipe)
    everything = len(os.sched_getaffinity(0))
    assert chosen == ([] if expected is None else [everything if expected == "all" else expected])


def test_cores_are_counted_if_the_system_has_no_affinity(write, monkeypatch):
    """As on macOS and Windows."""
    recipe, chosen = read_recipe(write()), []
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    launch._use_all_cores(recipe)
    assert chosen == [os.cpu_count()]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_bars_and_a_table_of_the_last_log(write, monkeypatch, capsys, terminal):
    path = write(logging_steps=1)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert launch.main(path) == 0
    shown = capsys.readouterr().out
    assert ("Training" in shown) == terminal
    assert ("0:00:0" in shown) == terminal  # time left
    assert "train_runtime" in shown  # of the last log, in the table or printed as a dict


def test_launch_itself_loads_no_torch(run_program):
    """The environment must be set before torch is loaded."""
    code = "import sys, mtp_trl.launch; sys.exit('torch' in sys.modules)"
    assert run_program(["-c", code], cwd=ROOT).returncode == 0


def test_memory_settings_do_not_fail():
    process = multiprocessing.get_context("spawn").Process(target=launch._prepare_cpu)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_muon_of_sft_uses_the_betas_and_epsilon_of_the_recipe(write, monkeypatch):
    options = {}
    monkeypatch.setattr("mtp_trl.training.optimizer.muon_adamw", lambda model, **chosen: options.update(chosen))
    recipe = {"trainer": "sft", "k_max": None, "slots_per_row": None, "max_steps": 1, "muon": True}
    assert launch.main(write(**recipe, adam_beta1=0.7, adam_beta2=0.9, adam_epsilon=1e-5)) == 0
    assert (options["betas"], options["eps"]) == ((0.7, 0.9), 1e-5)

"""Recipes are parsed and checked before anything loads, and every published recipe runs on a tiny model."""

import ast
import json
import os
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mtp_trl import word_problems
from mtp_trl.evaluation.loading import load_student
from mtp_trl.launch import train
from mtp_trl.recipe import RecipeError, SFTRecipeConfig, accumulation_steps, locate, read_recipe
from mtp_trl.word_problems import train_problems

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LINE = 'launch: str = __import__("mtp_trl.launch", fromlist=["run"]).run(__file__)'
TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
# Overrides of a test run in any recipe: only the machine and the length change.
DRY = ["--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--max_steps", "2", "--report_to", "none"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A one-layer model with the bundled tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(Path(word_problems.__file__).parent / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data file with the columns of MetaMathQA."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"query": p.question, "response": p.answer, "type": "x"} for p in train_problems(12, seed=0)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def write(tmp_path, model):
    """A function that writes a small valid recipe with changed keys; a key that is None is omitted."""

    def write_recipe(**changes):
        values = {
            "model_name_or_path": str(model),
            "dataset_name": "word_problems",
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
        }
        values = {key: value for key, value in (values | changes).items() if value is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(LINE + "\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
        return path

    return write_recipe


def without_deepspeed(path, folder):
    """Write a copy of a recipe without DeepSpeed, whose configuration would stay set in this process."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("deepspeed:")]
    copy = folder / path.name
    copy.write_text("\n".join(lines))
    return copy


def test_the_command_line_overrides_the_values_of_the_recipe(write):
    recipe = read_recipe(write(learning_rate=0.5, k_max=4, lora_r=3), ["--k_max", "6", "--bf16", "true"])
    assert (recipe.training.learning_rate, recipe.training.k_max, recipe.training.bf16) == (0.5, 6, True)
    assert recipe.model.lora_r == 3


def test_a_float_that_yaml_reads_as_a_string_is_a_float(write):
    path = write()
    path.write_text(path.read_text() + "learning_rate: 1e-5\n")
    assert yaml.safe_load(path.read_text())["learning_rate"] == "1e-5"
    assert read_recipe(path).training.learning_rate == 1e-5


def test_dictionaries_come_from_the_recipe_or_the_command_line(write):
    path = write(column_map={"a": "prompt"})
    assert read_recipe(path).training.column_map == {"a": "prompt"}
    assert read_recipe(path, ["--column_map", '{"b": "prompt"}']).training.column_map == {"b": "prompt"}


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        (
            {"learning_rat": 1.0},
            [],
            r"Unknown in recipe.yaml \(trainer: mtp\): 'learning_rat' \(did you mean 'learning_rate'",
        ),
        ({}, ["--k_mx", "3"], r"Unknown in the command line: 'k_mx' \(did you mean 'k_max'"),
        ({"k_max": 8, "trainer": "sft"}, [], r"Unknown in recipe.yaml \(trainer: sft\): 'k_max'"),
        ({"trainer": "dpo"}, [], "trainer must be mtp or sft, got 'dpo'"),
        ({}, ["--max_steps", "ten"], "max-steps: invalid int value: 'ten'"),
        ({"k_min": 1}, [], "2 <= k_min <= k_max"),
        ({"dataset_size": 0}, [], "dataset_size must be >= 1, got 0"),
        ({"model_name_or_path": None}, [], "model_name_or_path is missing"),
        ({"dataset_name": None}, [], "dataset_name is missing"),
        ({"model_name_or_path": "./nowhere"}, [], "model_name_or_path names './nowhere': no such file"),
        ({"dataset_name": "data/train.jsonl"}, [], "dataset_name names 'data/train.jsonl': no such file"),
        ({"dataset_name": "some/where/else"}, [], "dataset_name names 'some/where/else'"),
        ({"deepspeed": "zero9.json"}, [], "deepspeed.*zero9.json"),
        ({"model_config": {"model_type": "llama"}}, [], "needs `trainer: sft`"),
        ({"global_batch_size": 30}, [], "not a multiple of per_device_train_batch_size=8 x 1 processes"),
        ({"global_batch_size": 4}, [], "global_batch_size=4 is not a multiple"),
        ({"global_batch_size": 16, "gradient_accumulation_steps": 2}, [], "not both"),
    ],
)
def test_an_invalid_recipe_is_refused_with_the_key(write, changes, overrides, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(**changes), overrides)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b\n", "must contain `key: value` lines, got list"), ("a: [", "is not valid YAML")]
)
def test_yaml_without_keys_is_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"There is no recipe .*absent\.yaml"):
        read_recipe(tmp_path / "absent.yaml")


@pytest.mark.parametrize(("processes", "steps"), [(1, 4), (2, 2), (4, 1)])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(processes, steps):
    assert accumulation_steps(16, per_device=4, processes=processes) == steps
    with pytest.raises(RecipeError, match=f"global_batch_size=16 is not a multiple .*=3 x {processes} processes"):
        accumulation_steps(16, per_device=3, processes=processes)


def test_the_global_batch_sets_the_accumulation(write):
    recipe = read_recipe(write(global_batch_size=16, per_device_train_batch_size=2), ["--per_device_train_batch_size", "4"])
    assert recipe.training.gradient_accumulation_steps == 4


def test_paths_are_relative_to_the_current_directory_then_to_the_repository(tmp_path, monkeypatch):
    repository, elsewhere = tmp_path / "repository", tmp_path / "elsewhere"
    (repository / "recipes").mkdir(parents=True)
    (repository / "pyproject.toml").touch()
    (repository / "a.json").touch()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = repository / "recipes" / "x.yaml"
    assert locate("a.json", recipe=recipe) == str(repository / "a.json")
    (elsewhere / "a.json").touch()
    assert locate("a.json", recipe=recipe) == "a.json"
    assert locate("owner/name", recipe=recipe) == "owner/name"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_yaml_and_python(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert text.splitlines()[0] == LINE
    assert all(isinstance(node, ast.AnnAssign) for node in tree.body)
    keys = [node.target.id for node in tree.body]
    assert len(keys) == len(set(keys))
    assert keys == list(yaml.safe_load(text))
    for value in yaml.safe_load(text).values():
        assert not isinstance(value, str) or not value[:1].isdigit(), f"{value!r}: write 1.0e-5, not 1e-5"


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_papers_runs_have_the_papers_settings(name, tmp_path):
    path = without_deepspeed(ROOT / "recipes" / f"{name}.yaml", tmp_path)
    recipe = read_recipe(path, ["--use_cpu", "true", "--bf16", "false"])
    training = recipe.training
    assert recipe.arguments.dataset_name == "meta-math/MetaMathQA"
    assert training.column_map == {"query": "prompt", "response": "completion"}
    assert recipe.arguments.chat_template == (name == "llama")
    assert (training.objective, training.k_min, training.k_max) == ("hard", 2, 16)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 128
    assert training.max_length == 160
    assert training.learning_rate == 1e-5
    assert (training.lr_scheduler_type.value, training.warmup_steps) == ("constant_with_warmup", 2000)
    assert training.max_steps == 100_000
    assert (training.optim.value, training.adam_beta1, training.adam_beta2) == ("adamw_torch", 0.9, 0.999)
    assert training.weight_decay == 0.01
    assert not recipe.model.use_peft
    assert (ROOT / yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())["deepspeed"]).is_file()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configurations(stage):
    values = json.loads((ROOT / "recipes" / "deepspeed" / f"zero{stage}.json").read_text())
    assert values["zero_optimization"]["stage"] == stage
    assert "optimizer" not in values
    assert values["zero_allow_untested_optimizer"]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_dry_run_with_deepspeed_in_two_processes(run_program, name, model, data, tmp_path):
    """Run the recipe with ZeRO under the real launcher."""
    pytest.importorskip("deepspeed")
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", ROOT / "recipes" / f"{name}.yaml", *DRY]
    command += ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    command += ["--per_device_train_batch_size", "2", "--global_batch_size", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = run_program(command, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.mtp["k_max"] == 16
    settings = json.loads((tmp_path / "out" / "mtp_provenance.json").read_text())["settings"]
    assert settings["gradient_accumulation_steps"] == 2


def test_deepspeed_that_would_be_switched_off_is_refused(write, tmp_path, monkeypatch):
    (tmp_path / "zero.json").write_text("{}")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(RecipeError, match="ACCELERATE_USE_CPU"):
        read_recipe(write(deepspeed=str(tmp_path / "zero.json")))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dry_run(path, model, data, tmp_path):
    """Run two steps of every published recipe without DeepSpeed, then load the saved folder."""
    recipe = without_deepspeed(path, tmp_path)
    options = [*DRY, "--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(model)]
    options += ["--per_device_train_batch_size", "2"]
    values = yaml.safe_load(recipe.read_text())
    if "global_batch_size" in values:
        options += ["--global_batch_size", "4"]
    if values["dataset_name"] == "word_problems":
        options += ["--dataset_size", "12"]
    else:
        options += ["--dataset_name", str(data)]
        if "column_map" not in values:
            options += ["--column_map", '{"query": "prompt", "response": "completion"}']
    if "model_config" in values:
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        options += ["--model_config", json.dumps(values["model_config"] | small), "--dataset_num_proc", "1"]
    train(read_recipe(recipe, options))
    if values.get("adapter_only"):
        saved, _ = load_student(tmp_path / "out", base=str(model))
        assert saved.config.mtp["k_max"] == values["k_max"]
        assert saved.generation_config.verify
        return
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.num_parameters() > 0
    mtp = getattr(saved.config, "mtp", None)
    assert (mtp is None) if values.get("trainer") == "sft" else (mtp["k_max"] == values["k_max"])


@pytest.mark.parametrize("overrides", [["--trainer", "sft"], ["--trainer=sft"]])
def test_the_command_line_selects_the_trainer_in_either_spelling(write, overrides):
    recipe = read_recipe(write(), overrides)
    assert isinstance(recipe.training, SFTRecipeConfig)
    assert recipe.arguments.trainer == "sft"

"""The console script: quick help, subcommands, recipes with overrides."""

import subprocess
import sys
from pathlib import Path

import pytest

import mtp_trl
from mtp_trl import cli, launch

ROOT = Path(__file__).resolve().parents[1]


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom mtp_trl.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main([name, "--help"])
    assert exited.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 3


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("lm_eval", ["eval", "nowhere", "--tasks", "gsm8k_cot"]), ("scipy", ["calibrate", "nowhere", "--data", "nothing.jsonl"])],
)
def test_a_missing_extra_is_named_before_anything_else(package, arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(arguments) == 2
    assert f"needs {package}, which is not installed; pip install 'mtp-trl[eval]'." in capsys.readouterr().err


def test_without_a_command_it_lists_all_commands(capsys):
    assert cli.main([]) == 2
    shown = capsys.readouterr().err
    assert all(name in shown for name in cli.COMMANDS)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(["--version"])
    assert exited.value.code == 0
    assert mtp_trl.__version__ in capsys.readouterr().out


MODEL = str(ROOT / "models" / "tiny_exact_long")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evl", "x"], "there is no command 'evl' (did you mean eval?)"),
        (["eval", "x", "--tresholds", "0.9"], "unrecognized arguments: --tresholds 0.9 (did you mean --thresholds?)"),
        (["eval", "x", "--thresholds", "high"], "'high' is neither a probability such as 0.9"),
        (["eval", "x", "--static", "2,x"], "'x' is not a whole number >= 1"),
        (["eval", "x", "--batch-size", "0"], "'0' is not a whole number >= 1"),
        (["eval", "x", "--blocks", "0"], "'0' is not a whole number >= 1"),
        (["eval", "x", "--blocks", "8"], "--blocks needs --verify"),
        (["eval", "x", "--output", __file__], "is a file, but a folder is needed"),
        (["eval", "x", "--task-data", "gsm8k_cot"], "is not TASK=FILE"),
        (["show", "x", "y", "--k", "few"], "'few' is not a whole number >= 1"),
        (["show", "x", "y", "--html", "/no/such/folder/page.html"], "it must be a file in an existing folder"),
    ],
)
def test_invalid_arguments_are_reported_before_anything_loads(arguments, message, capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(arguments)
    assert exited.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "no_such_folder"], "There is no folder 'no_such_folder', and it cannot be read as a Hub id"),
        (["eval", str(ROOT / "docs")], "has no model (no config.json)"),
        (["eval", MODEL, "--base", "no_such_folder"], "There is no folder 'no_such_folder'"),
        (["eval", MODEL, "--thresholds", "1.5"], "must be a probability in [0, 1], got 1.5"),
        (["eval", MODEL, "--data", "no_such.jsonl"], "There is no file 'no_such.jsonl'"),
        (["generate", MODEL, "no_such.jsonl", "--output", "a.jsonl"], "There is no file 'no_such.jsonl'"),
        (["generate", MODEL, "no_such.jsonl", "--output", "a.jsonl", "--seed", "1"], "seed=1 has no effect on greedy decoding"),
        (["show", "no_such_folder", "Hello"], "There is no folder 'no_such_folder'"),
        (["calibrate", "no_such_folder"], "no_such_folder is not a folder"),
        (["push", "no_such_folder", "me/model"], "There is no folder 'no_such_folder'"),
        (["export", "no_such_folder", "out"], "There is no folder 'no_such_folder'"),
        (["export", MODEL, "out", "--results", "no_such.json"], "There is no file 'no_such.json'"),
        (["estimate", "no_such.yaml"], "There is no recipe no_such.yaml"),
        (
            ["train", "--config", str(ROOT / "recipes" / "tiny_exact.yaml"), "--lerning_rate", "3"],
            "(did you mean 'learning_rate'?).",
        ),
    ],
)
def test_missing_inputs_and_invalid_values_are_reported_with_a_remedy(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_train_passes_the_recipe_and_its_overrides_on(monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "main", lambda path, overrides: seen.append((path, overrides)) or 7)
    assert cli.main(["train", "--config", "a.yaml", "--max_steps", "3", "--bf16=false"]) == 7
    assert seen == [(Path("a.yaml"), ["--max_steps", "3", "--bf16=false"])]


def test_train_needs_a_recipe(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert "--config" in capsys.readouterr().err


def test_a_recipe_without_the_launch_line_is_read(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name: x\n")
    assert cli.main(["train", "--config", str(path)]) == 2
    assert "'model_name'" in capsys.readouterr().err


def test_other_commands_take_no_unknown_options(capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(["env", "--verbose"])
    assert exited.value.code == 2
    assert "unrecognized arguments: --verbose" in capsys.readouterr().err


def test_env_names_versions_and_hardware(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"mtp-trl: {mtp_trl.__version__}" in out
    for name in ("torch: ", "transformers: ", "trl: ", "hardware: "):
        assert name in out

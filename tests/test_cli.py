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
    with pytest.raises(SystemExit) as left:
        cli.main([name, "--help"])
    assert left.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_without_a_command_it_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([])
    assert left.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_train_hands_the_recipe_and_its_overrides_on(monkeypatch):
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
    with pytest.raises(SystemExit) as left:
        cli.main(["env", "--verbose"])
    assert left.value.code == 2
    assert "unrecognized arguments: --verbose" in capsys.readouterr().err


def test_env_names_versions_and_hardware(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"mtp-trl: {mtp_trl.__version__}" in out
    for name in ("torch: ", "transformers: ", "trl: ", "hardware: "):
        assert name in out

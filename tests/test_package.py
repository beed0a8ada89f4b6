"""Test the installed package: fast import, console script, and data files in the wheel."""

import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import mtp_trl

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DATA = [
    "mtp_trl/py.typed",
    *(f"mtp_trl/custom_generate/{path.name}" for path in (ROOT / "mtp_trl" / "custom_generate").glob("*.py")),
    "mtp_trl/publishing/earlier_decoders.json",
    "mtp_trl/publishing/model_card_template.md",
    "mtp_trl/word_problems/base/config.json",
    "mtp_trl/word_problems/base/model.safetensors",
    "mtp_trl/word_problems/base/tokenizer.json",
]


def test_importing_the_package_does_not_import_torch():
    code = "import sys, mtp_trl; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", mtp_trl.__all__)
def test_every_public_name_resolves(name):
    assert getattr(mtp_trl, name) is not None


def test_an_unknown_name_raises_an_error_that_contains_it():
    with pytest.raises(AttributeError, match="MTPTrainer"):
        _ = mtp_trl.MTPTrainer


def test_the_package_and_pyproject_have_the_same_version():
    assert PROJECT["version"] == mtp_trl.__version__


def test_console_script_is_the_command_line_tool():
    target = PROJECT["scripts"]["mtp-trl"]
    module, function = target.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert [entry.value for entry in entry_points(group="console_scripts", name="mtp-trl")] == [target]


def test_constraints_pin_every_direct_dependency():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in pins.splitlines() if "==" in line}
    for requirement in PROJECT["dependencies"]:
        assert requirement.split(">=")[0].lower().replace("_", "-") in pinned
    assert "torch==2.13.0\n" in pins
    assert "://" not in pins


def test_the_wheel_contains_the_data_files(tmp_path):
    """The wheel is built from a copy, so that the checkout stays clean, and without a package index."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "mtp_trl", source / "mtp_trl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("mtp_trl-*.whl")
    assert set(DATA) <= set(zipfile.ZipFile(wheel).namelist())

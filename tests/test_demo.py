"""The demo with a scripted training run: what it prints, and how it reports a failed run."""

import json
import sys

import pytest
import yaml

from mtp_trl.apps import demo
from mtp_trl.cli import main
from mtp_trl.evaluation.sweep import Record
from mtp_trl.publishing.report import Setting

LOG = {"loss": "1.5", "agreement/place_1": "1", "agreement/place_2": "0.636", "acceleration/confadapt_0.5": "2.46"}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "base"}))
    return path


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """Replace `accelerate` by a program that prints a trainer's log and exits with the given status."""

    def install(status):
        program = tmp_path / "accelerate"
        program.write_text(f"#!{sys.executable}\nprint('hello')\nprint({json.dumps(LOG)})\nraise SystemExit({status})\n")
        program.chmod(0o755)
        monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: str(tmp_path))

    return install


def test_training_logs_are_shortened(recipe, launcher, tmp_path, capsys):
    launcher(0)
    demo._train(recipe, tmp_path / "model", demo.Console())
    printed = capsys.readouterr().out
    assert "$ accelerate launch" in printed
    assert "hello" in printed
    assert "agreement by position 1.00 0.64  tokens per pass 2.46 at 0.5" in printed


def test_failed_training_is_reported_with_its_command(recipe, launcher, tmp_path):
    launcher(3)
    with pytest.raises(ChildProcessError, match=r"exit status 3.*accelerate launch"):
        demo.run_demo(recipe=recipe, output=tmp_path / "out")


def test_without_a_checkout_the_demo_says_what_it_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    assert "from a checkout" in capsys.readouterr().err


def test_the_answer_shown_is_the_first_right_one():
    answers = [Record(text, (1,), (1,), 1, 0.1, correct) for text, correct in (("a", False), ("b", True), ("c", True))]
    assert demo._answer_to_show(answers) == (1, answers[1])
    assert demo._answer_to_show(answers[:1]) == (0, answers[0])


def test_the_setting_of_the_answer_shown_is_in_the_table():
    assert demo.SHOWN in demo.SETTINGS
    assert Setting("base") in demo.SETTINGS

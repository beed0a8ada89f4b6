"""Test that `check-decoder` recognises the code in a repository before it runs."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from mtp_trl import __version__
from mtp_trl.cli import main
from mtp_trl.evaluation.loading import load_student
from mtp_trl.publishing import decoder_check
from mtp_trl.publishing.decoder_check import check_decoder, digest
from mtp_trl.publishing.repository import DECODER_FILE, decoder_files, link_decoder

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def student(write_student, tmp_path):
    return write_student(tmp_path / "student", confadapt=0.5, verify=True)


def test_an_unmodified_decoder_is_recognised(student, capsys):
    check = check_decoder(student)
    assert (check.version, check.is_safe, check.commit) == (__version__, True, None)
    assert main(["check-decoder", str(student)]) == 0
    assert f"has the unmodified decoder of mtp-trl {__version__}" in capsys.readouterr().out


def test_windows_line_endings_are_ignored(student):
    for name in decoder_files():
        path = student / "custom_generate" / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert check_decoder(student).is_safe


def test_a_link_to_the_installed_decoder_is_recognised(student):
    for path in (student / "custom_generate").glob("*.py"):
        path.unlink()
    link_decoder(student)
    assert check_decoder(student).version == __version__


def test_a_decoder_of_an_earlier_version_is_recognised(student, monkeypatch):
    for path in (student / "custom_generate").glob("*.py"):
        path.unlink()
    (student / DECODER_FILE).write_text("# earlier version")
    monkeypatch.setitem(decoder_check._EARLIER_DIGESTS, "0.0.1", digest({"generate.py": "# earlier version"}))
    assert check_decoder(student).version == "0.0.1"


def test_the_code_of_the_base_that_an_adapter_names_is_checked(student, write_student, tmp_path, capsys):
    """`from_pretrained` follows `adapter_config.json` to the base and runs the base's code."""
    base = write_student(tmp_path / "base", confadapt=0.5, verify=True)
    (student / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert check_decoder(student).is_safe
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    assert main(["check-decoder", str(student)]) == 1
    assert "would run other code" in capsys.readouterr().out
    (student / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "missing")}))
    assert not check_decoder(student).is_safe


@pytest.mark.parametrize("name", ["generate.py", "rows.py", "sampling.py"])
def test_a_change_in_any_decoder_file_is_detected(student, name, capsys):
    path = student / "custom_generate" / name
    path.write_text(path.read_text() + "\nimport os\n")
    assert not check_decoder(student).is_safe
    assert main(["check-decoder", str(student)]) == 1
    assert "has a decoder that differs from mtp-trl's" in capsys.readouterr().out


def test_a_missing_imported_file_is_detected(student):
    (student / "custom_generate" / "pace.py").unlink()
    assert not check_decoder(student).is_safe


def test_a_file_that_nothing_imports_is_ignored(student):
    (student / "custom_generate" / "other.py").write_text("import os")
    assert check_decoder(student).is_safe


@pytest.mark.parametrize(("file", "key"), [("config.json", "auto_map"), ("config.json", "custom_pipelines")])
def test_other_code_in_the_repository_is_named(student, file, key, capsys):
    config = json.loads((student / file).read_text())
    (student / file).write_text(json.dumps(config | {key: {"AutoModelForCausalLM": "modeling_evil.Evil"}}))
    assert not check_decoder(student).is_safe
    assert main(["check-decoder", str(student)]) == 1
    assert "modeling_evil.Evil" in capsys.readouterr().out


def test_a_repository_without_a_decoder_is_safe(student):
    for path in (student / "custom_generate").glob("*.py"):
        path.unlink()
    check = check_decoder(student)
    assert check.is_safe
    assert "decodes one token per pass" in check.sentence


def test_a_missing_repository_is_an_error(online, capsys):
    assert main(["check-decoder", "nobody/nothing"]) == 2
    assert "nobody/nothing" in capsys.readouterr().err


# ---- checks before a model from the Hub is loaded ----


def upload(folder, name):
    api = HfApi(token="hf_test")
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Use a temporary folder as the Hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_an_unmodified_decoder_is_loaded_at_the_checked_commit_without_trust_remote_code(online, student, cache, monkeypatch):
    upload(student, "me/ours")
    revisions = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: revisions.append(k.get("revision")) or load(*a, **k)
    )
    model, _ = load_student("me/ours")
    assert revisions == [online.repositories["me/ours"].head]
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[1] <= 4


@pytest.mark.parametrize(
    "command",
    [["eval", "me/evaluated", "--limit", "1"], ["show", "me/shown", "x"], ["app", "me/served"]],
    ids=lambda command: command[0],
)
def test_other_code_runs_only_with_trust_remote_code(online, student, cache, command, capsys, monkeypatch, tmp_path):
    evil = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\ndef generate(*args, **kwargs): ...\n"
    (student / DECODER_FILE).write_text(evil)
    name = command[1]  # a different name for each command, because the client caches commits
    upload(student, name)
    monkeypatch.setattr("mtp_trl.argument_types.find_spec", lambda name: name)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"{name} at commit " in error
    assert "pass --trust-remote-code" in error
    assert not (tmp_path / "ran").exists()
    load_student(name, trust_remote_code=True)
    assert (tmp_path / "ran").exists()

"""Test that the published provenance contains no secrets and no local paths."""

import json
import sys

import pytest

from mtp_trl import MTPDistillConfig
from mtp_trl.modeling.files import _PACKAGE, public_name
from mtp_trl.publishing.provenance import provenance_of_run, run_facts


def test_provenance_holds_no_paths_and_no_tokens(tmp_path):
    args = MTPDistillConfig(str(tmp_path), use_cpu=True, bf16=False, hub_token="hf_secret")
    written = json.dumps(provenance_of_run(base_model="org/base", args=args, mask_token="<|mtp|>")["settings"])
    assert "hf_secret" not in written
    assert str(tmp_path) not in written


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--hub_token", "hf_abcdef", "--max_new_tokens", "256"], "--hub_token '***' --max_new_tokens 256"),
        (["--hub_token=hf_abcdef", "--seed", "1"], "'--hub_token=***' --seed 1"),
        (["--HF_TOKEN", "q", "--Hub-Token=q", "--seed", "1"], "--HF_TOKEN '***' '--Hub-Token=***' --seed 1"),
        (["--token", "x", "--private"], "--token '***' --private"),
        (["--note", "with hf_abcdef inside"], "--note 'with *** inside'"),
        (["/opt/me/recipe.yaml", "--output_dir=/opt/me/out", "runs/x"], "recipe.yaml --output_dir=out runs/x"),
    ],
)
def test_a_command_is_published_without_secrets_and_local_paths(monkeypatch, arguments, shown):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mtp-trl", *arguments])
    assert run_facts()["command"] == f"mtp-trl {shown}"


def test_a_setting_that_holds_a_token_is_left_out(tmp_path):
    args = MTPDistillConfig(str(tmp_path), use_cpu=True, bf16=False, run_name="hf_secret", seed=3)
    settings = provenance_of_run(base_model="org/base", args=args, mask_token="<|mtp|>")["settings"]
    assert "hf_secret" not in json.dumps(settings)
    assert settings["seed"] == 3


def test_nested_settings_are_kept_without_secrets_and_paths(tmp_path):
    options = {
        "num_decay_steps": 1600,
        "inner": {"api_key": "q", "HF_Token": "q", "file": "/opt/q", "odd": object(), "x": None},
    }
    args = MTPDistillConfig(str(tmp_path), use_cpu=True, bf16=False, lr_scheduler_kwargs=options)
    args.model_init_kwargs = {"token": "hf_secret", "revision": "v2", "note": "hf_secret", "parts": [{"password": "q"}]}
    settings = provenance_of_run(base_model="org/base", args=args, mask_token="<|mtp|>")["settings"]
    assert settings["lr_scheduler_kwargs"] == {"num_decay_steps": 1600, "inner": {"x": None}}
    assert settings["model_init_kwargs"] == {"revision": "v2"}
    assert "accelerator_config" not in settings
    json.dumps(settings)


def test_public_names_contain_no_local_paths(tmp_path):
    assert public_name("org/base") == "org/base"
    assert public_name(str(tmp_path)) == tmp_path.name
    assert public_name("../data/nowhere/train.jsonl") == "train.jsonl"
    assert public_name(str(_PACKAGE / "word_problems" / "base")) == "mtp_trl/word_problems/base"

"""A folder as it is published decodes like the model in memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoding_reference import BARRED, NEW, decode, greedy, padded, prompts, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from mtp_trl.custom_generate import generate as decoder


@pytest.fixture
def repository(tiny_model, tmp_path) -> Path:
    """A folder as it is uploaded: weights, configs, tokenizer and decoder."""
    model = tiny_model("llama")
    model.generation_config.update(confadapt=0.4, verify=True, allow_custom_entries=True)
    model.generation_config._from_model_config = False
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    shutil.copytree(
        Path(decoder.__file__).parent,
        tmp_path / "model" / "custom_generate",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path / "model"


def test_a_published_folder_decodes_alike(repository, tiny_model):
    model, rows = tiny_model("llama"), prompts()
    loaded = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)
    assert loaded.generation_config.confadapt == 0.4
    assert loaded.generation_config.verify is True
    assert loaded.config.mtp == model.config.mtp
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(loaded.generate(**padded(rows), **options), greedy(model, rows))
    torch.manual_seed(0)
    ours = decode(model, rows, confadapt=0.4, verify=False)
    theirs = loaded.generate(**padded(rows), verify=False, return_dict_in_generate=True, **options)
    assert torch.equal(theirs.sequences, ours.sequences)
    assert theirs.block_lengths == ours.block_lengths
    assert sys.modules[type(theirs).__module__].__file__ != decoder.__file__


def test_decoding_defaults_survive_another_round_trip(repository, tmp_path):
    AutoModelForCausalLM.from_pretrained(repository).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert saved["confadapt"] == 0.4
    assert saved["verify"] is True


def test_without_remote_code_the_folder_is_the_plain_model(repository, tiny_model):
    loaded, rows = AutoModelForCausalLM.from_pretrained(repository), prompts()
    plain = loaded.generate(**padded(rows), max_new_tokens=NEW, do_sample=False, suppress_tokens=BARRED)
    assert torch.equal(plain, greedy(tiny_model("llama"), rows))


def test_a_model_loaded_without_a_decoder_uses_that_of_a_folder(repository, tiny_model):
    """It is called with `custom_generate=FOLDER`."""
    model, rows = tiny_model("llama"), prompts()
    output = model.generate(
        **padded(rows), custom_generate=str(repository), trust_remote_code=True, confadapt=0.4, max_new_tokens=NEW,
        do_sample=False, tokenizer=AutoTokenizer.from_pretrained(repository),
    )  # fmt: skip
    assert torch.equal(output, decode(model, rows, confadapt=0.4).sequences)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, return_dict_in_generate=True).sequences.tolist())
"""


def test_processes_may_load_at_once_into_an_empty_module_cache(repository, tiny_model, tmp_path):
    """transformers copies the decoder's files into this cache without a lock."""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, repository], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    expected = decode(tiny_model("llama"), [[5, 6, 7]], confadapt=0.4, verify=True, max_new_tokens=8)
    for program in programs:
        output, errors = program.communicate(timeout=300)
        assert program.returncode == 0, errors
        assert output.strip() == str(expected.sequences.tolist())

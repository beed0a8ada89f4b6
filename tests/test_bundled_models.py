"""Test that the bundled adapted models are small, load in transformers and decode exactly."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin

from mtp_trl.custom_generate import forward
from mtp_trl.custom_generate.generate import attach_decoder
from mtp_trl.publishing.repository import is_linked_decoder
from mtp_trl.word_problems import test_problems

ROOT = Path(__file__).resolve().parents[1]
MODELS = sorted((ROOT / "models").iterdir())
BASE = ROOT / "mtp_trl" / "word_problems" / "base"


def decode(model, count=16, **options):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    prompts = [problem.prompt for problem in test_problems(count)]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    return model.generate(**inputs, do_sample=False, max_new_tokens=192, return_dict_in_generate=True, **options)


def test_every_long_recipe_has_a_bundled_model():
    assert {path.name for path in MODELS} == {path.stem for path in (ROOT / "recipes").glob("*_long.yaml")}


@pytest.mark.parametrize("folder", [BASE, *MODELS], ids=lambda path: path.name)
def test_a_bundled_model_is_small(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8e6


@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
def test_a_bundled_model_uses_the_decoder_of_the_installed_package(folder):
    """If this fails, run `python benchmarks/publish_models.py`."""
    assert is_linked_decoder(folder)
    assert {path.suffix for path in (folder / "custom_generate").iterdir()} <= {".py", ".safetensors"}


@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
def test_plain_transformers_decodes_a_bundled_model_in_blocks(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    fast = decode(model)  # the model's defaults: verified
    plain = decode(model, mtp_k=1)
    assert torch.equal(fast.sequences, plain.sequences)
    assert fast.acceleration > 3.5
    provenance = json.loads((folder / "mtp_provenance.json").read_text())
    if provenance["settings"].get("exact"):
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        barred = model.config.mtp["barred_token_ids"]
        assert torch.equal(fast.sequences, decode(base, suppress_tokens=barred, pad_token_id=2).sequences)


@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
def test_equivalent_ways_of_decoding_give_the_same_text_with_trained_weights(folder, monkeypatch):
    """Other tests check these properties with random weights.

    Verified greedy text equals that of transformers' own `generate`, with every option. Verified sampling equals sampling one
    token per pass with the same seed. Unverified text is the same for a padded batch, for single rows and without a cache.
    """
    model = attach_decoder(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    prompts = [problem.prompt for problem in test_problems(6)]
    plain = {"max_new_tokens": 96, "do_sample": False, "pad_token_id": 2}

    def texts(prompts, seed=None, **options) -> tuple[list[str], list[list[int]]]:
        inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        options = {**plain, "do_sample": seed is not None, "return_dict_in_generate": True, **options}
        torch.manual_seed(seed or 0)
        output = model.generate(**inputs, **options)
        ids = output.sequences[:, inputs["input_ids"].shape[1] :]
        return tokenizer.batch_decode(ids, skip_special_tokens=True), output.block_lengths

    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    barred = model.config.mtp["barred_token_ids"]
    greedy = GenerationMixin.generate(model, **inputs, **plain, suppress_tokens=barred)[:, inputs["input_ids"].shape[1] :]
    expected = tokenizer.batch_decode(greedy, skip_special_tokens=True)
    assert texts(prompts, mtp_k=1, verify=False)[0] == expected
    for options in ({"mtp_k": 4}, {"confadapt": 0.9}, {"mtp_blocks": 8}, {"mtp_k": "auto"}, {"cache_implementation": "static"}):
        assert texts(prompts, verify=True, **options)[0] == expected
    confident = texts(prompts, confadapt=0.8, verify=False)
    sampled = texts(prompts, seed=3, mtp_k=1, verify=False)[0]
    assert texts(prompts, seed=3, verify=True, mtp_k=8)[0] == texts(prompts, seed=3, verify=True, confadapt=0.9)[0] == sampled
    for prompt, text, blocks in zip(prompts, *confident, strict=True):
        assert texts([prompt], confadapt=0.8, verify=False) == ([text], [blocks])
    monkeypatch.setattr(forward, "ATTENTION_LAYERS", set())
    with pytest.warns(UserWarning, match="without a cache"):
        assert texts(prompts, confadapt=0.8, verify=False) == confident

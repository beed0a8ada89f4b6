"""The bundled adapted models: small, loaded as any user loads them, exact where they say so, with the package's decoder."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtp_trl.custom_generate import generate as decoder
from mtp_trl.word_problems import test_problems

ROOT = Path(__file__).resolve().parents[1]
MODELS = sorted((ROOT / "models").iterdir())
BASE = ROOT / "mtp_trl" / "word_problems" / "base"


def decode(model, count=16, **options):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    prompts = [problem.prompt for problem in test_problems(count)]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    return model.generate(**inputs, do_sample=False, max_new_tokens=192, return_dict_in_generate=True, **options)


def test_every_long_recipe_has_one():
    assert {path.name for path in MODELS} == {path.stem for path in (ROOT / "recipes").glob("*_long.yaml")}


@pytest.mark.parametrize("folder", [BASE, *MODELS], ids=lambda path: path.name)
def test_a_bundled_model_is_small(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8e6


@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
def test_its_decoder_is_the_packages(folder):
    """Mended by `python benchmarks/publish_models.py`."""
    assert (folder / "custom_generate" / "generate.py").read_text() == Path(decoder.__file__).read_text()


@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
def test_plain_transformers_decodes_it_in_blocks(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    fast = decode(model)  # its own defaults: verified
    plain = decode(model, mtp_k=1)
    assert torch.equal(fast.sequences, plain.sequences)
    assert fast.acceleration > 3.5
    provenance = json.loads((folder / "mtp_provenance.json").read_text())
    if provenance["settings"].get("exact"):
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        barred = model.config.mtp["barred_token_ids"]
        assert torch.equal(fast.sequences, decode(base, suppress_tokens=barred, pad_token_id=2).sequences)

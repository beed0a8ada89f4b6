"""A model's folder, its card, and the way to a Hub and back through the real client."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_trl import MTPDistillConfig, hub

HERE = Path(__file__).parent

ROUND_TRIP = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from mtp_trl import MTPDistillConfig, MTPDistillTrainer
from mtp_trl.word_problems import load_dataset

folder, tokenizer_folder, adapters = sys.argv[1:]
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=768, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)).save_pretrained(folder + "_base")
base = LlamaForCausalLM.from_pretrained(folder + "_base")
model = LlamaForCausalLM.from_pretrained(folder + "_base")
peft_config = None
if adapters == "lora":
    from peft import LoraConfig
    peft_config = LoraConfig(r=2, target_modules=["q_proj"])
trainer = MTPDistillTrainer(
    model,
    MTPDistillConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to="none", k_max=4, slots_per_row=8, max_steps=1,
        per_device_train_batch_size=2, hub_model_id="me/tiny-mtp", hub_token="hf_test", confadapt=0.001, save_steps=1,
        exact=adapters in ("exact", "adapter_only"), adapter_only=adapters == "adapter_only", exact_rank=2,
    ),
    load_dataset("train", 4, 0),
    processing_class=AutoTokenizer.from_pretrained(tokenizer_folder),
    peft_config=peft_config,
)
trainer.train()
trainer.push_to_hub()
ids = torch.tensor([[0, 5, 6, 7]])
expected = trainer.model.generate(input_ids=ids, confadapt=0.001, max_new_tokens=12)
options = {}
if adapters == "adapter_only":
    again, options = base, {"custom_generate": "me/tiny-mtp", "trust_remote_code": True}
else:
    again = AutoModelForCausalLM.from_pretrained("me/tiny-mtp", trust_remote_code=True)
assert torch.equal(again.generate(ids, max_new_tokens=12, **options), expected)
plain = again.generate(ids, mtp_k=1, max_new_tokens=12, **options)
assert torch.equal(again.generate(ids, confadapt=0.9, verify=True, max_new_tokens=12, **options), plain)
drafts = trainer.model.generate(input_ids=ids, confadapt=0.0, verify=False, max_new_tokens=12)
assert torch.equal(again.generate(ids, confadapt=0.0, verify=False, max_new_tokens=12, **options), drafts)
if adapters in ("exact", "adapter_only"):
    assert torch.equal(expected, base.generate(ids, max_new_tokens=12, suppress_tokens=[766]))
mask_id = AutoTokenizer.from_pretrained("me/tiny-mtp").convert_tokens_to_ids("<|mtp|>")
assert mask_id == trainer.model.config.mtp["mask_token_id"]
from huggingface_hub import HfApi
print("FILES", *sorted(HfApi().list_repo_files("me/tiny-mtp")))
"""


@pytest.fixture
def stub():
    process = subprocess.Popen(
        [sys.executable, str(HERE / "hub_stub.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.communicate()


@pytest.mark.parametrize("adapters", ["full", "lora", "exact", "adapter_only"])
def test_a_pushed_model_comes_back_by_its_id_and_decodes_alike(run_program, stub, tmp_path, adapters):
    environment = {
        **os.environ, "HF_ENDPOINT": stub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_test",
    }  # fmt: skip
    tokenizer = Path(hub.__file__).parent / "word_problems" / "base"
    script = tmp_path / "round_trip.py"
    script.write_text(ROUND_TRIP)
    done = run_program([script, tmp_path / "out", tokenizer, adapters], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    files = next(line for line in done.stdout.splitlines() if line.startswith("FILES")).split()[1:]
    expected = {"README.md", "custom_generate/generate.py", "mtp_provenance.json", "tokenizer.json"}
    whole = {"config.json", "generation_config.json", "model.safetensors"}
    exact = {"custom_generate/mtp_adapter.safetensors"}
    assert expected <= set(files)
    assert (whole <= set(files)) == (adapters != "adapter_only")
    assert (exact <= set(files)) == (adapters in ("exact", "adapter_only"))
    assert "adapter_config.json" not in files  # transformers would load the adapter at every token
    assert not [file for file in files if "__pycache__" in file or "optimizer" in file or "checkpoint" in file]


def provenance(base: str, tmp_path: Path, **changes) -> dict:
    args = MTPDistillConfig(str(tmp_path), use_cpu=True, bf16=False, **(changes or {"ntp_coef": 0.5}))
    return hub.provenance(base_model=base, args=args, mask_token="<|mtp|>")


def test_a_card_names_its_base_and_its_limits(tmp_path):
    path = hub.write_card(tmp_path, model_name="me/small", provenance=provenance("org/base", tmp_path), repo_id="me/small")
    text = path.read_text()
    assert "base_model: org/base" in text
    assert "base_model_relation: finetune" in text
    assert "trust_remote_code=True" in text
    assert "## Limits" in text
    assert '"ntp_coef": 0.5' in text
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_card_of_exact_mode_says_what_is_exact_and_how_to_use_it(tmp_path, adapter_only):
    facts = provenance("org/base", tmp_path, exact=True, adapter_only=adapter_only)
    text = hub.write_card(tmp_path, model_name="exact", provenance=facts, repo_id="me/exact").read_text()
    assert "every word of it remains the base" in text
    assert "confadapt=0.5" in text
    assert "Training changes the model" not in text
    assert ("base_model_relation: adapter" in text) == adapter_only
    assert ('custom_generate="me/exact", trust_remote_code=True' in text) == adapter_only
    assert ('from_pretrained("me/exact", trust_remote_code=True)' in text) != adapter_only
    assert "{%" not in text
    assert "\n\n\n" not in text


def test_a_base_in_a_folder_is_not_presented_as_a_hub_model(tmp_path):
    text = hub.write_card(tmp_path, model_name="small", provenance=provenance(str(tmp_path), tmp_path)).read_text()
    assert "base_model:" not in text
    assert str(tmp_path) not in text


def test_provenance_holds_no_paths_and_no_tokens(tmp_path):
    args = MTPDistillConfig(str(tmp_path), use_cpu=True, bf16=False, hub_token="hf_secret")
    written = json.dumps(hub.provenance(base_model="org/base", args=args, mask_token="<|mtp|>")["settings"])
    assert "hf_secret" not in written
    assert str(tmp_path) not in written

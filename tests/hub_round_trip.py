"""Train a model, push it and load it from the Hub, in every form in which a model is saved.

Run as a program, with HF_ENDPOINT set to the address of the local Hub (see hub_stub.py):

    python tests/hub_round_trip.py OUTPUT TOKENIZER
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from mtp_trl import MTPDistillConfig, MTPDistillTrainer
from mtp_trl.evaluation.loading import load_student
from mtp_trl.publishing.export import export
from mtp_trl.word_problems import load_dataset

IDS = torch.tensor([[0, 5, 6, 7]])


def make_base(folder, rows=768):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def train_and_push(kind, folder, base, tokenizer):
    """Train two steps, with a push after each step and one at the end."""
    args = MTPDistillConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        k_max=4,
        slots_per_row=8,
        max_steps=2,
        per_device_train_batch_size=2,
        push_to_hub=True,
        hub_model_id=f"me/{kind}",
        hub_strategy="every_save",
        hub_always_push=True,
        hub_token="hf_test",
        confadapt=0.001,
        save_steps=1,
        exact=kind in ("exact", "adapter_only"),
        adapter_only=kind in ("adapter_only", "lora_adapter_only"),
        learning_rate=1e-2,
        exact_rank=2,
    )
    trainer = MTPDistillTrainer(
        LlamaForCausalLM.from_pretrained(base),
        args,
        load_dataset("train", 4, 0),
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"]) if kind.startswith("lora") else None,
    )
    trainer.train()
    trainer.push_to_hub(dataset_name="word_problems")
    return trainer.model


def generate(model, **options):
    return model.generate(input_ids=IDS, max_new_tokens=12, **options)


def check(model, trained, **options):
    """Check that a model decodes like the trained one: with the saved defaults, verified, and in whole blocks."""
    assert torch.equal(generate(model, **options), generate(trained, confadapt=0.001))
    assert torch.equal(generate(model, confadapt=0.9, verify=True, **options), generate(model, mtp_k=1, **options))
    drafts = generate(trained, confadapt=0.0, verify=False)
    assert torch.equal(generate(model, confadapt=0.0, verify=False, **options), drafts)


def check_pipeline(repository, trained):
    generator = pipeline("text-generation", repository, trust_remote_code=True)
    inputs = generator.tokenizer("Tom has", return_tensors="pt")
    ids = trained.generate(**inputs, confadapt=0.001, max_new_tokens=12)
    text = generator.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert generator("Tom has", max_new_tokens=12, do_sample=False)[0]["generated_text"] == text


def check_lora_adapter_only(repository, trained, base, folder):
    """Check the LoRA, loaded in several ways, on a base whose vocabulary has no row for the mask."""
    options = {"custom_generate": repository, "trust_remote_code": True}
    plain = LlamaForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=r"no LoRA at .* load it first"):
        generate(plain, **options)
    plain_text = generate(plain)
    adapted = PeftModel.from_pretrained(plain, repository)
    check(adapted, trained, **options)
    check(plain, trained, **options)  # PEFT adds its layers to the base in place
    with adapted.disable_adapter():
        assert torch.equal(generate(adapted), plain_text)
        assert not torch.allclose(adapted(IDS).logits, trained(IDS).logits[..., :766])
    assert torch.allclose(adapted(IDS).logits, trained(IDS).logits[..., :766], atol=1e-5)
    # AutoPeftModel enlarges the embedding matrix to the tokenizer.
    check(AutoPeftModelForCausalLM.from_pretrained(copy_with_local_base(repository, base)), trained, **options)
    for source in (repository, folder, export(folder, f"{folder}_adapter", adapter_only=True)):
        check(load_student(source, base=base)[0], trained)
    check(load_student(export(folder, f"{folder}_merged"))[0], trained)


def copy_with_local_base(repository, base):
    """Copy a repository and replace the name of its base, which is one on the Hub, by the local path."""
    copy = f"{base}_adapter"
    shutil.copytree(snapshot_download(repository), copy)
    path = Path(copy) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    return copy


def round_trip(kind, folder, base, tokenizer):
    trained = train_and_push(kind, folder, base, tokenizer)
    repository = f"me/{kind}"
    mask_id = AutoTokenizer.from_pretrained(repository).convert_tokens_to_ids("<|mtp|>")
    assert mask_id == (trained.get_base_model() if kind.startswith("lora") else trained).config.mtp["mask_token_id"]
    if kind == "lora_adapter_only":
        check_lora_adapter_only(repository, trained, base, folder)
        return
    if kind == "adapter_only":
        plain = LlamaForCausalLM.from_pretrained(base)
        check(plain, trained, custom_generate=repository, trust_remote_code=True)
        return
    check(AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True), trained)
    check_pipeline(repository, trained)
    check(load_student(export(folder, f"{folder}_exported"))[0], trained)
    if kind == "exact":
        plain = LlamaForCausalLM.from_pretrained(base)
        assert torch.equal(generate(trained, confadapt=0.001), generate(plain, suppress_tokens=[mask_id]))
        adapter = export(folder, f"{folder}_adapter", adapter_only=True)
        assert not list(adapter.glob("*.safetensors"))
        check(load_student(adapter, base=base)[0], trained)


if __name__ == "__main__":
    output, tokenizer_folder = sys.argv[1:]
    base_folder = str(Path(output) / "base")
    make_base(base_folder)
    small_folder = str(Path(output) / "small_base")
    make_base(small_folder, rows=766)
    round_trip("lora_adapter_only", str(Path(output) / "lora_adapter_only"), small_folder, tokenizer_folder)
    for name in ("full", "lora", "exact", "adapter_only"):
        round_trip(name, str(Path(output) / name), base_folder, tokenizer_folder)

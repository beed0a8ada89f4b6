"""Train, push, and load back by the Hub's id, in every form a model is saved in.

Run as a program, with HF_ENDPOINT naming the stand-in for the Hub: python tests/hub_round_trip.py OUTPUT TOKENIZER
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
    """Two steps, a push after each and one at the end."""
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
        adapter_only=kind in ("adapter_only", "lora_alone"),
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
    """A model decodes as the trained one does: with the defaults that travelled, verified, and in whole blocks."""
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


def check_lora_alone(repository, trained, base, folder):
    """On a base that knows no mask, whose matrix has no room for it, however the LoRA gets there."""
    options = {"custom_generate": repository, "trust_remote_code": True}
    plain = LlamaForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=r"no LoRA at .* put it on first"):
        generate(plain, **options)
    own = generate(plain)
    adapted = PeftModel.from_pretrained(plain, repository)
    check(adapted, trained, **options)
    check(plain, trained, **options)  # PEFT puts its layers into the base itself
    with adapted.disable_adapter():
        assert torch.equal(generate(adapted), own)
        assert not torch.allclose(adapted(IDS).logits, trained(IDS).logits[..., :766])
    assert torch.allclose(adapted(IDS).logits, trained(IDS).logits[..., :766], atol=1e-5)
    check(AutoPeftModelForCausalLM.from_pretrained(named_locally(repository, base)), trained, **options)  # grows the matrix
    for source in (repository, folder, export(folder, f"{folder}_alone", adapter_only=True)):
        check(load_student(source, base=base)[0], trained)
    check(load_student(export(folder, f"{folder}_merged"))[0], trained)


def named_locally(repository, base):
    """A copy that names the base where it lies: a repository names what is on the Hub."""
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
    if kind == "lora_alone":
        check_lora_alone(repository, trained, base, folder)
        return
    if kind == "adapter_only":
        plain = LlamaForCausalLM.from_pretrained(base)
        check(plain, trained, custom_generate=repository, trust_remote_code=True)
        return
    check(AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True), trained)
    check_pipeline(repository, trained)
    check(load_student(export(folder, f"{folder}_exported"))[0], trained)
    if kind == "exact":
        own = LlamaForCausalLM.from_pretrained(base)
        assert torch.equal(generate(trained, confadapt=0.001), generate(own, suppress_tokens=[mask_id]))
        alone = export(folder, f"{folder}_alone", adapter_only=True)
        assert not list(alone.glob("*.safetensors"))
        check(load_student(alone, base=base)[0], trained)


if __name__ == "__main__":
    output, tokenizer_folder = sys.argv[1:]
    base_folder = str(Path(output) / "base")
    make_base(base_folder)
    small_folder = str(Path(output) / "small_base")
    make_base(small_folder, rows=766)
    round_trip("lora_alone", str(Path(output) / "lora_alone"), small_folder, tokenizer_folder)
    for name in ("full", "lora", "exact", "adapter_only"):
        round_trip(name, str(Path(output) / name), base_folder, tokenizer_folder)

"""LoRA adapters of a run are saved with the mask token's row and decode on their base; see also test_push."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import mtp_trl.word_problems
from mtp_trl import MTPDistillConfig, MTPDistillTrainer
from mtp_trl.cli import main
from mtp_trl.custom_generate.adapter_file import ADAPTER_FILE
from mtp_trl.evaluation.loading import load_student
from mtp_trl.modeling.files import PROVENANCE_FILE
from mtp_trl.modeling.lora import adapts_head, with_mask_row
from mtp_trl.modeling.mask_token import add_mask_token, set_decoding_defaults
from mtp_trl.modeling.parallelism import Parallelism
from mtp_trl.publishing.card import render_card
from mtp_trl.publishing.export import export
from mtp_trl.publishing.merging import merge_folder, write_lora, write_mask_row
from mtp_trl.publishing.report import from_json
from mtp_trl.word_problems import load_dataset

# PEFT saves an enlarged embedding with the adapters, and warns about it
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
TOKENIZER = Path(mtp_trl.word_problems.__file__).parent / "base"
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
IDS = torch.tensor([[5, 6, 7]])


def write_base(folder, architecture="llama", rows=768):
    torch.manual_seed(0)
    if architecture == "gemma3":  # scales embeddings by the root of their size
        model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=rows, head_dim=16, sliding_window=64, **SIZES))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, **SIZES))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def trained(root, *, adapter=None, **changes):
    """Train `root/base` for two steps, and save it in `root/run`."""
    options = {
        "output_dir": str(root / "run"), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "k_max": 4,
        "slots_per_row": 8, "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True,
    }  # fmt: skip
    adapter = adapter or LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    trainer = MTPDistillTrainer(
        str(root / "base"), MTPDistillConfig(**options | changes), load_dataset("train", 8, 0), peft_config=adapter
    )
    trainer.train()
    trainer.save_model()
    return trainer


def test_provenance_and_card_describe_the_lora_before_and_after_merging(tmp_path):
    write_base(tmp_path / "base")
    trained(tmp_path, adapter=LoraConfig(r=2, lora_alpha=6, target_modules=["v_proj", "q_proj"]))
    for folder in (tmp_path / "run", export(tmp_path / "run", tmp_path / "merged")):
        facts = json.loads((folder / PROVENANCE_FILE).read_text())
        assert facts["adapter"] == {"kind": "lora", "rank": 2, "alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    assert "LoRA of rank 2 (alpha 6) on `q_proj, v_proj`" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize(("exact", "kind"), [(True, "exact"), (False, None)])
def test_the_provenance_of_a_run_without_lora_has_the_adapter_kind(tmp_path, exact, kind):
    write_base(tmp_path / "base")
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "k_max": 4, "exact": exact, "max_steps": 1}
    args = MTPDistillConfig(str(tmp_path / "run"), **options)
    adapter = LoraConfig(r=2, lora_alpha=6, target_modules="q_proj") if exact else None
    trainer = MTPDistillTrainer(str(tmp_path / "base"), args, load_dataset("train", 64, 0), peft_config=adapter)
    expected = {"kind": kind, "rank": 2, "alpha": 6, "target_modules": ["q_proj"]} if exact else None
    assert trainer.provenance["adapter"] == expected


@pytest.mark.parametrize(("architecture", "rows"), [("llama", 766), ("gemma3", 768)])
def test_an_exported_adapter_decodes_like_the_run(tmp_path, architecture, rows):
    write_base(tmp_path / "base", architecture, rows)
    trainer = trained(tmp_path)
    assert not (tmp_path / "run" / "README.md").exists()  # PEFT's generic card is removed
    exported = export(tmp_path / "run", tmp_path / "exported", adapter_only=True)
    with safe_open(exported / "adapter_model.safetensors", framework="pt") as file:
        assert {"lora_A" in name or "lora_B" in name for name in file.keys()} == {True}  # noqa: SIM118
    assert json.loads((exported / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    with safe_open(exported / ADAPTER_FILE, framework="pt") as file, torch.no_grad():
        mask = torch.tensor([trainer.model.get_base_model().config.mtp["mask_token_id"]])
        torch.testing.assert_close(file.get_tensor("mask_row"), trainer.model.get_input_embeddings()(mask)[0])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(exported))
    custom = {"custom_generate": str(exported), "trust_remote_code": True}
    for options in ({"confadapt": 0.0}, {"confadapt": 0.002}, {"verify": True}, {"mtp_k": 1}):
        expected = trainer.model.generate(input_ids=IDS, max_new_tokens=12, **options)
        assert torch.equal(adapted.generate(input_ids=IDS, max_new_tokens=12, **options, **custom), expected)
        for folder in (tmp_path / "run", exported):
            student, _ = load_student(folder, base=str(tmp_path / "base"))
            assert torch.equal(student.generate(IDS, max_new_tokens=12, **options), expected)


def test_eval_and_calibrate_take_a_runs_folder(tmp_path, capsys):
    write_base(tmp_path / "base", rows=766)
    trained(tmp_path)
    short = ["--max-new-tokens", "8"]
    limits = ["--limit", "2", "--thresholds", "0.0", "--output", str(tmp_path / "results")]
    assert main(["eval", str(tmp_path / "run"), *short, *limits]) == 0
    report = from_json((tmp_path / "results" / "results.json").read_text())
    assert report.rows[-1].tokens_per_pass > report.rows[0].tokens_per_pass == 1.0
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Tom has {i} pens"}) + "\n" for i in range(40)))
    bounds = ["--data", str(tmp_path / "prompts.jsonl"), "--max-drop", "0.3", "--confidence", "0.8", "--batch-size", "40"]
    assert main(["calibrate", str(tmp_path / "run"), *bounds, *short]) == 0
    chosen = json.loads((tmp_path / "run" / "mtp_calibration.json").read_text())["threshold"]
    student, _ = load_student(tmp_path / "run")
    assert (student.generation_config.confadapt, student.generation_config.verify) == (chosen, False)
    merged = export(tmp_path / "run", tmp_path / "merged")
    assert json.loads((merged / "generation_config.json").read_text())["confadapt"] == chosen
    capsys.readouterr()
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert main(["eval", str(tmp_path / "run"), *short, *limits]) == 2
    assert "cannot be loaded; pass its base with --base" in capsys.readouterr().err


def test_adapters_that_train_whole_matrices_are_published_merged(tmp_path):
    write_base(tmp_path / "base", rows=768)
    trained(tmp_path, adapter=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(ValueError, match=r"adapter_only requires exact mode, or LoRA .*leave adapter_only out"):
        export(tmp_path / "run", tmp_path / "exported", adapter_only=True)
    assert (export(tmp_path / "run", tmp_path / "merged") / "model.safetensors").is_file()


def test_adapter_only_without_an_adapter_is_refused(tmp_path):
    args = MTPDistillConfig(str(tmp_path), use_cpu=True, bf16=False, adapter_only=True)
    with pytest.raises(ValueError, match="set exact=True or pass peft_config"):
        MTPDistillTrainer(str(tmp_path / "nowhere"), args, load_dataset("train", 8, 0))


@pytest.mark.parametrize(
    "unsuitable",
    [
        LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ],
)
def test_adapters_that_do_not_fit_the_unmodified_base_are_refused_before_anything_loads(tmp_path, unsuitable):
    args = MTPDistillConfig(str(tmp_path), use_cpu=True, bf16=False, adapter_only=True)
    with pytest.raises(ValueError, match="LoRA adapters that fit the unmodified base"):
        MTPDistillTrainer(str(tmp_path / "nowhere"), args, load_dataset("train", 8, 0), peft_config=unsuitable)


def test_adapter_only_is_refused_for_a_peft_model_that_does_not_train_the_mask_row(tmp_path):
    write_base(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"]))
    args = MTPDistillConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none", k_max=4, adapter_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="LoRA adapters that fit the unmodified base"):
        MTPDistillTrainer(model, args, load_dataset("train", 64, 0), processing_class=tokenizer)


@pytest.mark.parametrize(("rows", "fits"), [(766, False), (768, True)])
def test_lora_on_an_output_embedding_fits_the_base_unless_that_was_enlarged(tmp_path, rows, fits):
    """TRL trains no LoRA on output embeddings, but other trainers may."""
    write_base(tmp_path / "base", rows=rows)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), AutoTokenizer.from_pretrained(tmp_path / "base")
    mask_id = add_mask_token(base, tokenizer)
    set_decoding_defaults(base, confadapt=0.9, verify=False)
    model = get_peft_model(base, with_mask_row(LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), base, mask_id))
    (tmp_path / "run" / "custom_generate").mkdir(parents=True)
    (tmp_path / "exported").mkdir()
    model.save_pretrained(tmp_path / "run")
    write_mask_row(tmp_path / "run", model, {"base_model": "base"})
    assert (tmp_path / "run" / ADAPTER_FILE).exists() == fits
    if fits:
        write_lora(tmp_path / "run", tmp_path / "exported")
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "exported"))


def test_a_base_with_other_weights_is_refused(tmp_path):
    write_base(tmp_path / "base", rows=766)
    trained(tmp_path)
    exported = export(tmp_path / "run", tmp_path / "exported", adapter_only=True)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight += 0.1
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "other")
    for folder in (tmp_path / "run", exported):
        load_student(folder, base=str(tmp_path / "base"))
        with pytest.raises(ValueError, match="these weights differ from it"):
            load_student(folder, base=str(tmp_path / "other"))
    LlamaForCausalLM(LlamaConfig(vocab_size=766, **SIZES | {"intermediate_size": 64})).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match="trained on another base: size mismatch"):
        load_student(exported, base=str(tmp_path / "wider"))


def test_adapters_are_checked_before_their_base_loads(tmp_path):
    write_base(tmp_path / "base")
    trained(tmp_path)
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "run" / PROVENANCE_FILE).rename(tmp_path / "provenance")
    for load in (load_student, lambda folder: merge_folder(folder, tmp_path / "merged")):
        with pytest.raises(ValueError, match="MTPDistillTrainer did not save them"):
            load(tmp_path / "run")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapters are loaded only from safetensors"):
        merge_folder(tmp_path / "run", tmp_path / "merged")


def test_the_base_is_loaded_at_the_revision_that_the_adapters_specify(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    trained(tmp_path)
    config = tmp_path / "run" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"revision": "v2"}))
    load, revisions = AutoModelForCausalLM.from_pretrained, []

    def recorded(name, **options):
        revisions.append(options.get("revision"))
        return load(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    load_student(tmp_path / "run")
    merge_folder(tmp_path / "run", tmp_path / "merged")
    load_student(tmp_path / "run", base=str(tmp_path / "base"))
    assert revisions == ["v2", "v2", None]


def test_a_pickle_is_not_loaded(tmp_path):
    write_base(tmp_path / "base")
    trained(tmp_path)
    (tmp_path / "run" / "adapter_model.safetensors").rename(tmp_path / "run" / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapters are loaded only from safetensors"):
        load_student(tmp_path / "run")


def test_the_card_of_a_lora_shows_how_to_load_it(tmp_path):
    write_base(tmp_path / "base")
    trained(tmp_path, adapter_only=True)
    facts = json.loads((tmp_path / "run" / PROVENANCE_FILE).read_text()) | {"base_model": "org/base"}
    card = render_card(facts, model_name="x", repo_id="me/x")
    assert 'model = PeftModel.from_pretrained(model, "me/x")' in card
    assert 'custom_generate="me/x", trust_remote_code=True' in card
    assert "library_name: peft" in card
    assert "base_model_relation: adapter" in card
    code = card.split("```python")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "\n\n\n" not in card


def test_a_trained_head_is_found_after_fsdp_has_replaced_its_class(tiny_model):
    """`fully_shard` derives a class of its own from that of each module."""
    model = tiny_model("llama")
    assert not adapts_head(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])).get_base_model()
    assert adapts_head(adapted)
    head = adapted.get_output_embeddings()
    head.__class__ = type("FSDPHead", (FSDPModule, type(head)), {})
    assert adapts_head(adapted)


@pytest.mark.parametrize(("fsdp_version", "tied", "refused"), [(2, True, True), (2, False, False), (None, True, False)])
def test_lora_on_tied_embeddings_is_refused_under_fsdp(tiny_model, fsdp_version, tied, refused):
    model = tiny_model("llama", tie_word_embeddings=tied)
    config = with_mask_row(LoraConfig(r=2, target_modules=["q_proj"]), model, model.config.mtp["mask_token_id"])
    expected = pytest.raises(ValueError, match=r"tied embeddings .* use exact=True") if refused else contextlib.nullcontext()
    with expected:
        Parallelism(fsdp_version=fsdp_version).check_lora(model, config)


def test_the_teacher_of_a_run_reads_through_the_head_of_the_base(tmp_path):
    base = LlamaForCausalLM(LlamaConfig(vocab_size=768, **SIZES))
    args = MTPDistillConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", k_max=4, slots_per_row=8, max_steps=1)
    adapters = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    trainer = MTPDistillTrainer(base, args, load_dataset("train", 64, 0), processing_class=tokenizer, peft_config=adapters)
    head, hidden_PH = trainer.model.get_base_model().lm_head, torch.randn(3, 32)
    with torch.no_grad():
        head.modules_to_save["default"].weight.add_(1.0)
    teacher_logits_PV = trainer._reader(trainer.model).teacher_logits(hidden_PH)
    torch.testing.assert_close(teacher_logits_PV, hidden_PH @ head.original_module.weight.T)

"""Bases in GGUF files: recipes train their dequantised weights, and an adapter finds its base in the file again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mtp_trl import MTPDistillConfig, MTPDistillTrainer
from mtp_trl.cli import main
from mtp_trl.custom_generate.adapter_file import ADAPTER_FILE, read_adapter_metadata
from mtp_trl.evaluation.loading import identity, load_base, load_student
from mtp_trl.launch import train
from mtp_trl.modeling.files import read_provenance
from mtp_trl.modeling.gguf import gguf_options
from mtp_trl.publishing.card import render_card
from mtp_trl.publishing.merging import merge_folder
from mtp_trl.recipe import RecipeError, read_recipe
from mtp_trl.training import student
from mtp_trl.word_problems import load_dataset
from mtp_trl.word_problems.tokenizer import train_tokenizer

gguf = pytest.importorskip("gguf")
FILE = "tiny.gguf"
HEADS, LAYERS, WIDTH, ROWS = 2, 2, 32, 320
TEXT = "Question: Tom has 3 pens and buys 4 pens. How many?\nAnswer: 3 + 4 = 7 #### 7"
PROMPT = torch.tensor([[0, 40, 50, 60]])


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def write_gguf(path: Path, *, seed: int = 0) -> None:
    """Write a random Llama with Q8_0, Q4_1 and F32 tensors, and a byte-level tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(ROWS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    tokenizer = train_tokenizer([TEXT] * 3, vocabulary=300)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    kinds = gguf.GGMLQuantizationType
    for name, weight in llama(seed).state_dict().items():
        module, _, suffix = name.rpartition(".")
        array = weight.numpy()
        if module.endswith(("q_proj", "k_proj")):  # GGUF interleaves the two halves of each head
            array = array.reshape(HEADS, 2, -1, WIDTH).swapaxes(1, 2).reshape(array.shape)
        kind = kinds.F32 if array.ndim == 1 else kinds.Q4_1 if "mlp" in module else kinds.Q8_0
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with only a GGUF file."""
    folder = tmp_path_factory.mktemp("base")
    write_gguf(folder / FILE)
    return folder


@pytest.fixture
def write(tmp_path, base):
    """A function that writes a recipe of two steps on the GGUF file, with changed keys."""

    def write_recipe(**changes):
        values = {
            "model_name_or_path": str(base), "gguf_file": FILE, "dataset_name": "word_problems", "dataset_size": 8,
            "output_dir": str(tmp_path / "out"), "max_steps": 2, "max_length": 256, "per_device_train_batch_size": 2,
            "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(values | changes))
        return path

    return write_recipe


def settings(folder: Path, **changes) -> MTPDistillConfig:
    return MTPDistillConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", max_steps=1, max_length=256, slots_per_row=16, k_max=4,
        per_device_train_batch_size=2, disable_tqdm=True, save_strategy="no", **changes,
    )  # fmt: skip


def plain(folder: Path, **options) -> LlamaForCausalLM:
    """Load the GGUF file with transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, **options)


def test_the_file_stores_the_weights_of_the_reference(base):
    """The fixture's file is read as intended, so that the other tests are about trained models."""
    stored, expected = plain(base).state_dict(), llama().state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(stored[name], weight, atol=0.05, rtol=0)


EXACT = {"exact": True, "adapter_only": True, "exact_rank": 4, "k_max": 4, "slots_per_row": 16, "learning_rate": 1e-2}


def test_an_exact_adapter_finds_its_base_in_the_gguf_file(write, base, tmp_path, monkeypatch, capsys):
    train(read_recipe(write(**EXACT)))
    out = tmp_path / "out"
    assert read_adapter_metadata(str(out / ADAPTER_FILE))["gguf_file"] == FILE
    assert read_provenance(out)["gguf_file"] == FILE

    # A user's own base, loaded with and without dequantisation requested. A warning about unknown weights would be an error.
    for options in (gguf_options(FILE), {"gguf_file": FILE}):
        model = AutoModelForCausalLM.from_pretrained(base, **options)
        greedy = model.generate(PROMPT, max_new_tokens=24, do_sample=False)
        arguments = {"custom_generate": str(out), "trust_remote_code": True, "confadapt": 0.0, "max_new_tokens": 24}
        assert torch.equal(model.generate(PROMPT, **arguments), greedy)

    # The command line, with the base as an option, and as the adapter names it: relative to the working directory.
    options = ["--base", str(base), "--gguf-file", FILE, "--limit", "2", "--max-new-tokens", "8", "--verify"]
    assert main(["eval", str(out), *options, "--output", str(tmp_path / "results")]) == 0
    report = json.loads((tmp_path / "results" / "results.json").read_text())
    assert report["provenance"]["base_model"] == f"{base}/{FILE}"
    monkeypatch.chdir(base.parent)
    assert main(["show", str(out), "Question: 1 + 1?", "--max-new-tokens", "8"]) == 0
    assert "forward passes" in capsys.readouterr().out
    assert f"{base.name}/{FILE}" in identity(out, None)


def test_another_quantisation_is_refused_by_the_name_of_the_right_file(write, base, tmp_path):
    train(read_recipe(write(**EXACT)))
    write_gguf(tmp_path / "other.gguf", seed=1)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="other.gguf")
    with pytest.raises(ValueError, match=rf"weights differ from it; load {base.name} \(gguf_file='{FILE}'"):
        other.generate(PROMPT, custom_generate=str(tmp_path / "out"), trust_remote_code=True, max_new_tokens=4)


def test_full_fine_tuning_saves_an_ordinary_model(write, base, tmp_path):
    trainer = train(read_recipe(write(k_max=4, slots_per_row=16, learning_rate=1e-2)))
    out, before = tmp_path / "out", plain(base).state_dict()
    saved = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(saved[name], before[name])
    assert torch.equal(trainer.teacher_model.state_dict()[name], before[name])
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    model, tokenizer = load_student(out)
    assert torch.equal(model.state_dict()[name], saved[name])
    assert tokenizer(TEXT).input_ids == AutoTokenizer.from_pretrained(base, gguf_file=FILE)(TEXT).input_ids


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT looks for config.json, which a GGUF base lacks
def test_lora_is_merged_into_the_dequantised_base(write, base, tmp_path):
    pytest.importorskip("peft")
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj"]}
    train(read_recipe(write(k_max=4, slots_per_row=16, learning_rate=1e-2, **lora)))
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = load_file(merge_folder(tmp_path / "out", tmp_path / "merged") / "model.safetensors")
    assert not torch.equal(merged[name], plain(base).state_dict()[name])
    student, _ = load_student(tmp_path / "out", base=str(base), gguf_file=FILE)
    torch.testing.assert_close(student.state_dict()[name], merged[name])


def test_sft_trains_the_dequantised_weights(write, base, tmp_path):
    train(read_recipe(write(trainer="sft", dataset_num_proc=1, learning_rate=1e-2)))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], plain(base).state_dict()[name])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("exact", [True, False])
def test_a_model_that_keeps_blocks_is_refused_before_training(base, tmp_path, exact):
    layers = pytest.importorskip("transformers.integrations.gguf.utils", reason="this transformers always dequantises")
    model = plain(base)
    packed = layers.GgufLinear(WIDTH, 64, int(gguf.GGMLQuantizationType.Q8_0))
    model.set_submodule("model.layers.0.mlp.up_proj", packed)
    tokenizer = AutoTokenizer.from_pretrained(base, gguf_file=FILE)
    with pytest.raises(ValueError, match=r"up_proj .* keep their weights as GGUF blocks.*GgufConfig\(dequantize=True\)"):
        MTPDistillTrainer(model, settings(tmp_path, exact=exact), load_dataset("train", 4, seed=0), processing_class=tokenizer)


@pytest.mark.parametrize("exact", [True, False])
def test_a_dequantised_model_in_memory_trains_and_records_its_file(base, tmp_path, exact):
    """Loaded without a GgufConfig, the model is marked as quantised; transformers would neither train nor save it."""
    trainer = MTPDistillTrainer(plain(base), settings(tmp_path, exact=exact, gguf_file=FILE), load_dataset("train", 4, seed=0))
    trainer.train()
    trainer.save_model()
    assert read_provenance(tmp_path)["gguf_file"] == FILE
    assert load_student(tmp_path)[0].config.mtp["k_max"] == 4


def test_weights_are_dequantised_in_float32_and_then_rounded(base, tmp_path, monkeypatch):
    """transformers dequantises some architectures in the requested dtype, which would change the fingerprint of the base."""
    requested = []

    def create(*args, **options):
        requested.append(options["dtype"])
        return plain(base, dtype=options["dtype"])

    monkeypatch.setattr(student, "create_model_from_path", create)
    args = settings(tmp_path, gguf_file=FILE, model_init_kwargs={"dtype": "bfloat16"})
    model = student.model_loader(str(base), args, None)()
    assert requested == [torch.float32]
    assert model.dtype == torch.bfloat16
    for name, weight in plain(base).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16())


def test_estimate_reads_the_config_from_the_file(write, capsys):
    assert main(["estimate", str(write())]) == 0
    assert "It fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gguf_file": "missing.gguf"}, "gguf_file names 'missing.gguf', which is not in"),
        ({"load_in_4bit": True}, "cannot be combined with gguf_file"),
        ({"model_name_or_path": "some/folder/x.gguf", "gguf_file": None}, "to 'some/folder' and gguf_file to 'x.gguf'"),
        ({"gguf_file": "/models/x.gguf"}, "pass 'x.gguf', and its folder as the model"),
        ({"gguf_file": None, "model_init_kwargs": {"gguf_file": FILE}}, "set the field gguf_file instead"),
    ],
)
def test_mistakes_in_recipes_are_refused_with_a_remedy(write, changes, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(**changes))


def test_a_missing_package_is_named_with_the_extra_that_installs_it(write, base, monkeypatch):
    monkeypatch.setattr("mtp_trl.argument_types.find_spec", lambda name: None)
    for load in (lambda: read_recipe(write()), lambda: load_base(base, gguf_file=FILE)):
        with pytest.raises(ValueError, match=r"needs gguf, which is not installed; pip install 'mtp-trl\[gguf\]'"):
            load()


def test_mistakes_on_the_command_line_are_refused_with_a_remedy(base, capsys):
    with pytest.raises(SystemExit):
        main(["eval", "model", "--gguf-file", FILE])
    assert "--gguf-file needs --base" in capsys.readouterr().err
    for options in ({}, {"gguf_file": "missing.gguf"}):
        with pytest.raises(ValueError, match=f"name its GGUF file with --gguf-file: {FILE}"):
            load_base(base, **options)


def test_the_card_of_an_adapter_loads_the_gguf_file():
    facts = {
        "base_model": "org/base", "gguf_file": FILE, "settings": {"exact": True, "adapter_only": True}, "mask_token": "<|mtp|>",
        "objective": "hard", "k_min": 2, "k_max": 4, "command": "", "hardware": "", "date": "", "versions": {},
    }  # fmt: skip
    card = render_card(facts, model_name="m")
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig\n" in card
    assert f'tokenizer = AutoTokenizer.from_pretrained("org/base", gguf_file="{FILE}")\n' in card
    assert f'gguf_file="{FILE}", quantization_config=GgufConfig(dequantize=True)' in card
    assert f"--base org/base --gguf-file {FILE} --verify" in card
    assert f"`org/base/{FILE}`" in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "GgufConfig" not in render_card(facts | {"gguf_file": None}, model_name="m")

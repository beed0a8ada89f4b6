"""Exact mode: the base's text is unchanged, and an adapter acts at mask positions only."""

import copy
import hashlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, apply_activation_checkpointing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import mtp_trl.word_problems
from mtp_trl import MTPDistillConfig, MTPDistillTrainer, attach_decoder
from mtp_trl.cli import main
from mtp_trl.custom_generate.adapter_file import by_file_name
from mtp_trl.evaluation.loading import load_student
from mtp_trl.modeling.checks import can_pack
from mtp_trl.modeling.exact import add_gated_adapter
from mtp_trl.modeling.logits import backbone
from mtp_trl.training.readers import ExactReader
from mtp_trl.training.regions import pack_regions, row_generator, sample_regions, student_forced_ids, suffix_regions
from mtp_trl.training.student import make_exact
from mtp_trl.word_problems import load_dataset

BASE = str(Path(mtp_trl.word_problems.__file__).parent / "base")
ZERO_3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
K, SLOTS, MASK, PAD = 5, 14, 60, 0
PACKED = [
    "llama", "qwen3", "mistral", "gemma2", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss", "cohere", "granite", "phi3",
    "olmo2", "gpt2", "deepseek_v3", "llama4_text", "opt",
]  # fmt: skip
RECURRENT = ["falcon_h1", "qwen3_next"]


def adapted(model, *, scale: float = 0.3):
    """Attach an adapter with random weights, so that it changes the output at masks."""
    adapter = add_gated_adapter(model, rank=4, alpha=8)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for update in adapter.updates:
            update.lora_B.normal_(0, scale, generator=generator)
        adapter.mask_row.weight.add_(torch.randn(adapter.mask_row.weight.shape, generator=generator), alpha=0.1)
    return adapter


def layout_of(model):
    lengths = torch.tensor([15, 11])
    clean = torch.randint(3, 60, (2, 15), generator=torch.Generator().manual_seed(3))
    clean = clean.masked_fill(torch.arange(15) >= lengths[:, None], PAD)
    regions = sample_regions(
        [3, 2], [13, 9], k_min=2, k_max=K, slots=SLOTS, generators=[row_generator(0, 0, row) for row in range(2)]
    )
    if can_pack(model):
        return clean, regions, pack_regions(clean, lengths, regions, k_max=K, slots=SLOTS, mask_token_id=MASK)
    return clean, regions, suffix_regions(clean, lengths, regions, k_max=K, mask_token_id=MASK, pad_token_id=PAD)


def naive_hidden(model, ids, *, masks: int):
    """Run one unpacked pass with the adapter at the last `masks` columns."""
    with model.mtp_adapter.acting_on(masks):
        return backbone(model)(input_ids=ids[None], use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize(
    ("architecture", "checkpointing"),
    [
        *itertools.product(PACKED + RECURRENT, [None, "transformers"]),
        ("llama", "wrapper"),  # `activation_checkpointing` of accelerate's FSDP plugin
        ("mixtral", "wrapper"),
    ],
)
def test_shared_text_equals_separate_passes_in_value_and_gradient(tiny_model, architecture, checkpointing):
    model = tiny_model(architecture)
    adapter = adapted(model)
    if checkpointing == "transformers":
        model.gradient_checkpointing_enable()
        model.train()
    if checkpointing == "wrapper":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, GradientCheckpointingLayer))
    if checkpointing == "transformers" and architecture == "gpt2":
        with pytest.raises(ValueError, match="set gradient_checkpointing=False"):
            ExactReader(model, with_teacher=True).read_student(layout_of(model)[2])
        return
    clean, regions, layout = layout_of(model)
    reader = ExactReader(model, with_teacher=True)
    hidden = reader.read_student(layout)
    forced = reader.read_teacher(layout, student_forced_ids(layout, torch.full(layout.drawn_BRK.shape, 7)))
    weight = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(1))
    student, teacher = hidden[layout.read_BRK[layout.drawn_BRK]], forced[layout.read_BRK[layout.drawn_BRK]]
    (student @ weight).square().sum().backward()
    gradients = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    model.eval()
    for module in model.modules():
        if isinstance(module, CheckpointWrapper):  # the reference is not checkpointed
            module.checkpoint_fn = lambda layer, *inputs, **named: layer(*inputs, **named)
    expected, reference = [], []
    for row, region in (regions.size_BR > 0).nonzero().tolist():
        anchor, size = int(regions.anchor_BR[row, region]), int(regions.size_BR[row, region])
        prefix = clean[row, : anchor + 1]
        masked = torch.cat([prefix, torch.full((size - 1,), MASK)])
        expected.append(naive_hidden(model, masked, masks=size - 1)[anchor:])
        reference.append(naive_hidden(model, torch.cat([prefix, torch.full((size - 1,), 7)]), masks=0)[anchor:])
    torch.testing.assert_close(student, torch.cat(expected), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(teacher, torch.cat(reference), atol=2e-5, rtol=1e-4)
    (torch.cat(expected) @ weight).square().sum().backward()
    for actual, parameter in zip(gradients, adapter.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad, atol=1e-3 * float(parameter.grad.abs().max()), rtol=1e-3)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "mtp_adapter" not in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_text_are_bitwise_those_of_the_base(tiny_model, dtype):
    base = tiny_model("llama").to(dtype)
    ids = torch.randint(3, 60, (2, 12))
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        model = copy.deepcopy(base)
        adapted(model)
        with model.mtp_adapter.acting_on(4):
            actual = model(input_ids=ids).logits
    assert torch.equal(actual[:, :-4], expected[:, :-4])
    assert not torch.equal(actual[:, -4:], expected[:, -4:])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_oss", "mixtral", "falcon_h1"])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.filterwarnings("ignore:.*decoded correctly but without a cache")
def test_decoding_in_one_pass_equals_two(tiny_model, architecture, verify):
    """The reference is a loop that reads the text and the masks in separate, uncached passes."""
    base = tiny_model(architecture, context=0.2)
    model = attach_decoder(copy.deepcopy(base))
    adapted(model, scale=0.05)
    model.config.mtp["exact"] = True
    prompts = [[5, 6, 7, 8], [9, 10]]
    options = {"confadapt": 0.02, "verify": verify, "max_new_tokens": 14}
    outputs = [model.generate(torch.tensor([p]), return_dict_in_generate=True, **options) for p in prompts]
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = two_pass_decoding(model, prompt, threshold=0.02, verify=verify, tokens=14)
        assert output.sequences[0].tolist() == prompt + expected
        if verify:
            greedy = base.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False, suppress_tokens=[60, 61, 62, 63])
            assert output.sequences[0].tolist() == greedy[0].tolist()
    assert any(length > 1 for output in outputs for length in output.block_lengths[0])
    padded = torch.tensor([prompts[0], [0, 0, *prompts[1]]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    together = model.generate(padded, attention_mask=mask, **options)
    for row, output in enumerate(outputs):
        single = output.sequences[0].tolist()
        start = 4 - len(prompts[row])
        assert together[row, start : start + len(single)].tolist() == single


@torch.no_grad()
def two_pass_decoding(model, prompt, *, threshold, verify, tokens):
    barred = model.config.mtp["barred_token_ids"]

    def predictions(ids, masks):
        with model.mtp_adapter.acting_on(masks):
            logits = model(input_ids=torch.tensor([ids + [MASK] * masks]), use_cache=False).logits[0].float()
        logits[:, barred] = -torch.inf
        return logits.softmax(-1)

    text = list(prompt)
    while len(text) - len(prompt) < tokens:
        probs = torch.cat([predictions(text, 0)[-1:], predictions(text, 7)[-7:]])
        block = probs.argmax(-1).tolist()
        length = 1
        while length < 8 and probs[: length + 1].max(-1).values.min() >= threshold:
            length += 1
        for token in block[:length]:
            greedy = int(predictions(text, 0)[-1].argmax())
            text.append(greedy if verify else token)
            if text[-1] == 1 or len(text) - len(prompt) == tokens:
                return text[len(prompt) :]
            if verify and greedy != token:
                break
    return text[len(prompt) :]


def digest(model) -> str:
    joined = hashlib.sha256()
    for name, value in sorted(item for item in model.state_dict().items() if "mtp_adapter" not in item[0]):
        joined.update(name.encode() + value.float().numpy().tobytes())
    return joined.hexdigest()


def test_training_changes_neither_the_base_nor_its_text(tmp_path):
    folder = BASE
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = MTPDistillConfig(
        str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", k_max=6, slots_per_row=32, max_steps=6, exact=True,
        exact_rank=8, per_device_train_batch_size=4, logging_steps=1, learning_rate=3e-3, muon=True, disable_tqdm=True,
        save_steps=3, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = MTPDistillTrainer(folder, args, load_dataset("train", 32, 0), processing_class=tokenizer)
    before = digest(trainer.model)
    text = torch.tensor([[0, 25, 31, 42, 17]])
    with torch.no_grad():
        logits = trainer.model(text).logits
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(name.startswith("mtp_adapter.") for name in trainable)
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert digest(trainer.model) == before
    with torch.no_grad():
        assert torch.equal(trainer.model(text).logits, logits)  # the adapter is inactive outside the decoder
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    assert digest(again) == before
    assert again.generation_config.verify is True
    ids = tokenizer("Question: Tom has 3 apples.\nAnswer:", return_tensors="pt")
    output = again.generate(**ids, confadapt=0.0, max_new_tokens=20, return_dict_in_generate=True)
    assert torch.equal(output.sequences, trainer.model.generate(**ids, confadapt=0.0, verify=True, max_new_tokens=20))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(output.sequences, plain.generate(**ids, max_new_tokens=20, do_sample=False))

    resumed = MTPDistillTrainer(folder, args, load_dataset("train", 32, 0), processing_class=tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert [e["loss"] for e in resumed.state.log_history if "loss" in e] == losses


def exact_arguments(folder, **changes):
    options = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "k_max": 6, "slots_per_row": 24,
        "max_steps": 2, "exact": True, "exact_rank": 4, "per_device_train_batch_size": 4, "learning_rate": 3e-3,
        "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return MTPDistillConfig(**(options | changes))


def trainer_for(model, folder, evaluated: int = 0, **changes) -> MTPDistillTrainer:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    sets = load_dataset("train", 64, 0), load_dataset("test", evaluated, 0) if evaluated else None
    return MTPDistillTrainer(model, exact_arguments(folder, **changes), *sets, processing_class=tokenizer)


def trained(model, folder, **changes) -> MTPDistillTrainer:
    trainer = trainer_for(model, folder, **changes)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture
def without_spare_rows(tmp_path):
    """A base whose embedding has no row after the tokenizer's last token, so that training has to enlarge it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=766, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small_base")
    return tmp_path / "small_base"


@pytest.mark.parametrize("base", ["bundled", "enlarged"])
def test_an_adapter_only_folder_decodes_on_the_unmodified_base(tmp_path, base, request):
    folder = BASE if base == "bundled" else str(request.getfixturevalue("without_spare_rows"))
    trainer = trained(folder, tmp_path / "adapter", adapter_only=True, save_steps=1)
    for saved in (tmp_path / "adapter", tmp_path / "adapter" / "checkpoint-1"):
        assert (saved / "custom_generate" / "mtp_adapter.safetensors").is_file()
        assert not list(saved.glob("model*.safetensors"))
        assert not (saved / "config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[0, 25, 31, 42], [2, 2, 0, 77]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 2).long(), "max_new_tokens": 20}
    options = {"custom_generate": str(tmp_path / "adapter"), "trust_remote_code": True}
    plain = model.generate(**inputs)
    output = model.generate(**inputs, **options, confadapt=0.0, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain)  # verified by default
    for confadapt in (0.0, 0.5):
        expected = trainer.model.generate(**inputs, confadapt=confadapt, verify=False)
        assert torch.equal(model.generate(**inputs, **options, confadapt=confadapt, verify=False), expected)
    assert torch.equal(model.generate(**inputs), plain)  # plain decoding of the base is unchanged

    resumed = trainer_for(folder, tmp_path / "resumed", adapter_only=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "adapter" / "checkpoint-1"))
    assert weights(resumed.model.mtp_adapter) == weights(trainer.model.mtp_adapter)


def weights(adapter) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in by_file_name(adapter).items()}


def test_a_second_adapter_replaces_the_first(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        trained(BASE, tmp_path / name, adapter_only=True, seed=seed, max_steps=1)
    ids = torch.tensor([[0, 25, 31, 42]])

    def drafts(model, name):
        options = {"custom_generate": str(tmp_path / name), "trust_remote_code": True, "confadapt": 0.0, "verify": False}
        return model.generate(ids, max_new_tokens=16, **options).tolist()

    both = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    single = [drafts(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), name) for name in ("one", "two")]
    assert single[0] != single[1]
    assert [drafts(both, name) for name in ("one", "two", "one")] == [single[0], single[1], single[0]]


def test_an_adapter_that_is_written_again_is_read_again(tmp_path):
    ids, texts = torch.tensor([[0, 25, 31, 42]]), []
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    options = {"custom_generate": str(tmp_path), "trust_remote_code": True, "confadapt": 0.0, "verify": False}
    for seed in (1, 2):
        trained(BASE, tmp_path, adapter_only=True, seed=seed, max_steps=1)
        texts.append(model.generate(ids, max_new_tokens=16, **options).tolist())
    assert texts[0] != texts[1]


def test_the_best_adapter_is_loaded_at_the_end(tmp_path):
    """Select by the highest and by the lowest loss, so that at least one of the two is not the last checkpoint."""
    steps = set()
    for highest in (True, False):
        trainer = trainer_for(
            BASE, tmp_path / str(highest), evaluated=4, load_best_model_at_end=True, eval_strategy="steps",
            eval_steps=1, save_steps=1,
            max_steps=3, metric_for_best_model="eval_loss", greater_is_better=highest, num_eval_prompts=0,
            adapter_only=True, muon=True,
        )  # fmt: skip
        trainer.train()
        folder = Path(trainer.state.best_model_checkpoint)
        steps.add(folder.name)
        best = load_file(folder / "custom_generate" / "mtp_adapter.safetensors")
        for name, value in by_file_name(trainer.model.mtp_adapter).items():
            assert torch.equal(best[name], value)
    assert steps - {"checkpoint-3"}


def test_an_adapter_only_folder_is_evaluated_and_shown_on_its_base(tmp_path, capsys, monkeypatch):
    trained(BASE, tmp_path / "adapter", adapter_only=True, max_steps=1)
    student, _ = load_student(tmp_path / "adapter", base=BASE)
    ids = torch.tensor([[0, 25, 31, 42]])
    greedy = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).generate(ids, max_new_tokens=12)
    assert torch.equal(student.generate(ids, max_new_tokens=12), greedy)
    assert student.config.mtp["k_max"] == 6
    assert main(["show", str(tmp_path / "adapter"), "Question: 1 + 1?", "--base", BASE, "--max-new-tokens", "8"]) == 0
    assert "forward passes" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)  # here, the base's path relative to the checkout does not exist
    assert main(["show", str(tmp_path / "adapter"), "Question: 1 + 1?"]) == 2
    assert "pass its base with --base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights", "these weights differ from it; load"),
        ("layers", "must map 192 to 512 features, found"),
        ("vocabulary", "its vocabulary has 768 rows, this model's 832; load"),
    ],
)
def test_another_base_is_refused(tmp_path, change, message):
    trained(BASE, tmp_path / "adapter", adapter_only=True, max_steps=1)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    if change == "weights":
        with torch.no_grad():
            model.model.layers[2].mlp.up_proj.weight[0, 5] += 0.5
    elif change == "layers":
        model.model.layers[1].mlp.gate_proj = torch.nn.Linear(192, 256)
    else:
        model.resize_token_embeddings(832, mean_resizing=False)
    with pytest.raises(ValueError, match=message):
        model.generate(
            torch.tensor([[0, 5]]), custom_generate=str(tmp_path / "adapter"), trust_remote_code=True, max_new_tokens=2
        )


def test_a_base_whose_weights_cannot_be_compared_is_used_with_a_warning(tmp_path):
    trained(BASE, tmp_path / "adapter", adapter_only=True, max_steps=1)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float16)
    options = {"custom_generate": str(tmp_path / "adapter"), "trust_remote_code": True}
    with pytest.warns(UserWarning, match="these weights cannot be compared with it"):
        assert model.generate(torch.tensor([[0, 5]]), max_new_tokens=4, **options).shape[1] <= 6


def test_a_model_with_another_mask_token_id_is_refused(tmp_path):
    trained(BASE, tmp_path / "out", max_steps=1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["mtp"]["mask_token_id"] = 700
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(ValueError, match="its mask token is 766, this model's 700"):
        model.generate(torch.tensor([[0, 5]]), max_new_tokens=2)


def test_resuming_with_another_shape_is_refused(tmp_path):
    trained(BASE, tmp_path / "out", save_steps=1)
    trainer = trainer_for(BASE, tmp_path / "other", exact_rank=8)
    with pytest.raises(ValueError, match=r"has rank 4, alpha 128 and .* this run has rank 8"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_plugin_args": {"fsdp_version": 1}}, "needs FSDP version 2 and FULL_STATE_DICT, got version 1"),
        ({"fsdp_plugin_args": {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}, "got version 2 and SHARDED"),
        ({"deepspeed_plugin": SimpleNamespace(hf_ds_config=ZERO_3)}, "set stage3_gather_16bit_weights_on_model_save to true"),
    ],
)
def test_sharding_that_would_not_gather_the_adapter_is_refused(tiny_model, changes, message):
    arguments = SimpleNamespace(**{"fsdp_plugin_args": None, "deepspeed_plugin": None} | changes)
    with pytest.raises(ValueError, match=message):
        make_exact(tiny_model("llama"), None, arguments)


def test_nothing_changes_before_training(tiny_model):
    """B is zero and the mask row is the embedding's, so the model equals the base at masks too."""
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, MASK, MASK]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        add_gated_adapter(model, rank=4, alpha=8)
        with model.mtp_adapter.acting_on(2):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_experts_are_not_adapted_by_default(tiny_model):
    assert all("self_attn" in name for name in add_gated_adapter(tiny_model("mixtral"), rank=2, alpha=2).names)
    assert any("mlp" in name for name in add_gated_adapter(tiny_model("llama"), rank=2, alpha=2).names)


def test_layers_that_read_the_whole_cache_are_skipped_or_refused(tiny_model):
    model = tiny_model("deepseek_v3")
    assert not any("kv_b_proj" in name for name in add_gated_adapter(model, rank=2, alpha=2).names)
    model = tiny_model("deepseek_v3")
    add_gated_adapter(model, rank=2, alpha=2, target_modules=["kv_b_proj"])
    with model.mtp_adapter.acting_on(2), pytest.raises(ValueError, match=r"kv_b_proj returns .*adapt other modules"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize("objective", ["hard", "soft", "reward", "reward_literal", "ground_truth"])
def test_every_objective_trains_the_adapter(tmp_path, objective):
    trainer = trainer_for(
        BASE,
        tmp_path,
        evaluated=8,
        objective=objective,
        max_steps=16,
        muon=True,
        save_strategy="no",
        num_eval_prompts=0,
        exact_rank=16,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_target_modules_can_be_one_name_or_all_linear(tiny_model):
    def names(target_modules):
        return add_gated_adapter(tiny_model("llama"), rank=2, alpha=2, target_modules=target_modules).names

    assert names("q_proj") == names(["q_proj"]) != names(None)
    assert names("all-linear") == names(["all-linear"]) == names(None)
    with pytest.raises(ValueError, match="no linear layer among query; name"):
        names("query")


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj", "v_proj"], "all-linear", None])
def test_a_lora_configuration_sets_the_shape_of_the_adapter(tiny_model, targets):
    model = tiny_model("llama")
    arguments = SimpleNamespace(fsdp_plugin_args=None, deepspeed_plugin=None, exact_rank=8, exact_alpha=8, seed=0)
    arguments.exact_target_modules = None
    make_exact(model, LoraConfig(r=2, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM"), arguments)
    adapter = model.mtp_adapter
    assert (adapter.rank, adapter.alpha) == (2, 6)
    last = {name.rsplit(".", 1)[-1] for name in adapter.names}
    all_of_them = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert last == (all_of_them if targets in ("all-linear", None) else {targets} if isinstance(targets, str) else {*targets})


@pytest.mark.parametrize(
    "ignored",
    [{"use_rslora": True}, {"lora_dropout": 0.5}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"bias": "all"},
     {"rank_pattern": {"q_proj": 4}}, {"layers_to_transform": [0]}, {"init_lora_weights": "gaussian"}],
    ids=str,
)  # fmt: skip
def test_lora_options_that_exact_mode_would_ignore_are_refused(tiny_model, ignored):
    arguments = SimpleNamespace(fsdp_plugin_args=None, deepspeed_plugin=None, exact_rank=8, exact_alpha=8, seed=0)
    arguments.exact_target_modules = None
    with pytest.raises(ValueError, match=f"would ignore {next(iter(ignored))}=.*leave it at"):
        make_exact(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], **ignored), arguments)
    with pytest.raises(ValueError, match="got IA3Config; pass a LoraConfig"):
        make_exact(tiny_model("llama"), IA3Config(target_modules=["q_proj"], feedforward_modules=[]), arguments)


def test_missing_target_modules_are_refused(tiny_model):
    with pytest.raises(ValueError, match="no linear layer among query"):
        add_gated_adapter(tiny_model("llama"), rank=2, alpha=2, target_modules=["query"])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_an_interrupted_step_leaves_the_base_unchanged(tmp_path, checkpointing, moment):
    """KeyboardInterrupt comes during forward, or during backward, which recomputes layers with the adapter active."""
    trainer = trainer_for(BASE, tmp_path, max_steps=1, gradient_checkpointing=checkpointing)
    model, ids = trainer.model, torch.tensor([[0, 5, 6, 7]])
    for update in model.mtp_adapter.updates:
        torch.nn.init.normal_(update.lora_B, std=0.3)
    model.mtp_adapter.mask_row.weight.data.add_(1.0)
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    layer = model.model.layers[1].mlp.down_proj
    if moment == "backward":
        handle = model.mtp_adapter.updates[-1].lora_A.register_hook(interrupt)
    else:
        handle = layer.register_forward_hook(lambda *_: interrupt() if model.mtp_adapter.state[0] else None)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, before)


def test_layers_are_recomputed_with_the_gate_of_their_pass(tiny_model):
    """Two passes with different slots run before one backward; each layer is recomputed with the gate of its own pass."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("llama")
        adapter = adapted(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        clean, regions, layout = layout_of(model.train())
        short = pack_regions(clean, torch.tensor([15, 11]), regions, k_max=K, slots=SLOTS + 3, mask_token_id=MASK)
        losses = []
        for one in (layout, short):
            reader = ExactReader(model, with_teacher=True)
            losses.append(reader.read_student(one)[one.read_BRK[one.drawn_BRK]].square().sum())
            reader.read_teacher(one, student_forced_ids(one, torch.full(one.drawn_BRK.shape, 7)))
        sum(losses).backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
        assert adapter.state[0] == 0
    torch.testing.assert_close(gradients[1], gradients[0])

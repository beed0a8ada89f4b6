"""MTPDistillTrainer, on models of a few thousand parameters."""

import contextlib
import inspect
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from trl import DistillationTrainer

import mtp_trl.word_problems
from mtp_trl import MTPDistillConfig, MTPDistillTrainer
from mtp_trl.modeling.parallelism import Parallelism
from mtp_trl.word_problems import load_dataset

TOKENIZER = Path(mtp_trl.word_problems.__file__).parent / "base"


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


def model(*, seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    options = {
        "vocab_size": 768, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))


def arguments(folder, **changes) -> MTPDistillConfig:
    options = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "k_max": 6,
        "slots_per_row": 20, "max_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 3e-3,
        "max_completion_length": 12, "num_eval_prompts": 0, "lr_scheduler_type": "constant", "disable_tqdm": True,
    }  # fmt: skip
    return MTPDistillConfig(**{**options, **changes})


def rows(count: int = 32):
    return load_dataset("train", count, 0)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_overridden_methods_of_trl_have_the_expected_signatures():
    """The methods are private, so a minor release of TRL may change them; this test is the first to detect it."""
    signatures = {
        "_set_signature_columns_if_needed": ["self"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "unwrapped_student", "inputs", "num_items_in_batch"],
        "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        "create_model_card": ["self", "model_name", "dataset_name", "tags"],
        "_save": ["self", "output_dir", "state_dict"],
        "_save_checkpoint": ["self", "model", "trial"],
        "_get_output_dir": ["self", "trial"],
        "_push_from_checkpoint": ["self", "checkpoint_folder"],
        "_get_grad_norm": ["self", "model", "grad_norm"],
    }
    for name, parameters in signatures.items():
        assert list(inspect.signature(getattr(DistillationTrainer, name)).parameters) == parameters


def test_loss_falls_and_agreement_rises(tmp_path, tokenizer):
    trainer = MTPDistillTrainer(model(), arguments(tmp_path, max_steps=40, muon=True), rows(64), processing_class=tokenizer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses(trainer)[-5:]) < 0.8 * sum(losses(trainer)[:5])
    assert history[-1]["agreement/place_2"] > history[0]["agreement/place_2"]
    assert history[-1]["reward"] > history[0]["reward"]
    assert history[0]["drift/kl"] == pytest.approx(0, abs=1e-4)
    assert history[-1]["drift/kl"] > history[0]["drift/kl"]
    assert {"confidence/place_6", "acceleration/confadapt_0.9", "drift/agreement"} <= set(history[-1])


@pytest.mark.parametrize("objective", ["hard", "ground_truth"])
def test_accumulated_micro_batches_equal_one_batch(tmp_path, tokenizer, objective):
    outcomes = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = MTPDistillTrainer(
            model(),
            arguments(
                tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, objective=objective,
                ntp_coef=0.5, max_steps=3, optim="sgd", learning_rate=0.1,  # Adam amplifies rounding errors of tiny gradients
            ),
            rows(),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        outcomes.append((losses(trainer), weights))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], rel=1e-4)
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1], atol=2e-5, rtol=1e-3)


def test_a_warm_up_is_supervised_by_the_text_and_ends(tmp_path, tokenizer):
    """During the warm-up, the teacher runs only if `ntp_coef` needs it."""
    for ntp_coef, expected in ((0.0, [False, False, True, True]), (1.0, [True] * 4)):
        args = arguments(tmp_path, ground_truth_warmup=0.5, max_steps=4, ntp_coef=ntp_coef)
        trainer = MTPDistillTrainer(model(), args, rows(), processing_class=tokenizer)
        trainer.train()
        with_teacher = ["reward" in entry for entry in trainer.state.log_history if "loss" in entry]
        assert with_teacher == expected


def test_a_curriculum_lets_blocks_grow(tmp_path, tokenizer):
    """The last position, which only the largest blocks have, is first drawn when the curriculum is over."""
    args = arguments(tmp_path, k_curriculum=0.5, k_min=2, k_max=6, max_steps=8, slots_per_row=60)
    trainer = MTPDistillTrainer(model(), args, rows(64), processing_class=tokenizer)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    largest = [max(position for position in range(1, 7) if f"agreement/place_{position}" in entry) for entry in history]
    assert largest == [2, 3, 4, 5, 6, 6, 6, 6]


@pytest.mark.parametrize("place_decay", [1.0, 0.5])
def test_micro_batches_weight_positions_like_one_batch(tmp_path, tokenizer, place_decay):
    outcomes = []
    for size, steps in ((8, 1), (2, 4)):
        args = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, place_decay=place_decay, max_steps=1
        )
        trainer = MTPDistillTrainer(model(), args, rows(), processing_class=tokenizer)
        trainer.train()
        outcomes.append(losses(trainer))
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by torch's compiler
@pytest.mark.parametrize("exact", [False, True])
def test_compiled_layers_change_no_loss(tmp_path, tokenizer, exact):
    from torch._dynamo.utils import counters

    outcomes = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        counters.clear()
        args = arguments(tmp_path, exact=exact, gradient_checkpointing=False, max_steps=3, num_eval_prompts=2, **options)
        trainer = MTPDistillTrainer(model(num_hidden_layers=1), args, rows(), eval_dataset=rows(8), processing_class=tokenizer)
        trainer.train()
        assert bool(counters["frames"]["ok"]) == bool(options)
        frames = dict(counters["frames"])
        metrics = trainer.evaluate()
        outcomes.append((losses(trainer), metrics["eval_loss"], metrics["eval_decoding/verified_0.9"]))
        compiled_in_decoding = counters["frames"]["total"] - frames.get("total", 0)
        assert compiled_in_decoding <= 6  # the passes for eval_loss; compiled decoding would add dozens
    assert outcomes[0] == (pytest.approx(outcomes[1][0], rel=1e-5), *map(pytest.approx, outcomes[1][1:]))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("by", ["student", "teacher"])
def test_who_completes_bare_prompts(tmp_path, tokenizer, by, adapters):
    from peft import LoraConfig

    args = arguments(tmp_path, completions_by=by, generation_kwargs={"do_sample": False}, max_completion_length=6)
    peft_config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False) if adapters else None
    prompts = rows().select_columns(["prompt"])
    trainer = MTPDistillTrainer(
        model(initializer_range=0.3), args, prompts, processing_class=tokenizer, peft_config=peft_config
    )
    if not adapters:
        with torch.no_grad():
            trainer.model.model.layers[0].self_attn.q_proj.weight.mul_(-1)
    batch = trainer._generate_and_score_completions([{"prompt": prompts[n]["prompt"]} for n in range(4)])
    barred = trainer.model.config.mtp["barred_token_ids"]

    def greedy(prompt, teacher):
        with trainer.model.disable_adapter() if adapters and teacher else contextlib.nullcontext():
            writer = trainer.teacher_model if teacher and not adapters else trainer.model
            return writer.generate(prompt[None], max_new_tokens=6, do_sample=False, mtp_k=1, suppress_tokens=barred)[0]

    same = {True: 0, False: 0}
    for row, length, end in zip(batch["clean_ids"], batch["prompt_lengths"], batch["lengths"], strict=True):
        for teacher in same:
            same[teacher] += torch.equal(greedy(row[:length], teacher)[:end], row[:end])
    assert same[by == "teacher"] == 4
    assert same[by != "teacher"] < 4


@pytest.mark.parametrize("exact", [False, True])
def test_student_blocks_completes_like_unverified_decoding(tmp_path, tokenizer, exact):
    """Completions with `completions_by="student_blocks"` equal the student's unverified decoding in blocks."""
    args = arguments(
        tmp_path, completions_by="student_blocks", confadapt=0.0, generation_kwargs={"do_sample": False}, exact=exact
    )
    prompts = rows().select_columns(["prompt"])
    trainer = MTPDistillTrainer(model(initializer_range=0.3), args, prompts, processing_class=tokenizer)
    batch = trainer._generate_and_score_completions([{"prompt": prompts[n]["prompt"]} for n in range(4)])

    def greedy(prompt, **options):
        return trainer.model.generate(prompt[None], max_new_tokens=12, do_sample=False, **options)[0]

    token_by_token = 0
    for row, length, end in zip(batch["clean_ids"], batch["prompt_lengths"], batch["lengths"], strict=True):
        blocks = greedy(row[:length], mtp_k=args.k_max, confadapt=0.0, verify=False)[:end]
        torch.testing.assert_close(blocks, row[:end], atol=0, rtol=0)
        token_by_token += torch.equal(greedy(row[:length], mtp_k=1)[:end], row[:end])
    assert token_by_token < 4
    trainer.train()
    assert all(loss > 0 for loss in losses(trainer))


def test_ntp_coef_also_acts_with_the_ground_truth_objective(tmp_path, tokenizer):
    outcomes = []
    for coefficient in (0.0, 5.0):
        args = arguments(tmp_path, objective="ground_truth", ntp_coef=coefficient, max_steps=3)
        trainer = MTPDistillTrainer(model(), args, rows(), processing_class=tokenizer)
        trainer.train()
        outcomes.append(losses(trainer))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], rel=1e-5)  # the student still equals the teacher
    assert outcomes[0][2] != pytest.approx(outcomes[1][2], rel=1e-3)


@pytest.mark.parametrize("bf16", [True, False])
def test_mixed_precision_is_that_of_the_configuration(tmp_path, tokenizer, bf16):
    """The pass bypasses `model.forward`, which accelerate wraps for mixed precision."""
    trainer = MTPDistillTrainer(model(), arguments(tmp_path, bf16=bf16, max_steps=1), rows(), processing_class=tokenizer)
    seen = set()
    trainer.model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16 if bf16 else torch.float32}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_gradient_checkpointing_changes_no_loss(tmp_path, tokenizer):
    outcomes = []
    for checkpointing in (False, True):
        args = arguments(tmp_path, gradient_checkpointing=checkpointing, max_steps=3)
        trainer = MTPDistillTrainer(model(), args, rows(), processing_class=tokenizer)
        trainer.train()
        outcomes.append(losses(trainer))
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-5)


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path, tokenizer):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = MTPDistillTrainer(model(), arguments(tmp_path / "whole", **options), rows(64), processing_class=tokenizer)
    whole.train()
    resumed = MTPDistillTrainer(model(), arguments(tmp_path / "again", **options), rows(64), processing_class=tokenizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_adapters_train_the_mask_row_and_leave_the_teacher_unchanged(tmp_path, tokenizer):
    from peft import LoraConfig

    base = model()
    trainer = MTPDistillTrainer(
        base, arguments(tmp_path, max_steps=5), rows(), processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    mask_id = trainer.model.config.mtp["mask_token_id"]
    ids = torch.tensor([[5, 6, 7]])

    def base_logits(token_ids):
        with torch.no_grad(), trainer.model.disable_adapter():
            return trainer.model(input_ids=token_ids).logits[..., :mask_id].clone()

    row = trainer.model.get_input_embeddings()
    before, row_before = base_logits(ids), row(torch.tensor([mask_id])).detach().clone()
    trainer.train()
    torch.testing.assert_close(base_logits(ids), before)
    assert not torch.equal(row(torch.tensor([mask_id])), row_before)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.teacher_model is None


def test_prompt_only_data_is_completed_on_policy(tmp_path, tokenizer):
    trainer = MTPDistillTrainer(model(), arguments(tmp_path), rows().select_columns(["prompt"]), processing_class=tokenizer)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 1 <= entry["completions/mean_length"] <= 12


def test_evaluation_is_repeatable_and_decodes(tmp_path, tokenizer, capsys):
    trainer = MTPDistillTrainer(
        model(), arguments(tmp_path, num_eval_prompts=2, thresholds=[0.0]), rows(), load_dataset("test", 6, 0),
        processing_class=tokenizer,
    )  # fmt: skip
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"]
    assert first["eval_decoding/acceleration_0.0"] == pytest.approx(6.0)  # static k = k_max, 12 tokens
    assert first["eval_decoding/verified_0.0"] <= first["eval_decoding/acceleration_0.0"]
    shown = capsys.readouterr().out
    assert "step 0, ConfAdapt 0.0" in shown
    assert shown.count("6.00") == 4  # two evaluations of two answers
    assert {"eval_reward", "eval_agreement/place_2", "eval_drift/kl"} <= set(first)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch deprecates what transformers calls
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # compiling takes a minute
@pytest.mark.parametrize("exact", [False, True])
def test_flex_attention_evaluates_and_decodes_like_sdpa(tmp_path, tokenizer, monkeypatch, exact):
    """FlexAttention has no backward on CPUs, so only evaluation is tested. Decoding switches to SDPA with dense masks.

    The passes are not compiled. PyTorch 2.13 compiles FlexAttention for CPUs with a kernel that reads memory after the keys if
    heads have 8 or 16 features, so its results would depend on what is there.
    """
    monkeypatch.setattr("mtp_trl.training.trainer.check_attention_backend", lambda *given: None)  # it refuses CPUs
    outcomes = []
    for backend in ("sdpa", "flex_attention"):
        student = model()
        student.set_attn_implementation(backend)
        args = arguments(tmp_path, num_eval_prompts=2, exact=exact)
        with torch.compiler.set_stance("force_eager"):
            trainer = MTPDistillTrainer(student, args, rows(), load_dataset("test", 6, 0), processing_class=tokenizer)
            metrics = trainer.evaluate()
        assert student.config._attn_implementation == backend
        outcomes.append({name: value for name, value in metrics.items() if not name.endswith(("time", "runtime", "second"))})
    assert outcomes[1] == pytest.approx(outcomes[0], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("options", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_flex_attention_on_a_cpu_is_refused(tmp_path, tokenizer, options):
    """Compiled for CPUs, it reads memory after the keys: the losses would be NaN on one machine and plausible on another."""
    model().save_pretrained(tmp_path / "base")
    args = arguments(tmp_path, **{options: {"attn_implementation": "flex_attention"}})
    with pytest.raises(ValueError, match=r"'flex_attention' cannot train this model on cpu; .*'sdpa'.* backward"):
        MTPDistillTrainer(str(tmp_path / "base"), args, rows(), processing_class=tokenizer)


def test_attached_decoder_works_before_anything_is_saved(tmp_path, tokenizer):
    trainer = MTPDistillTrainer(model(), arguments(tmp_path), rows(), processing_class=tokenizer)
    ids = tokenizer("Tom has 3", return_tensors="pt")
    output = trainer.model.generate(**ids, confadapt=0.0, max_new_tokens=12, return_dict_in_generate=True)
    assert output.block_lengths == [[6, 6]]


def test_a_saved_model_decodes_like_the_trained_one(tmp_path, tokenizer):
    args = arguments(tmp_path, confadapt=0.001, hub_token="hf_secret")
    trainer = MTPDistillTrainer(model(), args, rows(), processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    ids = tokenizer("Tom has 3", return_tensors="pt")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float32)
    expected = trainer.model.generate(**ids, confadapt=0.001, max_new_tokens=16)
    assert torch.equal(loaded.generate(**ids, max_new_tokens=16), expected)  # the default was saved
    assert loaded.config.mtp["k_max"] == 6
    provenance = json.loads((tmp_path / "mtp_provenance.json").read_text())
    assert provenance["objective"] == "hard"
    assert provenance["versions"]["torch"] == torch.__version__
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    assert "hf_secret" not in json.dumps(provenance)
    assert args.hub_token == "hf_secret"


def test_a_card_is_written_with_every_checkpoint(tmp_path, tokenizer):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    MTPDistillTrainer(model(), args, rows(), processing_class=tokenizer).train()
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n")
    assert "custom_generate" in card
    assert "confadapt=0.9" in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", trust_remote_code=True)
    assert loaded.generate(torch.tensor([[0, 5, 6]]), confadapt=0.9, max_new_tokens=4).shape[1] <= 7


def test_too_few_rows_for_a_step_are_refused_before_weights_load(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="4 usable rows, fewer than the 8"):
        MTPDistillTrainer(str(tmp_path / "no_such_model"), arguments(tmp_path), rows(4), processing_class=tokenizer)


def with_reserved_token(tokenizer, folder):
    """Extend a tokenizer to use every embedding row, the last one for a reserved token, and save it with a model."""
    tokenizer.add_tokens([f"<filler{i}>" for i in range(767 - len(tokenizer))])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|reserved_special_token_7|>"]}, replace_extra_special_tokens=False)
    assert len(tokenizer) == 768
    model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("columns", [["prompt", "completion"], ["prompt"]])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_reserved_token_that_becomes_the_mask_is_refused_in_the_data(tmp_path, tokenizer, by_name, columns, monkeypatch):
    with_reserved_token(tokenizer, tmp_path / "base")
    texts = {"prompt": ["a"] * 8 + ["x <|reserved_special_token_7|>"], "completion": ["b"] * 9}
    data = Dataset.from_dict({name: texts[name] for name in columns})
    monkeypatch.setattr("mtp_trl.training.student.create_model_from_path", lambda *_, **__: pytest.fail("weights were loaded"))
    base = str(tmp_path / "base") if by_name else model()
    message = r"mask token '<\|reserved_special_token_7\|>'; remove it from the data"
    with pytest.raises(ValueError, match=message if columns == ["prompt"] else f"Row 8 of the train set: .*{message}"):
        MTPDistillTrainer(base, arguments(tmp_path), data, processing_class=tokenizer)


def test_an_unused_mask_token_string_is_ordinary_text(tmp_path, tokenizer):
    with_reserved_token(tokenizer, tmp_path / "base")
    data = Dataset.from_dict({"prompt": ["a <|mtp|>"] * 8, "completion": ["b"] * 8})
    trainer = MTPDistillTrainer(str(tmp_path / "base"), arguments(tmp_path), data)
    assert trainer.provenance["mask_token"] == "<|reserved_special_token_7|>"
    assert not any(trainer._tokens.mask_id in row["prompt_ids"] for row in trainer.train_dataset)


def test_bare_prompts_under_zero3_need_gathered_weights(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(Parallelism, "of", lambda args: Parallelism(zero_stage=3))
    args = arguments(tmp_path, ds3_gather_for_generation=False)
    with pytest.raises(ValueError, match="cannot complete bare prompts under ZeRO-3"):
        MTPDistillTrainer("no_such_model", args, rows().select_columns(["prompt"]), processing_class=tokenizer)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k_min": 1}, "k_min"), ({"k_max": 1}, "k_max"), ({"objective": "sotf"}, "objective"),
        ({"slots_per_row": 0}, "slots_per_row"), ({"confadapt": 1.5}, "probability"), ({"thresholds": [-0.1]}, "probability"),
        ({"ntp_coef": -1.0}, "ntp_coef"),
        ({"ground_truth_warmup": 2.0}, "share of the steps"),
        ({"k_curriculum": -0.1}, "share of the steps"),
        ({"place_decay": 0.0}, "place_decay"),
        ({"completions_by": "nobody"}, "completions_by"),
        ({"completions_by": "student_blocks", "use_vllm": True}, "not available with use_vllm=True"),
        ({"completions_by": "teacher", "use_vllm": True}, "completes prompts with the student's weights"),
        ({"exact": True, "ntp_coef": 1.0}, "exact mode"),
        ({"k_max": 1025}, "k_max=1025 .*at most 1024"),
        ({"exact_alpha": 0}, "exact_alpha must be > 0, got 0"), ({"exact_alpha": float("nan")}, "exact_alpha .*got nan"),
        ({"reward_floor": 0.0}, "reward_floor .*got 0.0"), ({"reward_floor": float("nan")}, "reward_floor .*got nan"),
    ],
)  # fmt: skip
def test_errors_name_the_invalid_option(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **wrong)


def test_configuration_pickles(tmp_path):
    args = arguments(tmp_path)
    assert pickle.loads(pickle.dumps(args)).k_max == args.k_max


@pytest.mark.parametrize(
    ("by", "exact"), [("student", False), ("teacher", False), ("student_blocks", False), ("student", True)]
)
def test_completions_and_samples_stay_within_max_length(tmp_path, tokenizer, by, exact):
    """A text of max_length tokens and its last block just fit into the table of 48 learned positions."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 768, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    student = GPT2LMHeadModel(GPT2Config(n_positions=48, **sizes))
    args = arguments(
        tmp_path, completions_by=by, exact=exact, max_length=44, max_completion_length=200, num_eval_prompts=3, confadapt=0.0,
        gradient_checkpointing=False, generation_kwargs={"do_sample": False, "eos_token_id": None},
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": ["a b c " * n for n in (1, 2, 6) for _ in range(8)]})
    trainer = MTPDistillTrainer(student, args, prompts, prompts, processing_class=tokenizer)
    batch = trainer._generate_and_score_completions([{"prompt": prompts[n]["prompt"]} for n in (0, 8, 16)])
    assert batch["lengths"].tolist() == [44, 44, 44]  # a long prompt does not shorten the completions of the others
    assert trainer.generation_config.max_new_tokens == 200
    trainer.train()
    trainer.evaluate()


def test_completions_of_a_server_are_truncated_to_max_length(tmp_path, tokenizer, monkeypatch):
    trainer = MTPDistillTrainer(
        model(),
        arguments(tmp_path, max_length=10),
        Dataset.from_dict({"prompt": ["a b"] * 32}),
        processing_class=tokenizer,
    )
    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", lambda self, prompts: [[7] * 50 for _ in prompts])
    assert [len(completion) for completion in trainer._generate_single_turn([[5] * 4, [5] * 9])] == [6, 1]


def test_muon_uses_the_betas_and_epsilon_of_the_configuration(tmp_path, tokenizer):
    args = arguments(tmp_path, muon=True, adam_beta1=0.7, adam_beta2=0.9, adam_epsilon=1e-5)
    trainer = MTPDistillTrainer(model(), args, rows(), processing_class=tokenizer)
    groups = trainer.create_optimizer().param_groups
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.7, 0.9), 1e-5)}


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"completions_by": "student_blocks"}])
def test_the_default_precision_trains_evaluates_and_decodes(tmp_path, tokenizer, options):
    """Weights are float32 and autocast uses bf16. Llama's rotary embeddings then give keys in float32 and values in bf16."""
    bare = "completions_by" in options
    data = Dataset.from_dict({"prompt": ["a b c"] * 32}) if bare else rows()
    args = arguments(tmp_path, bf16=True, num_eval_prompts=2, max_steps=1, **options)
    trainer = MTPDistillTrainer(model(), args, data, data, processing_class=tokenizer)
    trainer.train()
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"])
    assert [name for name in metrics if name.startswith("eval_decoding/")]


def test_vllm_may_complete_for_the_teacher_of_exact_mode(tmp_path):
    """There, student and teacher are the same base."""
    assert arguments(tmp_path, completions_by="teacher", use_vllm=True, exact=True).use_vllm

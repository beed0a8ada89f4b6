"""Estimates are compared with the memory peaks of real training steps and with counts by hand."""

import copy
import weakref

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig

import mtp_trl.word_problems
from mtp_trl import MTPDistillConfig, MTPDistillTrainer
from mtp_trl.cli import main
from mtp_trl.estimate import GIB, Setup, adapter_parameters, estimate, setup_of

CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip


class PeakOfTensors(TorchDispatchMode):
    """Measures the peak of the bytes of all live tensors in forward and backward, as an allocator without waste would."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen[storage] = True
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return output


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["full", "lora", "exact"])
def test_estimates_are_above_measured_peaks_by_less_than_30_percent(tmp_path, mode, checkpointing):
    """Run two optimizer steps of the trainer on rows that fill max_length."""
    from peft import LoraConfig

    args = MTPDistillConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", save_strategy="no", k_max=8, slots_per_row=48,
        max_length=96, max_steps=2, per_device_train_batch_size=8, gradient_checkpointing=checkpointing, disable_tqdm=True,
        exact=mode == "exact", exact_rank=16,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["Tom has"] * 16, "completion": [" apples and pears" * 40] * 16})
    tokenizer = AutoTokenizer.from_pretrained(mtp_trl.word_problems.__path__[0] + "/base")
    model_arguments = ModelConfig(use_peft=mode == "lora", lora_r=8, lora_target_modules=["q_proj", "v_proj"], dtype="float32")
    peft_config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"]) if mode == "lora" else None
    with PeakOfTensors() as measured:
        model = LlamaForCausalLM(copy.deepcopy(CONFIG))
        for parameter in model.parameters():
            measured.count(parameter)
        trainer = MTPDistillTrainer(model, args, rows, processing_class=tokenizer, peft_config=peft_config)
        trainer.train()
    predicted = estimate(CONFIG, setup_of(args, model_arguments, None, 1)).total
    print(f"{mode}, checkpointing {checkpointing}: {predicted / measured.peak:.2f} x {measured.peak / 2**20:.1f} MB")
    assert 1.0 <= predicted / measured.peak < 1.3


def test_parameters_gradients_and_states_of_8b_by_hand():
    """With ZeRO-3 on 8 GPUs in bf16, weights, gradients and teacher take 2 bytes each, master copy and moments 12."""
    setup = Setup(mode="full", rows=16, length=160, slots=40, positions=720, master=True, zero_stage=3, processes=8)
    memory, billion = estimate(LLAMA_8B, setup), 8.030261248
    assert memory.parameters == memory.teacher == memory.gradients == pytest.approx(2e9 * billion / 8, rel=1e-6)
    assert memory.optimizer == pytest.approx(12e9 * billion / 8, rel=1e-6)
    assert 1 < memory.activations / GIB < 12
    offloaded = estimate(LLAMA_8B, Setup(**{**vars(setup), "offload_optimizer": True}))
    assert (offloaded.optimizer, offloaded.host) == (0, memory.optimizer)


def test_exact_mode_keeps_no_optimizer_state_for_the_base():
    setup = Setup(mode="exact", rows=16, length=160, slots=128, positions=1000, master=True, zero_stage=2, processes=8, rank=64)
    memory = estimate(LLAMA_8B, setup)
    adapter = 64 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)) + 4096
    assert memory.parameters == 2 * (8030261248 + adapter)
    assert memory.teacher == 0
    assert memory.optimizer == 12 * adapter / 8


@pytest.mark.parametrize(
    ("targets", "per_layer"),
    [(["q_proj"], 2 * 128), (["q_proj", "v_proj"], 4 * 128), ("all-linear", 8 * 128 + 3 * (128 + 344))],
)
def test_lora_targets_are_names_or_one_name_or_all_linear_layers(tmp_path, targets, per_layer):
    args = MTPDistillConfig(str(tmp_path), use_cpu=True, bf16=False)
    named = ModelConfig(use_peft=True, lora_r=8, lora_target_modules=targets)  # TRL turns one name into a string
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    assert adapter_parameters(model, setup_of(args, named, None, 1)) == 8 * 4 * per_layer + 128


def test_the_command_reads_a_recipe(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: '{tmp_path}'\ndataset_name: word_problems\nbf16: false\nreport_to: none\n")
    assert main(["estimate", str(recipe), "--memory", "80", "--exact", "true"]) == 0
    out = capsys.readouterr().out
    assert "exact" in out
    assert "fits" in out
    assert main(["estimate", str(recipe), "--memory", "0.001"]) == 1

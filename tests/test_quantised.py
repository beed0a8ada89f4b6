"""Exact mode on quantised bases, on the CPU: training leaves the base unchanged, and verified decoding returns its text."""

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

import mtp_trl.word_problems
from mtp_trl import MTPDistillConfig, MTPDistillTrainer
from mtp_trl.custom_generate.base import base_fingerprint
from mtp_trl.modeling.exact import add_gated_adapter
from mtp_trl.modeling.mask_token import add_mask_token
from mtp_trl.training.readers import ExactReader
from mtp_trl.training.regions import pack_regions, row_generator, sample_regions
from mtp_trl.word_problems import load_dataset

BASE = str(Path(mtp_trl.word_problems.__file__).parent / "base")
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:.*these weights cannot be compared with it"),
]


def quantisation(kind: str):
    if kind == "torchao, 8 bits":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "bitsandbytes, 8 bits":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def digest(model) -> str:
    joined = hashlib.sha256()
    for name, value in sorted(item for item in model.state_dict().items() if "mtp_adapter" not in item[0]):
        dense = value.dequantize() if hasattr(value, "dequantize") and type(value.data) is not torch.Tensor else value
        joined.update(name.encode() + dense.detach().float().numpy().tobytes() if torch.is_tensor(dense) else name.encode())
    return joined.hexdigest()


@pytest.mark.parametrize("kind", ["bitsandbytes, 8 bits", "bitsandbytes, 4 bits", "torchao, 8 bits"])
def test_an_adapter_trains_on_a_quantised_base_and_decodes_its_text(tmp_path, kind):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    args = MTPDistillConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", k_max=6, slots_per_row=24, max_steps=16, exact=True,
        exact_rank=8, adapter_only=True, per_device_train_batch_size=4, logging_steps=1, learning_rate=3e-3, muon=True,
        disable_tqdm=True, save_strategy="no", num_eval_prompts=0,
    )  # fmt: skip
    trainer = MTPDistillTrainer(
        BASE, args, load_dataset("train", 64, 0), load_dataset("test", 4, 0),
        processing_class=tokenizer, quantization_config=quantisation(kind),
    )  # fmt: skip
    before = digest(trainer.model)
    trainer.evaluate()  # an evaluation must not break the gradients
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert digest(trainer.model) == before

    ids = tokenizer("Question: Tom has 3 apples.\nAnswer:", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=quantisation(kind), dtype=torch.float32)
    greedy = base.generate(**ids, max_new_tokens=24, do_sample=False)
    options = {"custom_generate": str(tmp_path), "trust_remote_code": True, "confadapt": 0.0, "max_new_tokens": 24}
    assert torch.equal(base.generate(**ids, **options), greedy)
    drafts = trainer.model.generate(**ids, confadapt=0.0, verify=False, max_new_tokens=24)
    assert torch.equal(base.generate(**ids, **options, verify=False), drafts)


def test_packed_weights_have_no_fingerprint(tmp_path):
    pytest.importorskip("bitsandbytes")
    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=kind, dtype=torch.float32)
    assert base_fingerprint(model, ["model.layers.0.mlp.up_proj"]) is None


def test_gradients_through_4_bit_weights_equal_those_of_dequantised_weights():
    functional = pytest.importorskip("bitsandbytes").functional
    gradients = []
    for dense in (False, True):
        kind = quantisation("bitsandbytes, 4 bits")
        model = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=kind, dtype=torch.float32)
        add_mask_token(model, AutoTokenizer.from_pretrained(BASE), k_max=5)
        if dense:
            for name, module in list(model.named_modules()):
                if type(module).__name__ == "Linear4bit":
                    linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
                    linear.weight.data = functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
                    model.set_submodule(name, linear)
        adapter = add_gated_adapter(model, rank=4, alpha=8)
        for update in adapter.updates:
            torch.nn.init.normal_(update.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
        clean = torch.randint(3, 60, (1, 15), generator=torch.Generator().manual_seed(3))
        regions = sample_regions([3], [13], k_min=2, k_max=5, slots=14, generators=[row_generator(0, 0, 0)])
        layout = pack_regions(
            clean, torch.tensor([15]), regions, k_max=5, slots=14, mask_token_id=model.config.mtp["mask_token_id"]
        )
        with torch.no_grad():
            model.eval()(input_ids=clean)  # as an evaluation during training does
        hidden = ExactReader(model.train(), with_teacher=False).read_student(layout)
        hidden[layout.read_BRK[layout.drawn_BRK]].square().sum().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-2 * float(expected.abs().max()), rtol=2e-2)

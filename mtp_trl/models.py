"""The student and its teacher: how they are loaded, frozen, adapted, and put into the state in which each reads."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import create_model_from_path

from .config import MTPDistillConfig
from .forward import evaluating, take_flex_attention
from .gated_adapter import add_gated_adapter
from .mask_token import add_mask_token, chosen_mask_token

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def make_exact(student: Any, peft_config: PeftConfig | None, args: MTPDistillConfig) -> None:
    """Freeze the student and give it the mask-gated adapter that `args` or a LoRA configuration describe.

    Of the configuration `r`, `lora_alpha` and `target_modules` are taken: names, one name, or "all-linear", which stands for
    the layers that this adapter has by default.

    Raises:
        ValueError: for a model that has adapters already, under FSDP 1, where FSDP or ZeRO-3 would not gather the adapter,
            and for a configuration that asks for more than rank, alpha and layers.
    """
    fsdp = _fsdp(args)
    if fsdp is not None and fsdp != ("2", "FULL_STATE_DICT"):
        raise ValueError(
            "exact mode's adapter is saved whole, which needs FSDP version 2 and FULL_STATE_DICT, got version "
            f"{fsdp[0]} and {fsdp[1]}; change these, or use DDP or DeepSpeed ZeRO."
        )
    zero = None if args.deepspeed_plugin is None else args.deepspeed_plugin.hf_ds_config
    if zero is not None and zero.is_zero3():
        gathers = "stage3_gather_16bit_weights_on_model_save"
        if not zero.get_value(f"zero_optimization.{gathers}", False):
            raise ValueError(f"exact mode's adapter is saved whole; set {gathers} to true in the DeepSpeed configuration.")
    if is_peft_model(student):
        raise ValueError("exact mode brings its own adapter, got a PEFT model; pass its base, or merge_and_unload() it.")
    shape: dict[str, Any] = {
        "rank": args.exact_rank,
        "alpha": args.exact_alpha,
        "target_modules": args.exact_target_modules,
    }
    if peft_config is not None:
        _check_shape_alone(peft_config)
        targets = peft_config.target_modules
        names = sorted(targets) if isinstance(targets, set) else targets
        shape = {"rank": peft_config.r, "alpha": peft_config.lora_alpha, "target_modules": names}
    student.config.mtp["exact"] = True
    add_gated_adapter(student, seed=args.seed, **shape)


_TAKEN = {"r", "lora_alpha", "target_modules"}
_OF_THE_FILE = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}


def _check_shape_alone(peft_config: PeftConfig) -> None:
    """Exact mode takes the shape of its adapter from a LoRA's configuration; the rest would be ignored."""
    if peft_config.peft_type != "LORA":
        raise ValueError(f"exact mode's adapter is a LoRA, got {type(peft_config).__name__}; pass a LoraConfig, or none.")
    usual = type(peft_config)()
    for field in dataclasses.fields(peft_config):
        value, default = getattr(peft_config, field.name), getattr(usual, field.name)
        if field.name not in _TAKEN | _OF_THE_FILE and value != default:
            raise ValueError(
                f"exact mode takes r, lora_alpha and target_modules of peft_config and would ignore {field.name}={value!r}; "
                f"leave it at {default!r}, or set exact_rank, exact_alpha and exact_target_modules instead of a peft_config."
            )


def _fsdp(args: MTPDistillConfig) -> tuple[str, str] | None:
    """Version and kind of state dict where FSDP shards the model, as `args` or `accelerate launch` say."""
    if args.fsdp_plugin_args is not None:
        plugin = args.fsdp_plugin_args
        return str(plugin.get("fsdp_version", 1)), str(plugin.get("state_dict_type", "FULL_STATE_DICT"))
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return os.environ.get("FSDP_VERSION", "1"), os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    return None


def mask_token_of(model: Any, tokenizer: PreTrainedTokenizerBase, args: MTPDistillConfig) -> str:
    """The mask token that a run of this model will use, before its weights load: data must not contain it.

    Of a model that cannot be found the configured one: that it is missing is said where it loads.
    """
    if not isinstance(model, str):
        return chosen_mask_token(model.config, tokenizer, mask_token=args.mask_token)
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    found = {name: options[name] for name in _WHERE if name in options}
    try:
        config = AutoConfig.from_pretrained(model, **found)
    except OSError:
        return args.mask_token
    return chosen_mask_token(config, tokenizer, mask_token=args.mask_token)


_WHERE = ("revision", "trust_remote_code", "subfolder", "cache_dir", "token", "local_files_only", "code_revision")


def model_loader(name: str, args: MTPDistillConfig, quantization_config: Any) -> Callable[..., PreTrainedModel]:
    """Loads the checkpoint as `args.model_init_kwargs` say, as often as it is called; keyword arguments override."""
    options = dict(args.model_init_kwargs or {})
    args.model_init_kwargs = None  # used up: the base class gets a model and would warn
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None

    def load(**overrides: Any) -> PreTrainedModel:
        if is_deepspeed_zero3_enabled():
            import deepspeed

            deepspeed.init_distributed()  # weights are sharded while they load; without CUDA nobody has started it yet
        chosen = {**options, **overrides}
        model: PreTrainedModel = create_model_from_path(name, **chosen)
        if chosen.get("attn_implementation") is None:
            take_flex_attention(model, args.max_length + args.slots_per_row, args.device)
        return model

    return load


def frozen_teacher(
    student: PreTrainedModel,
    load: Callable[..., PreTrainedModel] | None,
    tokenizer: PreTrainedTokenizerBase,
    args: MTPDistillConfig,
) -> PreTrainedModel:
    """The student's checkpoint once more, with the same mask row. Loaded by name where possible (as ZeRO-3 needs)."""
    if load is None:
        teacher = copy.deepcopy(student)
    else:
        teacher = load(**(args.teacher_model_init_kwargs or {}))
        args.teacher_model_init_kwargs = None  # used up: the base class refuses them beside a loaded teacher
        add_mask_token(teacher, tokenizer, mask_token=args.mask_token, k_max=args.k_max, seed=args.seed)
    return teacher.requires_grad_(False).eval()


def causal_lm(model: Any) -> PreTrainedModel:
    """The causal LM itself, with a PEFT wrapper taken off."""
    causal: PreTrainedModel = model.get_base_model() if is_peft_model(model) else model
    return causal


def with_mask_row(peft_config: PeftConfig, model: PreTrainedModel, mask_id: int) -> PeftConfig:
    """Train the mask token's embedding row beside the adapters: adapters cannot teach a model what a new input means."""
    if getattr(peft_config, "trainable_token_indices", None) or getattr(peft_config, "modules_to_save", None):
        return peft_config
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    peft_config = copy.copy(peft_config)
    peft_config.trainable_token_indices = {name.rsplit(".", 1)[-1]: [mask_id]}
    return peft_config


@contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """The base as the teacher sees it: no adapters, no dropout."""
    with evaluating(model), model.disable_adapter():
        yield

"""The student and its teacher: how they are loaded, frozen and adapted."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path

from ..modeling.attention import take_flex_attention
from ..modeling.exact import add_gated_adapter
from ..modeling.mask_token import add_mask_token, chosen_mask_token
from ..modeling.parallelism import Parallelism, prepare_loading
from .config import MTPDistillConfig

if TYPE_CHECKING:
    from peft import PeftConfig


def make_exact(student: Any, peft_config: PeftConfig | None, args: MTPDistillConfig) -> None:
    """Freeze the student and give it the mask-gated adapter that `args` or a LoRA configuration describe.

    Of the configuration `r`, `lora_alpha` and `target_modules` are taken: names, one name, or "all-linear", which stands for
    the layers that this adapter has by default.

    Raises:
        ValueError: for a model that has adapters already, under FSDP 1, where FSDP or ZeRO-3 would not gather the adapter,
            and for a configuration that asks for more than rank, alpha and layers.
    """
    Parallelism.of(args).check_adapter_is_saved_whole()
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
        prepare_loading()
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

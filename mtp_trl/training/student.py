"""Load the student and its teacher, and add exact mode's adapter."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import create_model_from_path

from ..modeling.attention import check_attention_backend, take_flex_attention
from ..modeling.exact import add_gated_adapter
from ..modeling.gguf import dequantised, gguf_argument, gguf_options
from ..modeling.mask_token import add_mask_token, chosen_mask_token
from ..modeling.parallelism import Parallelism, prepare_loading
from .config import MTPDistillConfig

if TYPE_CHECKING:
    from peft import PeftConfig


def make_exact(student: Any, peft_config: PeftConfig | None, args: MTPDistillConfig) -> None:
    """Freeze the student and add the mask-gated adapter that `args` or a LoRA configuration describes.

    Only `r`, `lora_alpha` and `target_modules` of the LoRA configuration are used. `target_modules` is a list of names, one
    name, or "all-linear", which selects the layers that this adapter has by default.

    Raises:
        ValueError: if the student already has adapters, FSDP 1 is used, FSDP or ZeRO-3 is not configured to gather the
            adapter when it is saved, or the LoRA configuration sets more than rank, alpha and layers.
    """
    Parallelism.of(args).check_adapter_is_saved_whole()
    if is_peft_model(student):
        raise ValueError("exact mode adds its own adapter, got a PEFT model; pass its base, or merge_and_unload() it.")
    shape: dict[str, Any] = {
        "rank": args.exact_rank,
        "alpha": args.exact_alpha,
        "target_modules": args.exact_target_modules,
    }
    if peft_config is not None:
        _check_only_shape_is_set(peft_config)
        targets = peft_config.target_modules
        names = sorted(targets) if isinstance(targets, set) else targets
        shape = {"rank": peft_config.r, "alpha": peft_config.lora_alpha, "target_modules": names}
    student.config.mtp["exact"] = True
    add_gated_adapter(student, seed=args.seed, **shape)


_USED_FIELDS = {"r", "lora_alpha", "target_modules"}
_METADATA_FIELDS = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}


def _check_only_shape_is_set(peft_config: PeftConfig) -> None:
    """Raise ValueError if a LoRA configuration sets anything besides the adapter's shape, which exact mode would ignore."""
    if peft_config.peft_type != "LORA":
        raise ValueError(f"exact mode's adapter is a LoRA, got {type(peft_config).__name__}; pass a LoraConfig, or none.")
    defaults = type(peft_config)()
    for field in dataclasses.fields(peft_config):
        value, default = getattr(peft_config, field.name), getattr(defaults, field.name)
        if field.name not in _USED_FIELDS | _METADATA_FIELDS and value != default:
            raise ValueError(
                "exact mode uses only r, lora_alpha and target_modules of peft_config and would ignore "
                f"{field.name}={value!r}; leave it at {default!r}, "
                "or set exact_rank, exact_alpha and exact_target_modules instead of peft_config."
            )


def load_tokenizer(name: str, args: MTPDistillConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer saved with a model, for training."""
    options = {"trust_remote_code": args.trust_remote_code, **gguf_argument(args.gguf_file)}
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, padding_side="left", **options)
    return tokenizer


def mask_token_of(model: Any, tokenizer: PreTrainedTokenizerBase, args: MTPDistillConfig) -> str:
    """Return the mask token that a run of this model will use. It is needed before weights load, to check the data.

    If the model cannot be found, return the configured token; loading the model then reports the error.
    """
    if not isinstance(model, str):
        return chosen_mask_token(model.config, tokenizer, mask_token=args.mask_token)
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    config_options = {name: options[name] for name in _CONFIG_OPTIONS if name in options}
    try:
        config = AutoConfig.from_pretrained(model, **config_options, **gguf_argument(args.gguf_file))
    except OSError:
        return args.mask_token
    return chosen_mask_token(config, tokenizer, mask_token=args.mask_token)


_CONFIG_OPTIONS = ("revision", "trust_remote_code", "subfolder", "cache_dir", "token", "local_files_only", "code_revision")


def model_loader(name: str, args: MTPDistillConfig, quantization_config: Any) -> Callable[..., PreTrainedModel]:
    """Return a function that loads the checkpoint with `args.model_init_kwargs`, and can be called repeatedly.

    Keyword arguments of the returned function override `args.model_init_kwargs`.
    """
    options = dict(args.model_init_kwargs or {})
    args.model_init_kwargs = None  # the base class receives a loaded model and would warn about them
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None

    def load(**overrides: Any) -> PreTrainedModel:
        prepare_loading()
        chosen = {**options, **overrides}
        model: PreTrainedModel = (
            create_model_from_path(name, **chosen) if args.gguf_file is None else _load_gguf(name, args.gguf_file, **chosen)
        )
        if chosen.get("attn_implementation") is None:
            take_flex_attention(model, args.max_length + args.slots_per_row, args.device)
        return model

    return load


def _load_gguf(name: str, gguf_file: str, *, dtype: Any = "float32", **options: Any) -> PreTrainedModel:
    """Load a model whose weights are dequantised in float32, then rounded to `dtype`.

    For some architectures, transformers would dequantise in `dtype`, with other values. An adapter trained on those would not
    recognise its base in float32.
    """
    in_file = dtype in ("auto", None)  # blocks become float32, other tensors keep their dtype
    options = {**gguf_options(gguf_file), **options, "dtype": dtype if in_file else torch.float32}
    model = dequantised(create_model_from_path(name, AutoModelForCausalLM, **options))
    if not in_file:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model


def frozen_teacher(
    student: PreTrainedModel,
    load: Callable[..., PreTrainedModel] | None,
    tokenizer: PreTrainedTokenizerBase,
    args: MTPDistillConfig,
) -> PreTrainedModel:
    """Return a frozen copy of the student's checkpoint with the same mask row.

    It is loaded again if `load` is given, which ZeRO-3 needs; otherwise the student is copied.
    """
    if load is None:
        teacher = copy.deepcopy(student)
    else:
        teacher = load(**(args.teacher_model_init_kwargs or {}))
        args.teacher_model_init_kwargs = None  # the base class refuses them with a loaded teacher
        check_attention_backend(teacher, args.device)
        add_mask_token(teacher, tokenizer, mask_token=args.mask_token, k_max=args.k_max, seed=args.seed)
    return teacher.requires_grad_(False).eval()

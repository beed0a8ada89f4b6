"""How a run distributes its weights over ranks (DeepSpeed ZeRO, FSDP, or neither), and helpers for sharded weights.

TRL's `DistributedBackend` reads the same from an existing `Accelerator`. This module reads it from the training arguments,
before a model loads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import deepspeed as zero
from transformers.integrations import is_deepspeed_zero3_enabled

if TYPE_CHECKING:
    from peft import PeftConfig

_GATHER_ON_SAVE = "stage3_gather_16bit_weights_on_model_save"


@dataclass(frozen=True)
class Parallelism:
    """How a run distributes its weights.

    Attributes:
        zero_stage: stage of DeepSpeed ZeRO, 0 to 3; None without DeepSpeed.
        gathers_on_save: whether ZeRO-3 gathers the weights when a model is saved.
        fsdp_version: 1 or 2; None without FSDP.
        fsdp_state_dict: kind of state dict that FSDP saves.
    """

    zero_stage: int | None = None
    gathers_on_save: bool = False
    fsdp_version: int | None = None
    fsdp_state_dict: str = "FULL_STATE_DICT"

    @classmethod
    def of(cls, args: TrainingArguments) -> Parallelism:
        """Read the settings from the training arguments, or from the environment variables that `accelerate launch` sets."""
        stage, gathers = None, False
        if args.deepspeed_plugin is not None:
            config = args.deepspeed_plugin.hf_ds_config
            stage = int(config.get_value("zero_optimization.stage", 0))
            gathers = bool(config.get_value(f"zero_optimization.{_GATHER_ON_SAVE}", False))
        version, kind = None, "FULL_STATE_DICT"
        if args.fsdp_plugin_args is not None:
            plugin = args.fsdp_plugin_args
            version, kind = int(plugin.get("fsdp_version", 1)), str(plugin.get("state_dict_type", kind))
        elif os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            version, kind = int(os.environ.get("FSDP_VERSION", "1")), os.environ.get("FSDP_STATE_DICT_TYPE", kind)
        return cls(stage, gathers, version, kind)

    @property
    def is_wrapped(self) -> bool:
        """Whether DeepSpeed or FSDP wraps the model, so that it can run only through the wrapper's forward."""
        return self.zero_stage is not None or self.fsdp_version is not None

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded, so that no rank has all of them."""
        return self.zero_stage == 3 or self.fsdp_version is not None

    def check_adapter_is_saved_whole(self) -> None:
        """Raise ValueError if exact mode's adapter would not be gathered when it is saved."""
        if self.fsdp_version is not None and (self.fsdp_version, self.fsdp_state_dict) != (2, "FULL_STATE_DICT"):
            raise ValueError(
                "exact mode gathers its adapter to save it, which needs FSDP version 2 and FULL_STATE_DICT, got version "
                f"{self.fsdp_version} and {self.fsdp_state_dict}; change these, or use DDP or DeepSpeed ZeRO."
            )
        if self.zero_stage == 3 and not self.gathers_on_save:
            raise ValueError(
                f"exact mode gathers its adapter to save it; set {_GATHER_ON_SAVE} to true in the DeepSpeed configuration."
            )

    def check_lora(self, model: PreTrainedModel, peft_config: PeftConfig) -> None:
        """Raise ValueError if FSDP cannot shard the adapters: PEFT wraps tied embeddings, which accelerate then ties again."""
        trains_rows = bool(getattr(peft_config, "trainable_token_indices", None))
        if self.fsdp_version is not None and trains_rows and model.config.get_text_config().tie_word_embeddings:
            raise ValueError(
                f"FSDP cannot train LoRA and the mask token's row on {type(model).__name__} with tied embeddings "
                "(tie_word_embeddings=True in its config); use exact=True, DeepSpeed ZeRO or DDP."
            )

    def check_completions(self, *, gathers: bool) -> None:
        """Raise ValueError if bare prompts cannot be completed.

        If ZeRO-3 gathers layer by layer, ranks whose texts end at different times would wait for each other forever.

        Args:
            gathers: whether all weights are gathered before bare prompts are completed.
        """
        if self.zero_stage == 3 and not gathers:
            raise ValueError(
                "ds3_gather_for_generation=False cannot complete bare prompts under ZeRO-3; set it to true, or use "
                "data with completions."
            )


def is_whole_fsdp_unit(module: nn.Module) -> bool:
    """Whether this module is an FSDP 2 unit whose weights are currently gathered."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return isinstance(module, FSDPModule) and not any(isinstance(weight, DTensor) for weight in module.parameters())


def prepare_loading() -> None:
    """Initialise DeepSpeed before weights load, if ZeRO-3 is used.

    ZeRO-3 shards weights while they load. Without CUDA, nothing else has initialised DeepSpeed by then.
    """
    if is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.init_distributed()


@contextmanager
def gathered(weights: list[nn.Parameter]) -> Iterator[None]:
    """Gather parameters within the block if ZeRO-3 has sharded them. Every rank must write the same values."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights, modifier_rank=0):
        yield


@contextmanager
def loading_whole_weights() -> Iterator[None]:
    """Let this rank load whole weights within the block. ZeRO-3 would otherwise shard them over all ranks."""
    configured: Any = zero._hf_deepspeed_config_weak_ref
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero._hf_deepspeed_config_weak_ref = configured

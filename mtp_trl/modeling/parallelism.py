"""How the weights of a run are spread over ranks, and what has to be done about it: DeepSpeed ZeRO, FSDP, or neither.

TRL's `DistributedBackend` says the same of a built `Accelerator`; this is known from the arguments, before a model loads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import deepspeed as zero
from transformers.integrations import is_deepspeed_zero3_enabled

_GATHERS = "stage3_gather_16bit_weights_on_model_save"


@dataclass(frozen=True)
class Parallelism:
    """How a run spreads its weights.

    Attributes:
        zero_stage: of DeepSpeed, 0 to 3; None without DeepSpeed.
        gathers_on_save: ZeRO-3 gathers the weights when a model is saved.
        fsdp_version: 1 or 2; None without FSDP.
        fsdp_state_dict: which kind of state dict FSDP saves.
    """

    zero_stage: int | None = None
    gathers_on_save: bool = False
    fsdp_version: int | None = None
    fsdp_state_dict: str = "FULL_STATE_DICT"

    @classmethod
    def of(cls, args: TrainingArguments) -> Parallelism:
        """As the arguments or `accelerate launch` say."""
        stage, gathers = None, False
        if args.deepspeed_plugin is not None:
            config = args.deepspeed_plugin.hf_ds_config
            stage = int(config.get_value("zero_optimization.stage", 0))
            gathers = bool(config.get_value(f"zero_optimization.{_GATHERS}", False))
        version, kind = None, "FULL_STATE_DICT"
        if args.fsdp_plugin_args is not None:
            plugin = args.fsdp_plugin_args
            version, kind = int(plugin.get("fsdp_version", 1)), str(plugin.get("state_dict_type", kind))
        elif os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            version, kind = int(os.environ.get("FSDP_VERSION", "1")), os.environ.get("FSDP_STATE_DICT_TYPE", kind)
        return cls(stage, gathers, version, kind)

    @property
    def is_wrapped(self) -> bool:
        """Whether DeepSpeed or FSDP runs the model, and only through its own forward."""
        return self.zero_stage is not None or self.fsdp_version is not None

    @property
    def is_sharded(self) -> bool:
        """Whether no rank has whole weights."""
        return self.zero_stage == 3 or self.fsdp_version is not None

    def check_adapter_is_saved_whole(self) -> None:
        """Raises ValueError where exact mode's adapter would not be gathered when it is saved."""
        if self.fsdp_version is not None and (self.fsdp_version, self.fsdp_state_dict) != (2, "FULL_STATE_DICT"):
            raise ValueError(
                "exact mode's adapter is saved whole, which needs FSDP version 2 and FULL_STATE_DICT, got version "
                f"{self.fsdp_version} and {self.fsdp_state_dict}; change these, or use DDP or DeepSpeed ZeRO."
            )
        if self.zero_stage == 3 and not self.gathers_on_save:
            raise ValueError(f"exact mode's adapter is saved whole; set {_GATHERS} to true in the DeepSpeed configuration.")

    def check_completions(self, *, gathers: bool) -> None:
        """Raises ValueError where ranks whose texts end at different times would wait for each other's layers forever.

        Args:
            gathers: whether the weights are gathered before bare prompts are completed.
        """
        if self.zero_stage == 3 and not gathers:
            raise ValueError(
                "ds3_gather_for_generation=False cannot complete bare prompts under ZeRO-3; set it to true, or bring "
                "completions."
            )


def is_whole_fsdp_unit(module: nn.Module) -> bool:
    """Whether FSDP 2 shards this very module, and has gathered its weights at the moment."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return isinstance(module, FSDPModule) and not any(isinstance(weight, DTensor) for weight in module.parameters())


def prepare_loading() -> None:
    """Called before weights load. Under ZeRO-3 they are sharded meanwhile, and without CUDA nobody has started DeepSpeed."""
    if is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.init_distributed()


@contextmanager
def gathered(weights: list[nn.Parameter]) -> Iterator[None]:
    """Within the block the parameters are whole where ZeRO-3 has sharded them; every rank writes the same values."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights, modifier_rank=0):
        yield


@contextmanager
def loading_whole_weights() -> Iterator[None]:
    """Within the block this rank loads whole weights, which ZeRO-3 would otherwise shard among all of them."""
    configured: Any = zero._hf_deepspeed_config_weak_ref
    zero.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero._hf_deepspeed_config_weak_ref = configured

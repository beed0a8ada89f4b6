"""Serving on vLLM's Model Runner V2, without a patch: a model class whose model state supplies its own sampler.

vLLM treats drafts and masks as the canvas of a diffusion model. Its scheduler gives every request `canvas_length` positions in
each step, and its runner reads their tokens from a tensor that this module's sampler writes. No step waits for the host.
"""

# Shapes: B rows of the batch, J tokens that the sampler of vLLM returns at most for a request, K positions of a block,
# P positions read, V vocabulary, Z request slots of the engine

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from ...custom_generate.mtp_config import thresholds_by_position
from . import hooks
from .blocks import PLACEHOLDER, Scheduled, accept_all, canvases, next_drafts, read_blocks
from .gated import attach_adapter
from .settings import Served


def __getattr__(name: str) -> type[Any]:
    """Create the class `MTP<architecture>`, which extends `BlockModel` and vLLM's class of that architecture.

    `hooks.register` registers these names.
    """
    base = name.removeprefix(hooks.PREFIX)
    if base == name or base not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    model_class: type[Any] = type(name, (BlockModel, ModelRegistry.models[base].load_model_cls()), {"__module__": __name__})
    globals()[name] = model_class
    return model_class


class BlockModel:
    """Mixin for one of vLLM's model classes, which decodes its requests in blocks."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        """Raise ValueError, before weights are read, for models and engines that cannot be served."""
        hooks.check_version()
        served = Served.of(vllm_config)
        _refuse(vllm_config, type(self))
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        self.mtp_served = served

    def get_model_state_cls(self) -> type[Any]:
        """Return the class of the model state that vLLM's runner builds."""
        return BlockState


class BlockState(DefaultModelState):
    """Attaches exact mode's adapter to the model and replaces vLLM's sampler."""

    supports_prompt_embeds = False

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        attach_adapter(model, model.mtp_served, max_tokens=self.max_num_tokens)

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        """Return the sampler that vLLM's runner uses, which also verifies, and no rejection sampler."""
        return BlockSampler(sampler, self.model.mtp_served, slots=self.max_num_reqs, device=self.device), None


class BlockSampler:
    """Wraps vLLM's sampler: verifies the drafts and writes the next drafts of each request.

    All other attributes are those of vLLM's sampler.
    """

    def __init__(self, sampler: Any, served: Served, *, slots: int, device: torch.device) -> None:
        self.sampler, self.served = sampler, served
        verifying = {"num_speculative_tokens": served.width, "rejection_sample_method": "standard"}
        self.verifier = RejectionSampler(sampler, SimpleNamespace(**verifying, enable_adaptive_verification=False), device)
        self.barred = torch.tensor(served.barred_token_ids, device=device)
        # For the request in each slot: masks of a full block, thresholds by position, whether drafts skip verification.
        self.masks_Z = UvaBackedTensor(slots, dtype=torch.int64)
        self.thresholds_ZK = UvaBackedTensor((slots, served.k_max), dtype=torch.float32)
        self.unverified_Z = UvaBackedTensor(slots, dtype=torch.bool)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["sampler"], name)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Store the settings of a request. vLLM calls this for each new request, and again after a preemption."""
        self.sampler.add_request(req_idx, sampling_params)
        settings = self.served.of_served_request(f"in slot {req_idx}", sampling_params)
        # vLLM does not pass these drafts to its grammars, which constrain only the next token.
        self.masks_Z.np[req_idx] = 0 if sampling_params.structured_outputs else settings.k - 1
        self.thresholds_ZK.np[req_idx] = thresholds_by_position(settings.thresholds, self.served.k_max)
        self.unverified_Z.np[req_idx] = not settings.verify

    def apply_staged_writes(self) -> None:
        """Copy new settings to the device. vLLM calls this before every step."""
        self.sampler.apply_staged_writes()
        for settings in (self.masks_Z, self.thresholds_ZK, self.unverified_Z):
            settings.copy_to_uva()

    def __call__(self, logits_PV: Tensor, batch: Any) -> Any:
        """Return the SamplerOutput of the batch, and write the next canvas of each of its requests."""
        logits_PV.index_fill_(-1, self.barred, -torch.inf)
        slots_B = batch.idx_mapping
        if batch.num_draft_tokens == 0:
            self._write(slots_B, torch.zeros(len(slots_B), 1, dtype=torch.int64, device=logits_PV.device))
            return self.sampler(logits_PV, batch)

        rows = batch.cu_num_logits.long()
        scheduled = Scheduled.of(
            batch.input_ids[batch.logits_indices],  # of each request: the token before its drafts, then drafts and masks
            rows[:-1] + 1,
            rows[1:],
            rows[:-1],
            mask_token_id=self.served.mask_token_id,
        )
        blocks = read_blocks(logits_PV, scheduled, k=self.served.k_max)
        output = self.verifier(logits_PV, batch)
        position_J = torch.arange(output.sampled_token_ids.shape[1], device=logits_PV.device)
        tokens_BJ = output.sampled_token_ids.where(position_J < output.num_sampled[:, None], PLACEHOLDER)
        tokens_BJ = accept_all(tokens_BJ, scheduled, blocks, self.unverified_Z.gpu[slots_B])
        emitted_B = (tokens_BJ != PLACEHOLDER).sum(1, dtype=output.num_sampled.dtype)
        output.num_rejected = output.num_rejected + output.num_sampled - emitted_B
        output.sampled_token_ids, output.num_sampled = tokens_BJ, emitted_B
        limits: dict[str, Any] = {"threshold": self.thresholds_ZK.gpu[slots_B], "vocabulary": logits_PV.shape[-1]}
        self._write(slots_B, next_drafts(logits_PV, tokens_BJ, scheduled, blocks, **limits))
        return output

    def _write(self, slots_B: Tensor, drafts_BK: Tensor) -> None:
        canvas = {"masks_B": self.masks_Z.gpu[slots_B], "mask_token_id": self.served.mask_token_id, "width": self.served.width}
        self.sampler.req_states.draft_tokens[slots_B] = canvases(drafts_BK, **canvas)


class BlockScheduler(Scheduler):
    """vLLM's synchronous scheduler, with positions for each request's canvas, which only the asynchronous one schedules."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Schedule a canvas of placeholders for each request. vLLM calls this after every step."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        requests = model_runner_output.req_ids
        self.update_draft_token_ids(DraftTokenIds(requests, [[PLACEHOLDER] * self.num_spec_tokens for _ in requests]))
        return outputs


def _refuse(vllm_config: Any, model: type[Any]) -> None:
    base = model.__name__.removeprefix(hooks.PREFIX)
    if base in MODELS_CONFIG_MAP or hasattr(super(BlockModel, model), "get_model_state_cls"):
        raise ValueError(
            f"vLLM has its own settings for {base}, which it does not apply to a class of another name; serve the model on "
            "Model Runner V1: unset VLLM_USE_V2_MODEL_RUNNER, and use mtp-trl serve."
        )
    if vllm_config.num_speculative_tokens < 1 or vllm_config.speculative_config is not None:
        raise ValueError(
            f"{model.__name__} needs a canvas and no speculative configuration; leave the latter out, and set the canvas with "
            "--diffusion-config '{\"canvas_length\": 2 (k_max - 1)}', as mtp-trl serve does."
        )
    scheduling = vllm_config.scheduler_config
    if not scheduling.async_scheduling and scheduling.scheduler_cls != hooks.SCHEDULER:
        raise ValueError(
            "Without asynchronous scheduling, vLLM's scheduler leaves no positions for drafts; "
            f"add --scheduler-cls {hooks.SCHEDULER}."
        )
    if vllm_config.model_config.logits_processors:
        raise ValueError("Custom logits processors do not see drafts that skip verification; leave --logits-processors out.")
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        raise ValueError(
            "With batch-sharded sampling, each rank would have different drafts; leave --enable-batch-sharded-sampling out."
        )

"""The drafter that vLLM calls: masks as draft tokens, blocks read from the logits that verify the last block."""

# B requests of the batch, R rows of logits, V vocabulary, D tokens the sampler returns at most, K block

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import __version__
from ...custom_generate.generate import thresholds_by_place
from . import hooks
from .blocks import Scheduled, accept_all, next_drafts, proposals, read_blocks
from .gated import attach_adapter
from .settings import Served, Settings

logger = logging.getLogger(__name__)


class MTPProposer:
    """vLLM's `custom_class` drafter for adapted models; needs no weights and no forward pass of its own.

    vLLM's model runner calls `sample` (through the one hook there is) and then `propose`, with the same batch in the same
    order. Nothing is kept between steps: what a request's drafts were is read from what vLLM scheduled, so a request may be
    preempted, aborted or cut short at any time.
    """

    def __init__(self, vllm_config: Any) -> None:
        """Raises ValueError for a model that was not adapted, unknown options, and engines that cannot serve it."""
        hooks.check_version()
        self.served = Served.of(vllm_config)
        _refuse(vllm_config, exact=self.served.adapter is not None)
        if self.served.adapter is not None:
            # What vLLM compiled for the plain base has no adapter in it: its cache tells models by their configuration.
            vllm_config.additional_config = (vllm_config.additional_config or {}) | {"mtp_trl_gated": __version__}
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.barred: Tensor | None = None
        self.settings: list[Settings] = []
        self.drafts: Tensor | None = None
        self.refused: set[str] = set()
        hooks.install(MTPProposer)

    def load_model(self, model: Any) -> None:
        """Called once the model is loaded and before it is compiled: exact mode's adapter goes on it."""
        if self.served.adapter is not None:
            mask_token_id = self.served.mask_token_id
            attach_adapter(model, self.served.adapter, mask_token_id=mask_token_id, max_tokens=self.max_tokens)

    def sample(self, runner: Any, logits_RV: Tensor, metadata: Any, sampler: Callable[[Tensor, Any], Any]) -> Any:
        """What `sampler` makes of the logits, and the next drafts of every request along the way.

        Args:
            logits_RV: of all places that are read; the barred tokens are barred in place.
            metadata: vLLM's SpecDecodeMetadata; None or empty in a step without drafts.
            sampler: vLLM's own, verifying; its output's tokens are int [B, D].
        """
        if self.barred is None:
            self.barred = torch.tensor(self.served.barred_token_ids, device=logits_RV.device)
        logits_RV.index_fill_(-1, self.barred, -torch.inf)
        runner.effective_drafter_max_model_len = runner.max_model_len + self.served.width  # vLLM cuts each request's drafts
        batch = runner.input_batch
        self.settings = [self._settings(request, runner) for request in batch.req_ids]
        self.drafts = None
        if metadata is None or len(metadata.draft_token_ids) == 0:
            return sampler(logits_RV, None)  # on CPUs top_k and top_p fail where there are requests but no drafts

        scheduled = Scheduled.of(
            metadata.draft_token_ids,
            metadata.cu_num_draft_tokens.long(),
            metadata.cu_num_sampled_tokens.long(),
            mask_token_id=self.served.mask_token_id,
        )
        blocks = read_blocks(logits_RV, scheduled, k=self.served.k_max)
        output = sampler(logits_RV, metadata)
        unverified = [not settings.verify for settings in self.settings]
        if any(unverified):
            tokens_BD = output.sampled_token_ids
            unverified_B = torch.tensor(unverified, device=tokens_BD.device)
            output.sampled_token_ids = accept_all(tokens_BD, scheduled, blocks, unverified_B)
        self.drafts = next_drafts(
            logits_RV,
            output.sampled_token_ids,
            scheduled,
            blocks,
            threshold=_thresholds(self.settings, self.served.k_max, logits_RV.device),
            vocabulary=batch.vocab_size,
        )
        return output

    def propose(
        self, sampled_token_ids: Sequence[Sequence[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """`[drafts | masks]` of each request; nothing while its prompt is not read to its end."""
        masks = [settings.k - 1 if new else 0 for settings, new in zip(self.settings, sampled_token_ids, strict=True)]
        drafts = [[0]] * len(masks) if self.drafts is None else self.drafts.tolist()  # one transfer for the whole batch
        self.drafts = None
        served = self.served
        return proposals(drafts, mask_token_id=served.mask_token_id, masks=masks, width=served.width, fill=served.fill)

    def _settings(self, request: str, runner: Any) -> Settings:
        sampling_params = runner.requests[request].sampling_params
        try:
            return self.served.of_request(sampling_params)
        except ValueError as error:  # here an exception would end the engine, and every other request with it
            if request not in self.refused:
                self.refused = {one for one in self.refused if one in runner.requests} | {request}
                logger.warning("Request %s is decoded one token per pass: %s", request, error)
            return Settings(1, (0.0,), verify=True)


def _thresholds(settings: list[Settings], k: int, device: torch.device) -> float | Tensor:
    """One number where all requests and places have the same, else float [B, K]."""
    rows = [thresholds_by_place(one.thresholds, k) for one in settings]
    values = {value for row in rows for value in row}
    return values.pop() if len(values) == 1 else torch.tensor(rows, device=device)


def _refuse(vllm_config: Any, *, exact: bool) -> None:
    model, parallel, speculative = vllm_config.model_config, vllm_config.parallel_config, vllm_config.speculative_config
    if speculative.rejection_sample_method != "standard":
        raise ValueError(
            f"rejection_sample_method={speculative.rejection_sample_method!r} may accept a mask; leave it at 'standard'."
        )
    if getattr(model, "enable_prompt_embeds", False):
        raise ValueError("enable_prompt_embeds does not go with masks, which are token ids; leave it out.")
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if exact and getattr(parallel, name) > 1:
            raise ValueError(
                f"{name}={getattr(parallel, name)}: exact mode's adapter is served whole, on one device; use 1, and more "
                "replicas (--data-parallel-size) for more throughput."
            )

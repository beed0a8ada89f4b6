"""The drafter for Model Runner V1: masks are draft tokens, and the pass that verifies a block predicts the next one."""

# Shapes: B rows of the batch, J tokens that the sampler of vLLM returns at most for a request, K positions of a block,
# P positions read, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...custom_generate.mtp_config import thresholds_by_position
from . import hooks
from .blocks import Scheduled, accept_all, next_drafts, proposals, read_blocks
from .gated import attach_adapter
from .settings import Served, Settings


class MTPProposer:
    """vLLM's `custom_class` drafter for adapted models. It needs no weights and no forward pass of its own.

    vLLM's model runner calls `sample`, through the hook in hooks.py, and then `propose`, with the same batch in the same
    order. A step needs no results of the previous one: `sample` reads a request's drafts from what vLLM scheduled, so vLLM
    may preempt, abort or truncate a request at any time.
    """

    def __init__(self, vllm_config: Any) -> None:
        """Raise ValueError for a model that was not adapted, unknown options, and engines that cannot serve the model."""
        hooks.check_version()
        self.served = Served.of(vllm_config)
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.barred: Tensor | None = None
        self.known: dict[str, tuple[Any, Settings]] = {}  # sampling parameters and settings of the last step's requests
        self.settings: list[Settings] = []
        self.drafts: Tensor | None = None
        hooks.install(MTPProposer)

    def load_model(self, model: Any) -> None:
        """Attach exact mode's adapter. vLLM calls this after it has loaded the model and before it compiles it."""
        attach_adapter(model, self.served, max_tokens=self.max_tokens)

    def sample(self, runner: Any, logits_PV: Tensor, metadata: Any, sampler: Callable[[Tensor, Any], Any]) -> Any:
        """Return the output of `sampler`, with the drafts of unverified requests accepted; keep the next drafts for `propose`.

        Args:
            logits_PV: logits of all positions read. Those of the barred tokens are set to -inf in place.
            metadata: vLLM's SpecDecodeMetadata; None or empty in a step without drafts.
            sampler: vLLM's sampler, which verifies drafts; its output's tokens are int [B, J].
        """
        if self.barred is None:
            self.barred = torch.tensor(self.served.barred_token_ids, device=logits_PV.device)
        logits_PV.index_fill_(-1, self.barred, -torch.inf)
        # A request near this limit would stop drafting for the whole batch; vLLM truncates each request's drafts anyway.
        runner.effective_drafter_max_model_len = runner.max_model_len + self.served.width
        batch = runner.input_batch
        self.known = {request: self._settings(request, runner.requests[request]) for request in batch.req_ids}
        self.settings = [settings for _, settings in self.known.values()]
        self.drafts = None
        if metadata is None or len(metadata.draft_token_ids) == 0:
            return sampler(logits_PV, None)  # on CPUs, top_k and top_p fail with empty metadata

        ends_B = metadata.cu_num_draft_tokens.long()
        starts_B = nn.functional.pad(ends_B[:-1], (1, 0))
        scheduled = Scheduled.of(
            metadata.draft_token_ids,
            starts_B,
            ends_B,
            starts_B + torch.arange(len(starts_B), device=starts_B.device),  # one row more than drafts for each earlier request
            mask_token_id=self.served.mask_token_id,
        )
        blocks = read_blocks(logits_PV, scheduled, k=self.served.k_max)
        output = sampler(logits_PV, metadata)
        unverified = [not settings.verify for settings in self.settings]
        if any(unverified):
            tokens_BJ = output.sampled_token_ids
            unverified_B = torch.tensor(unverified, device=tokens_BJ.device)
            output.sampled_token_ids = accept_all(tokens_BJ, scheduled, blocks, unverified_B)
        self.drafts = next_drafts(
            logits_PV,
            output.sampled_token_ids,
            scheduled,
            blocks,
            threshold=_thresholds(self.settings, self.served.k_max, logits_PV.device),
            vocabulary=batch.vocab_size,
        )
        return output

    def propose(
        self, sampled_token_ids: Sequence[Sequence[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """Return `[drafts | masks]` of each request; an empty list until its whole prompt has been read."""
        masks = [settings.k - 1 if new else 0 for settings, new in zip(self.settings, sampled_token_ids, strict=True)]
        drafts = [[0]] * len(masks) if self.drafts is None else self.drafts.tolist()  # one transfer for the whole batch
        self.drafts = None
        served = self.served
        return proposals(drafts, mask_token_id=served.mask_token_id, masks=masks, width=served.width, fill=served.fill)

    def _settings(self, request: str, state: Any) -> tuple[Any, Settings]:
        """Return a request's sampling parameters and its settings, those of the last step if the parameters are the same."""
        params = state.sampling_params
        known = self.known.get(request)
        return known if known is not None and known[0] is params else (params, self.served.of_served_request(request, params))


def _thresholds(settings: list[Settings], k: int, device: torch.device) -> float | Tensor:
    """Return one number if all requests and positions share it, else float [B, K]."""
    rows = [thresholds_by_position(one.thresholds, k) for one in settings]
    values = {value for row in rows for value in row}
    return values.pop() if len(values) == 1 else torch.tensor(rows, device=device)

"""The drafter that vLLM calls: masks as draft tokens, blocks read from the logits that verify the last block."""

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
    """vLLM's `custom_class` drafter for adapted models; needs no weights and no forward pass of its own.

    vLLM's model runner calls `sample` (through the one hook there is) and then `propose`, with the same batch in the same
    order. Of a step nothing is needed in the next: what a request's drafts were is read from what vLLM scheduled, so a
    request may be preempted, aborted or cut short at any time.
    """

    def __init__(self, vllm_config: Any) -> None:
        """Raises ValueError for a model that was not adapted, unknown options, and engines that cannot serve it."""
        hooks.check_version()
        self.served = Served.of(vllm_config)
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.barred: Tensor | None = None
        self.known: dict[str, tuple[Any, Settings]] = {}  # of the requests of the last step
        self.settings: list[Settings] = []
        self.drafts: Tensor | None = None
        hooks.install(MTPProposer)

    def load_model(self, model: Any) -> None:
        """Called once the model is loaded and before it is compiled: exact mode's adapter goes on it."""
        attach_adapter(model, self.served, max_tokens=self.max_tokens)

    def sample(self, runner: Any, logits_PV: Tensor, metadata: Any, sampler: Callable[[Tensor, Any], Any]) -> Any:
        """What `sampler` makes of the logits, and the next drafts of every request along the way.

        Args:
            logits_PV: of all places that are read; the barred tokens are barred in place.
            metadata: vLLM's SpecDecodeMetadata; None or empty in a step without drafts.
            sampler: vLLM's own, verifying; its output's tokens are int [B, J].
        """
        if self.barred is None:
            self.barred = torch.tensor(self.served.barred_token_ids, device=logits_PV.device)
        logits_PV.index_fill_(-1, self.barred, -torch.inf)
        runner.effective_drafter_max_model_len = runner.max_model_len + self.served.width  # vLLM cuts each request's drafts
        batch = runner.input_batch
        self.known = {request: self._settings(request, runner.requests[request]) for request in batch.req_ids}
        self.settings = [settings for _, settings in self.known.values()]
        self.drafts = None
        if metadata is None or len(metadata.draft_token_ids) == 0:
            return sampler(logits_PV, None)  # on CPUs top_k and top_p fail where there are requests but no drafts

        ends_B = metadata.cu_num_draft_tokens.long()
        starts_B = nn.functional.pad(ends_B[:-1], (1, 0))
        scheduled = Scheduled.of(
            metadata.draft_token_ids,
            starts_B,
            ends_B,
            starts_B + torch.arange(len(starts_B), device=starts_B.device),  # a row more than drafts for each request before
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
        """`[drafts | masks]` of each request; nothing while its prompt is not read to its end."""
        masks = [settings.k - 1 if new else 0 for settings, new in zip(self.settings, sampled_token_ids, strict=True)]
        drafts = [[0]] * len(masks) if self.drafts is None else self.drafts.tolist()  # one transfer for the whole batch
        self.drafts = None
        served = self.served
        return proposals(drafts, mask_token_id=served.mask_token_id, masks=masks, width=served.width, fill=served.fill)

    def _settings(self, request: str, state: Any) -> tuple[Any, Settings]:
        """With the sampling parameters that they were read from: those of the step before, unless they are others."""
        asked = state.sampling_params
        before = self.known.get(request)
        return before if before is not None and before[0] is asked else (asked, self.served.of_served_request(request, asked))


def _thresholds(settings: list[Settings], k: int, device: torch.device) -> float | Tensor:
    """One number where all requests and places have the same, else float [B, K]."""
    rows = [thresholds_by_position(one.thresholds, k) for one in settings]
    values = {value for row in rows for value in row}
    return values.pop() if len(values) == 1 else torch.tensor(rows, device=device)

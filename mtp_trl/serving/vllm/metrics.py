"""Tokens per pass on `/metrics` with Model Runner V2, where vLLM counts drafts but exports the counts only for speculators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.spec_decode.metrics import SpecDecodingProm

from .hooks import PREFIX


class BlockMetrics(AggregateStatLoggerBase):
    """Exports vLLM's speculative decoding counters for the models of v2.py; does nothing for other models."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self.vllm_config, self.engine_indexes = vllm_config, engine_indexes
        self.counters: Any = None

    def log_engine_initialized(self) -> None:
        """Create the counters. vLLM calls this once all loggers exist; its own logger removes counters made earlier."""
        config, width = self.vllm_config.model_config, self.vllm_config.num_speculative_tokens
        if width and self.vllm_config.speculative_config is None and config.architectures[0].startswith(PREFIX):
            labels = {index: [config.served_model_name, str(index)] for index in self.engine_indexes}
            self.counters = SpecDecodingProm(SimpleNamespace(num_speculative_tokens=width), ["model_name", "engine"], labels)

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
        """Count the drafts of a step. vLLM calls this after every step."""
        if self.counters is not None and scheduler_stats is not None and scheduler_stats.spec_decoding_stats is not None:
            self.counters.observe(scheduler_stats.spec_decoding_stats, engine_idx)

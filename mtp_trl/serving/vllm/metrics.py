"""Tokens per pass on `/metrics` with Model Runner V2: vLLM counts drafts there too, and shows them to speculators only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.spec_decode.metrics import SpecDecodingProm

from .hooks import PREFIX


class BlockMetrics(AggregateStatLoggerBase):
    """vLLM's own counters of speculative decoding, for the models of v2.py; does nothing for any other."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self.vllm_config, self.engine_indexes = vllm_config, engine_indexes
        self.counters: Any = None

    def log_engine_initialized(self) -> None:
        """Called when all loggers are made: vLLM's takes away what it finds under such names."""
        config, width = self.vllm_config.model_config, self.vllm_config.num_speculative_tokens
        if width and self.vllm_config.speculative_config is None and config.architectures[0].startswith(PREFIX):
            labels = {index: [config.served_model_name, str(index)] for index in self.engine_indexes}
            self.counters = SpecDecodingProm(SimpleNamespace(num_speculative_tokens=width), ["model_name", "engine"], labels)

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
        """Called after every step."""
        if self.counters is not None and scheduler_stats is not None and scheduler_stats.spec_decoding_stats is not None:
            self.counters.observe(scheduler_stats.spec_decoding_stats, engine_idx)

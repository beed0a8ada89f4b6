"""Settings of an adapted model in vLLM, from the engine's options, the repository's defaults and each request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers.utils import cached_file

from ... import __version__
from ...custom_generate.adapter_file import ADAPTER_FILE, read_adapter_metadata
from ...custom_generate.mtp_config import check_mtp_config, checked_thresholds

logger = logging.getLogger(__name__)

OPTIONS = ("confadapt", "verify", "mtp_k")  # options of an engine and of a request; `generate` has the same names
SECTION = "mtp_trl"  # key of our options in vLLM's additional_config


@dataclass(frozen=True)
class Settings:
    """Decoding settings of a request.

    Attributes:
        k: largest block, `mtp_k` of `generate`.
        thresholds: one for all positions of a block, or one for each; `confadapt` of `generate`.
        verify: as in `generate`, but true unless the repository, the engine or the request sets it.
    """

    k: int
    thresholds: tuple[float, ...]
    verify: bool

    def with_options(self, options: Mapping[str, Any], *, k_max: int) -> Settings:
        """Return a copy in which `options` replace the values of those names.

        Raises:
            ValueError: a value is out of range.
        """
        k = _integer("mtp_k", options.get("mtp_k", self.k))
        if not 1 <= k <= k_max:
            raise ValueError(f"mtp_k must be between 1 and {k_max}, the largest block served, got {k}.")
        thresholds = checked_thresholds(options.get("confadapt", self.thresholds))
        verify = options.get("verify", self.verify)
        if verify not in (True, False, 0, 1):
            raise ValueError(f"verify must be true or false (1 or 0), got {verify!r}.")
        return replace(self, k=k, thresholds=thresholds, verify=bool(verify))


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    return value


@dataclass(frozen=True)
class Served:
    """An adapted model in an engine."""

    mask_token_id: int
    barred_token_ids: tuple[int, ...]
    k_max: int
    width: int  # largest number of drafts and masks that vLLM schedules after a request's last token
    fill: bool  # pad every request to `width` with masks
    defaults: Settings
    adapter: str | None  # exact mode: file of the adapter that acts at the masks
    base: tuple[str, str | None]  # folder or Hub id of the weights, and their revision

    @classmethod
    def of(cls, vllm_config: Any) -> Served:
        """Read vLLM's configuration. `{"mtp_trl": {...}}` in its additional_config overrides the repository's defaults.

        In exact mode, add an entry to additional_config. vLLM's compile cache is keyed by the configuration, and a graph that
        was compiled for the plain base lacks the adapter.

        Raises:
            ValueError: the model was not adapted, an option is unknown or out of range, or the engine cannot serve the model.
        """
        model = vllm_config.model_config
        options = dict((vllm_config.additional_config or {}).get(SECTION, {}))
        fill, adapter = options.pop("fixed_width", False), options.pop("adapter", None)
        if unknown := set(options) - set(OPTIONS):
            known = ", ".join((*OPTIONS, "fixed_width", "adapter"))
            raise ValueError(f"additional_config's {SECTION!r} has no option {', '.join(sorted(unknown))}; use {known}.")
        mtp: dict[str, Any] | None = getattr(model.hf_config, "mtp", None)
        if adapter is None and mtp is not None:
            check_mtp_config(mtp)
        exact = adapter is not None or bool(mtp and mtp.get("exact"))
        _refuse(vllm_config, exact=exact)
        path: str | None = None
        if adapter is not None:
            path = adapter_file(adapter)
            mtp, repository = adapter_settings(path, repository=adapter)
        else:
            if exact:
                path = adapter_file(model.model, model.revision)
            repository = model.try_get_generation_config() or {}
        if mtp is None:
            raise ValueError(
                f"{model.model} has no mask token (`mtp` in config.json); serve a model that mtp-trl adapted, or leave the "
                "speculative configuration out."
            )
        if mtp["mask_token_id"] >= (rows := model.get_vocab_size()):
            raise ValueError(
                f"The mask token's id is {mtp['mask_token_id']}, but {model.model} has only {rows} tokens; serve the model "
                "that was saved with the adapter."
            )
        # `mtp_k="auto"` adapts to the speed of the process that runs `generate`; an engine has one block size for all requests.
        defaults_of_repository = {name: repository.get(name) for name in OPTIONS}
        options = {name: value for name, value in defaults_of_repository.items() if value not in (None, "auto")} | options
        k_max = int(mtp["k_max"])
        defaults = Settings(k_max, (0.0,), verify=True).with_options(options, k_max=k_max)
        if exact:
            vllm_config.additional_config = (vllm_config.additional_config or {}) | {"mtp_trl_gated": __version__}
        return cls(
            mask_token_id=int(mtp["mask_token_id"]),
            barred_token_ids=tuple(mtp["barred_token_ids"]),
            k_max=defaults.k,
            width=vllm_config.num_speculative_tokens,
            fill=bool(fill),
            defaults=defaults,
            adapter=path,
            base=(model.model, model.revision),
        )

    def of_request(self, sampling_params: Any) -> Settings:
        """Return the settings of a request; its `vllm_xargs` (extra_args) override the engine's.

        Raises:
            ValueError: a value is out of range.
        """
        extra = sampling_params.extra_args
        if not extra or not any(name in extra for name in OPTIONS):
            chosen = self.defaults
        else:
            chosen = self.defaults.with_options(extra, k_max=self.k_max)
        return chosen if chosen.verify or is_plain_greedy(sampling_params) else replace(chosen, verify=True)

    def of_served_request(self, name: str, sampling_params: Any) -> Settings:
        """Return `of_request`, or settings for one token per pass if it raises.

        In an engine, the exception would end all other requests too.
        """
        try:
            return self.of_request(sampling_params)
        except ValueError as error:
            logger.warning("Request %s is decoded one token per pass: %s", name, error)
            return Settings(1, (0.0,), verify=True)


def is_plain_greedy(sampling_params: Any) -> bool:
    """Whether the request is greedy and sets no option that changes logits or returns log-probabilities.

    Only such a request may skip verification. Penalties, grammars, minimum lengths, log-probabilities and temperatures all need
    the model's next-token logits at the position of a draft, which are known only after verification.
    """
    p = sampling_params
    return (
        p.temperature < 1e-5  # vLLM's limit for greedy sampling
        and p.presence_penalty == p.frequency_penalty == 0
        and p.repetition_penalty == 1
        and p.min_tokens == 0
        and p.logprobs is None
        and not (p.bad_words or p.allowed_token_ids or p.structured_outputs or p.logit_bias or p.logprob_token_ids)
        and getattr(p, "thinking_token_budget", None) is None
    )


def _refuse(vllm_config: Any, *, exact: bool) -> None:
    model, parallel, speculative = vllm_config.model_config, vllm_config.parallel_config, vllm_config.speculative_config
    if speculative is not None and speculative.rejection_sample_method != "standard":
        raise ValueError(
            f"rejection_sample_method={speculative.rejection_sample_method!r} may accept a mask; leave it at 'standard'."
        )
    if getattr(model, "enable_prompt_embeds", False):
        raise ValueError("enable_prompt_embeds does not work with masks, which are token ids; leave it out.")
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if exact and getattr(parallel, name) > 1:
            raise ValueError(
                f"{name}={getattr(parallel, name)}, but exact mode's adapter runs on one device; set it to 1, and use replicas "
                "(--data-parallel-size) for more throughput."
            )


def adapter_settings(path: str, *, repository: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `config.mtp` and the decoding defaults that an adapter-only repository stores for its base.

    Args:
        path: the adapter's file.
        repository: the adapter's name in error messages.

    Raises:
        ValueError: the adapter needs a LoRA, or its file is broken.
    """
    metadata = read_adapter_metadata(path)
    if metadata["lora_layers"]:
        raise ValueError(
            f"{repository} is a LoRA adapter; serve the merged model, which `mtp-trl export` writes without options."
        )
    return metadata["mtp"], metadata["defaults"]


def adapter_file(repository: str, revision: str | None = None) -> str:
    """Return the path of the adapter's file in a folder or, downloaded, from the Hub.

    Raises:
        OSError: the repository has no such file.
    """
    path: str = cached_file(repository, ADAPTER_FILE, revision=revision)
    return path

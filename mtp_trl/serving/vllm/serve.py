"""`mtp-trl serve`: vLLM's own OpenAI server, with the options for decoding in blocks filled in."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ...custom_generate.mtp_config import check_mtp_config
from . import hooks
from .heads import pad_heads
from .settings import SECTION, Settings, adapter_file, adapter_settings

PROPOSER = "mtp_trl.serving.vllm.proposer.MTPProposer"
_FILLED_IN = ("--model", "--speculative-config", "-sc", "--additional-config")
_FILLED_IN_V2 = ("--diffusion-config", "-dc", "--hf-overrides", "--scheduler-cls")


def run_serve(model: str, vllm_options: Sequence[str], **options: Any) -> int:
    """Replace this process with vLLM's server. On success, this function does not return.

    Args:
        model: folder or Hub id of an adapted model.
        vllm_options: options that are passed to vLLM unchanged.
        options: options of `additional_config`, see `Served`; None means the model's default.

    Raises:
        ValueError: vLLM is missing or untested, the model was not adapted, or `vllm_options` has an option that this function
            fills in.
    """
    hooks.check_version()
    command = serve_command(model, vllm_options, **options)
    os.execv(command[0], command)


def serve_command(model: str, vllm_options: Sequence[str], **options: Any) -> list[str]:
    """Return the vLLM command line that `mtp-trl serve` runs."""
    v2 = hooks.uses_v2()
    given = _by_name(vllm_options)
    for name in (*_FILLED_IN, *(_FILLED_IN_V2 if v2 else ())):
        if name in given:
            raise ValueError(f"{name} is filled in by mtp-trl serve; leave it out, or start vLLM directly.")
    adapter, revision = options.get("adapter"), given.get("--revision")
    config = AutoConfig.from_pretrained(model, revision=revision)
    mtp = getattr(config, "mtp", None)
    if adapter is not None:
        mtp, _ = adapter_settings(adapter_file(adapter), repository=adapter)
    if mtp is None:
        raise ValueError(f"{model} has no mask token (`mtp` in config.json); serve a model that mtp-trl adapted.")
    check_mtp_config(mtp)
    chosen = {name: value for name, value in options.items() if value is not None}
    settings = Settings(mtp["k_max"], (0.0,), verify=True).with_options(chosen, k_max=mtp["k_max"])
    if settings.k < 2:
        raise ValueError(f"--k {settings.k} is plain decoding; start vLLM without this plugin.")
    flags = [f"--model={servable(model, revision)}", f"--served-model-name={model}"]
    if "--served-model-name" in given:
        del flags[1]
    synchronous = "--no-async-scheduling" in given
    engine: dict[str, Any] = {"speculative_config": speculative_config(settings.k)}
    if v2:
        engine = v2_arguments(config.architectures[0], settings.k, synchronous=synchronous)
    for name, value in engine.items():
        flags.append(f"--{name.replace('_', '-')}={value if isinstance(value, str) else json.dumps(value)}")
    if chosen:
        flags.append(f"--additional-config={json.dumps({SECTION: chosen})}")
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags, *vllm_options]


def _by_name(options: Sequence[str]) -> dict[str, str]:
    """Return the value of each vLLM option: the text after `=`, else the next word. In names, `_` is replaced by `-`."""
    given = {}
    for option, next_word in zip(options, (*options[1:], ""), strict=False):
        if option.startswith("-"):
            name, equals, value = option.partition("=")
            given[name.replace("_", "-")] = value if equals else next_word
    return given


def speculative_config(k: int) -> dict[str, Any]:
    """Return the `speculative_config` for blocks of k: up to k - 1 drafts, followed by k - 1 masks."""
    return {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": 2 * (k - 1)}


def v2_arguments(architecture: str, k: int, *, synchronous: bool = False) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM` that serve blocks of k on Model Runner V2.

    Scheduling is synchronous on CPUs, and elsewhere if `synchronous` is set; it then needs `BlockScheduler`.
    """
    from vllm.platforms import current_platform

    chosen: dict[str, Any] = {"diffusion_config": {"canvas_length": 2 * (k - 1)}}
    chosen["hf_overrides"] = {"architectures": [hooks.PREFIX + architecture]}
    return chosen | ({"scheduler_cls": hooks.SCHEDULER} if synchronous or current_platform.is_cpu() else {})


def servable(model: str, revision: str | None = None) -> str:
    """Return the model, or an equivalent copy with wider heads if vLLM's CPU attention does not support its head size."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return model
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = AutoConfig.from_pretrained(model, revision=revision)
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wider = min((size for size in sizes if size > head_dim), default=None)
    if head_dim in sizes or wider is None or not Path(model).is_dir():
        return model
    copy = pad_heads(Path(model), Path(tempfile.mkdtemp(prefix="mtp_trl_serve_")), head_dim=wider)
    print(f"mtp-trl: vLLM's CPU attention does not support heads of {head_dim} features; serving a copy with {wider}: {copy}")
    return str(copy)

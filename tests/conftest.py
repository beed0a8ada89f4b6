"""Set for every test, before any library reads it: nothing fetched, nothing reported, nothing written outside."""

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _private_folder(variable: str) -> None:
    os.environ[variable] = tempfile.mkdtemp(prefix="mtp_trl_tests_")
    atexit.register(shutil.rmtree, os.environ[variable], ignore_errors=True)


# Remote code is copied there when a model loads. One folder per process: parallel workers would write the same files.
_private_folder("HF_MODULES_CACHE")
# DeepSpeed compiles its CPU communication there, behind a lock file. In a folder that outlives the run, one that is
# killed while it compiles leaves the lock, and every later run waits for it without end. Workers share this process's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _private_folder("TORCH_EXTENSIONS_DIR")

from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel  # noqa: E402

VOCABULARY, PAD, EOS, MASK, BARRED = 64, 0, 1, 60, (60, 61, 62, 63)

_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MANY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "attn_implementation": "eager"},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {**_MOE, "sliding_window": None},
    "qwen3_moe": {**_MANY_EXPERTS, "head_dim": 8},
    "gpt_oss": {
        **_MOE,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attn_implementation": "eager",
    },
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 1.5},
    "phi3": {},
    "olmo2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": {**_MAMBA, **_MOE, "shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
    "qwen3_next": {
        **_MANY_EXPERTS,
        "head_dim": 8,
        "shared_expert_intermediate_size": 32,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "qwen3_5_text": {
        "head_dim": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba2": {
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 1,
        "expand": 2,
        "attn_implementation": "eager",
    },
}
_ARCHITECTURES["gemma3"] = _ARCHITECTURES["gemma3_text"]


def _build(
    architecture: str, *, seed: int = 0, logit_scale: float = 3.0, context: float = 1.0, **changes: Any
) -> PreTrainedModel:
    """A random causal LM: two layers, 64 tokens, a `config.mtp`, logits with standard deviation `logit_scale`.

    `context` below 1 makes all tokens' embeddings alike, so that the next token depends little on the text: then a mask
    predicts about what the token itself would have, as in a trained model, and drafts are often right. `changes` are
    configuration values.
    """
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    options = {**sizes, **_ARCHITECTURES[architecture], **changes}
    backend = options.pop("attn_implementation", "sdpa")
    model_type = "gemma3_text" if architecture == "gemma3" else architecture
    config = AutoConfig.for_model(model_type, **options)
    config.mtp = {"mask_token": "<|mtp|>", "mask_token_id": MASK, "k_max": 8, "barred_token_ids": list(BARRED)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=backend).eval()
    _randomise(model, seed=seed, logit_scale=logit_scale, context=context)
    return model


@torch.no_grad()
def _randomise(model: PreTrainedModel, *, seed: int, logit_scale: float, context: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim >= 2 and "conv1d" not in name:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=rng)
        elif parameter.ndim == 1 and "bias" in name:
            parameter.normal_(0, 0.1, generator=rng)
    embeddings = model.get_input_embeddings().weight
    embeddings.normal_(generator=rng)
    embeddings.mul_(context).add_(torch.randn(embeddings.shape[1], generator=rng) * (1 - context))
    # Heads differ in what they multiply logits by: measured, not computed.
    head = model.get_output_embeddings().weight
    ids = torch.randint(2, VOCABULARY, (4, 16), generator=rng)
    head.mul_(logit_scale / model(input_ids=ids, use_cache=False).logits.std())


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Builds a tiny random model: `tiny_model("gemma3")`."""
    return _build


@pytest.fixture(scope="session")
def write_student() -> Callable[..., Path]:
    """Writes a random model that reads text, adapted but untrained: `write_student(folder, confadapt=0.9, verify=False)`.

    The same weights without a mask token go to the folder `base`, where one is named.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from mtp_trl import hub
    from mtp_trl.mask_token import add_mask_token
    from mtp_trl.word_problems.tokenizer import train_tokenizer

    def write(
        folder: Path,
        *,
        confadapt: float,
        verify: bool,
        base: Path | None = None,
        positions: int = 512,
        chat_template: str | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> Path:
        tokenizer = train_tokenizer(["Tom has 3 pens and buys 4 pens. How many? 3 + 4 = 7 #### 7"] * 3, vocabulary=300)
        tokenizer.chat_template = chat_template
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=positions, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        if base is not None:
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
        add_mask_token(model, tokenizer, k_max=4)
        hub.set_decoding_defaults(model, confadapt=confadapt, verify=verify)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        hub.write_decoder(folder, model, provenance or {"base_model": "base"})
        return folder

    return write


@pytest.fixture
def run_program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python with the arguments given, to its end: `run_program(["-m", "accelerate.commands.launch", ...])`.

    One that hangs is ended with everything it has started. `subprocess.run(timeout=...)` ends the launcher alone: its
    workers would live on and hold the pipes, for which it waits.
    """

    def run(arguments: Sequence[object], *, timeout: float = 550, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, **streams, **options) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                started = psutil.Process(process.pid)
                for one in [started, *started.children(recursive=True)]:
                    one.kill()
                out, err = process.communicate()
                pytest.fail(f"{command} did not end within {timeout} s\n{out[-2000:]}\n{err[-6000:]}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run


@pytest.fixture
def hub_server() -> Iterator[Any]:
    """The stand-in Hub, its repositories open to the test."""
    spec = importlib.util.spec_from_file_location("hub_stub", Path(__file__).parent / "hub_stub.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()

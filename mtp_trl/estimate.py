"""Estimate the GPU memory of a run before it starts: parameters, gradients, optimizer, teacher and activations.

The model is built on the meta device. The estimate counts the tensors that are alive at the peak of a training step, as if
gradients and activations peaked at the same time. It does not count the CUDA context, fragmentation or ZeRO's communication
buffers. `tests/test_estimate.py` compares it with measured peaks.
"""

# Shapes: B rows of the batch, D features of an attention head, T columns of a forward pass

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .custom_generate.base import linear_features
from .modeling.exact import ALL_LINEAR, adapted_layers
from .modeling.gguf import gguf_argument
from .modeling.logits import backbone
from .recipe import read_recipe
from .training.config import MTPDistillConfig

GIB = 2**30
_FLOAT32 = 4
# Float32 copies of a chunk's logits that exist at the same time: raw, barred, log-softmax, and gradients.
_LOGIT_COPIES = 5
_LORA_TARGETS = ("q_proj", "v_proj")  # PEFT's default for most architectures


@dataclass(frozen=True)
class Setup:
    """The settings of a run that determine its memory, besides the model.

    Attributes:
        mode: `full`, `lora` or `exact`.
        rows, length, slots: rows of a micro-batch, text tokens of a row and mask slots of a row.
        positions: number of positions in a micro-batch whose logits are read.
        chunk: `logits_chunk_size`.
        weight_bytes: bytes of one parameter as loaded; 0.5 for a base in 4 bits.
        autocast: whether weights are kept in float32 and cast to bf16 for every pass.
        checkpointing: whether gradient checkpointing is on.
        moments: values that the optimizer keeps for each trainable parameter.
        master: whether DeepSpeed's bf16 keeps a float32 copy of the trainable parameters and float32 moments.
        zero_stage: 0 (DDP or one process) to 3.
        offload_optimizer, offload_param: whether the optimizer states or the parameters are in the CPU's memory.
        processes: number of GPUs.
        rank, target_modules: rank and target modules of the adapter.
    """

    mode: str
    rows: int
    length: int
    slots: int
    positions: int
    chunk: int = 1024
    weight_bytes: float = 2
    autocast: bool = False
    checkpointing: bool = True
    moments: int = 2
    master: bool = False
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    processes: int = 1
    rank: int = 64
    target_modules: tuple[str, ...] | None = None

    @property
    def targets(self) -> tuple[str, ...] | None:
        """The last parts of the names of the adapted layers; None for exact mode's default."""
        return self.target_modules or (_LORA_TARGETS if self.mode == "lora" else None)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, and on the host for each GPU if anything is offloaded."""

    parameters: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """All bytes on the GPU."""
        return self.parameters + self.gradients + self.optimizer + self.teacher + self.activations

    def in_gib(self) -> dict[str, float]:
        """Return all values in GiB, by name."""
        return {name: value / GIB for name, value in {**asdict(self), "total": self.total}.items()}


def estimate(config: PretrainedConfig, setup: Setup) -> Memory:
    """Return the memory of one process of a run. The model is built on the meta device: no weights, no downloads."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    base = sum(parameter.numel() for parameter in model.parameters())
    adapter = 0 if setup.mode == "full" else adapter_parameters(model, setup)
    trainable = adapter if adapter else base
    compute_bytes = 2 if setup.autocast else max(2, setup.weight_bytes)

    shards = [setup.processes if setup.zero_stage >= stage else 1 for stage in (1, 2, 3)]  # states, gradients, weights
    # adapters are in float32 unless DeepSpeed casts them
    gradient_bytes = 2 if setup.master else _FLOAT32 if adapter else setup.weight_bytes
    weights = (base * setup.weight_bytes + adapter * gradient_bytes) / shards[2]
    state_bytes = _FLOAT32 * (setup.moments + 1) if setup.master else gradient_bytes * setup.moments
    optimizer = trainable * state_bytes / shards[0]
    teacher = weights if setup.mode == "full" else 0.0
    host = optimizer * setup.offload_optimizer + (weights + teacher) * setup.offload_param
    return Memory(
        parameters=weights * (not setup.offload_param),
        gradients=trainable * gradient_bytes / shards[1],
        optimizer=optimizer * (not setup.offload_optimizer),
        teacher=teacher * (not setup.offload_param),
        activations=_activations(model, setup, compute_bytes, trainable),
        host=host,
    )


def adapter_parameters(model: PreTrainedModel, setup: Setup) -> int:
    """Return the number of trainable parameters of LoRA or exact mode's adapter, including the mask token's row."""
    layers = _adapted(model, setup)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers named {', '.join(setup.targets or ())}; set the target modules to layers "
            "that it has."
        )
    return setup.rank * sum(sum(features) for features in layers.values()) + int(model.get_input_embeddings().embedding_dim)


def _adapted(model: PreTrainedModel, setup: Setup) -> dict[str, tuple[int, int]]:
    if setup.mode == "lora" and setup.targets == (ALL_LINEAR,):
        head = model.get_output_embeddings()
        layers = {name: linear_features(module) for name, module in model.named_modules() if module is not head}
        return {name: features for name, features in layers.items() if features}
    return adapted_layers(model, setup.targets)


def _activations(model: PreTrainedModel, setup: Setup, compute_bytes: float, trainable: int) -> float:
    """Return the bytes that a step needs besides parameters, gradients, optimizer states and teacher.

    They are those that autograd saves for backward, measured on the meta device, and the logits of a chunk. Exact mode adds the
    text's keys and values, autocast the weights cast to bf16, and ZeRO-3 the gathered layers.
    """
    config = model.config.get_text_config()
    exact = setup.mode == "exact"
    columns = setup.slots + (0 if exact else setup.length)  # in exact mode the text is read without gradient
    layers, hidden = config.num_hidden_layers, config.hidden_size
    if setup.mode != "full":  # backward needs the input of an adapted layer, but not that of a frozen one
        model.requires_grad_(False)
        for name in _adapted(model, setup):
            model.get_submodule(name).weight.requires_grad_(True)
        model.get_input_embeddings().weight.requires_grad_(True)
    saved = _saved_for_backward(model, setup.rows, columns, setup.slots + setup.length) * compute_bytes / _FLOAT32
    logits = min(setup.chunk, setup.positions) * config.vocab_size * _FLOAT32 * _LOGIT_COPIES
    # With checkpointing: the input of every layer, and either the logits or, after they are freed, one recomputed layer.
    inputs = layers * setup.rows * columns * hidden * compute_bytes
    saved = inputs + max(logits, saved / layers) if setup.checkpointing else saved + logits
    key_width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    text = layers * 2 * setup.rows * setup.length * config.num_key_value_heads * key_width * compute_bytes if exact else 0
    casts = trainable * 2 if setup.autocast else 0
    gathered = 2 * _largest_layer(model) * compute_bytes if setup.zero_stage == 3 else 0  # the current and the next layer
    return float(saved + text + casts + gathered)


class _FusedAttention(torch.autograd.Function):
    """Saves what a fused attention kernel saves: queries, keys and values of all heads, the mask as a bias, and the output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, keys: int) -> Tensor:
        """Return an uninitialised output. Shapes are [B, heads, T, D]; `keys` is the number of columns attended to."""
        rows, heads, columns, _ = query.shape
        kept = [query.new_empty(rows, heads, keys, tensor.shape[-1]) for tensor in (key, value)]
        output = query.new_empty(rows, heads, columns, value.shape[-1])
        ctx.save_for_backward(query, *kept, query.new_empty(rows, 1, columns, keys), output)
        return output


def _saved_for_backward(model: PreTrainedModel, rows: int, columns: int, keys: int) -> float:
    """Return the bytes, without parameters, that autograd saves for backward of one float32 pass over [rows, columns]."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        output: Tensor = _FusedAttention.apply(query, key, value, keys)  # type: ignore[no-untyped-call]
        return output.transpose(1, 2), None

    AttentionInterface.register("estimate", attend)
    model.config.get_text_config()._attn_implementation = "estimate"
    ids = torch.zeros(rows, columns, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = backbone(model)(input_ids=ids, use_cache=False)
    del output
    return float(sum(storage.nbytes() for storage in kept.values()))


def _largest_layer(model: PreTrainedModel) -> int:
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for stack in stacks for layer in stack]
    sizes = [sum(p.numel() for p in module.parameters()) for module in [model.get_input_embeddings(), *layers]]
    return int(max(sizes))


def setup_of(arguments: Any, model: Any, deepspeed: Mapping[str, Any] | None, processes: int) -> Setup:
    """Return the setup for a recipe's training and model arguments and its DeepSpeed configuration."""
    zero = (deepspeed or {}).get("zero_optimization", {})
    quantised = 0.5 if model.load_in_4bit else 1.0 if model.load_in_8bit else None
    half = model.dtype in ("bfloat16", "float16")
    with_master = deepspeed is not None and arguments.bf16
    exact = arguments.exact
    targets = arguments.exact_target_modules if exact else model.lora_target_modules  # TRL turns one name into a string
    mode = "exact" if exact else "lora" if model.use_peft else "full"
    # a region of k positions takes k - 1 slots; k is (k_min + k_max) / 2 on average
    per_slot = 1 + 1 / ((arguments.k_min + arguments.k_max) / 2 - 1)
    return Setup(
        mode=mode,
        rows=arguments.per_device_train_batch_size,
        length=arguments.max_length,
        slots=arguments.slots_per_row,
        positions=int(arguments.per_device_train_batch_size * arguments.slots_per_row * per_slot),
        chunk=arguments.logits_chunk_size,
        weight_bytes=quantised or (2 if half or with_master else 4),
        autocast=arguments.bf16 and not half and not with_master and quantised is None,
        checkpointing=bool(arguments.gradient_checkpointing),
        moments=1 if arguments.muon else 2,
        master=with_master,
        zero_stage=int(zero.get("stage", 0)),
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        offload_param=zero.get("offload_param", {}).get("device", "none") != "none",
        processes=processes,
        rank=arguments.exact_rank if mode == "exact" else model.lora_r,
        target_modules=(targets,) if isinstance(targets, str) else tuple(targets or ()) or None,
    )


def run_estimate(recipe: Path, overrides: Sequence[str], *, processes: int, memory: float) -> bool:
    """Print the memory of a recipe on each GPU and return whether it fits into `memory` GiB."""
    parsed = read_recipe(recipe, [*overrides, "--use_cpu", "true"])  # this machine may have no GPU
    arguments, model = parsed.training, parsed.model
    if not isinstance(arguments, MTPDistillConfig):
        raise ValueError("estimate supports only runs of MTPDistillTrainer, but this recipe has `trainer: sft`.")
    zero = getattr(arguments, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()  # otherwise ZeRO-3 would shard the model while it is built
    config = AutoConfig.from_pretrained(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=arguments.trust_remote_code,
        **gguf_argument(arguments.gguf_file),
    )
    setup = setup_of(arguments, model, zero and zero.config, processes)
    parts = estimate(config, setup)
    table = Table(title=f"{model.model_name_or_path}, {setup.mode}, ZeRO stage {setup.zero_stage}, {processes} GPUs")
    table.add_column("GiB on each GPU")
    table.add_column("", justify="right")
    for name, value in parts.in_gib().items():
        if name != "host" or value:
            table.add_row("on the host, for each GPU" if name == "host" else name, f"{value:,.2f}")
    fits = parts.total / GIB <= memory
    console = Console()
    console.print(table)
    console.print(f"It {'fits' if fits else 'does not fit'} into {memory:g} GiB.")
    return fits

"""Builds tiny random causal LMs of every model type of transformers, for the tests and for `architectures.py`."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, PAD, EOS, MASK, BARRED = 64, 0, 1, 60, (60, 61, 62, 63)

LARGEST = 3_000_000  # largest number of parameters

SIZES: dict[str, Any] = {
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
# A model type without an entry in ARCHITECTURES gets those of these values that its config has.
MORE_SIZES: dict[str, Any] = {
    "is_decoder": True,
    "dropout": 0.0,
    "head_dim": 8,
    "sliding_window": 8,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 64,
    "decoder_attention_heads": 4,
    "encoder_layers": 1,
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "ffn_dim": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_layers": 2,
    "n_head": 4,
    "n_heads": 4,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "num_layers": 2,
    "num_heads": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "dense_intermediate_size": 64,
    "ffn_hidden_size": 64,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 16,
    "index_topk": 8,
    "attention_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "state_size": 8,
    "time_step_rank": 4,
    "rotary_dim": 8,
    "kv_channels": 8,
    "attention_hidden_size": 32,
    "context_length": 256,
    "word_embed_proj_dim": 32,
    "type_vocab_size": 2,
    "embedding_size": 32,
    "max_target_positions": 256,
}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MANY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
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
ARCHITECTURES["gemma3"] = ARCHITECTURES["gemma3_text"]
# Values for model types that only `architectures.py` builds and for which the sizes above do not work.
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 8}
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
        "layer_types": ["full_attention", "full_attention"],
    },
    "cpmant": {"dim_ff": 64, "dim_head": 8},
    "ctrl": {"dff": 64},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "laurel_rank": 8,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
    "git": {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "inkling2_text": _INKLING,
    "inkling_text": _INKLING,
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "full_attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16], "attention_head_size": 8},
    "roc_bert": {
        "pronunciation_embed_dim": 16, "pronunciation_vocab_size": 64, "shape_embed_dim": 16, "shape_vocab_size": 64
    },
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    },
}  # fmt: skip


def config_class(model_type: str) -> type[PretrainedConfig]:
    """Return the config class of the type's causal LM: for a composite config (Emu3, Mllama), that of its text decoder."""
    config = CONFIG_MAPPING[model_type]
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if name is None or "text_config" not in config.sub_configs:
        return config
    return getattr(transformers, name).config_class


def options_of(model_type: str) -> dict[str, Any]:
    """Return the config values of a tiny model."""
    known = {}
    if model_type not in ARCHITECTURES:
        default = config_class(model_type)().to_dict()
        known = {name: value for name, value in MORE_SIZES.items() if name in default}
        if "kv_lora_rank" in default:  # latent attention has no groups of heads
            known["num_key_value_heads"] = SIZES["num_attention_heads"]
    return {**SIZES, **known, **ARCHITECTURES.get(model_type, {}), **OVERRIDES.get(model_type, {})}


def build(
    architecture: str, *, seed: int = 0, logit_scale: float = 3.0, context: float = 1.0, **changes: Any
) -> PreTrainedModel:
    """Build a random causal LM with two layers, 64 tokens, a `config.mtp` and logits of standard deviation `logit_scale`.

    Args:
        context: below 1, the embeddings of all tokens become similar, so that the next token depends little on the text. A mask
            then predicts nearly what the real token would, as in a trained model, and drafts are often accepted.
        changes: config values.

    Raises:
        ValueError: the model is not tiny.
    """
    options = {**options_of(architecture), **changes}
    backend = options.pop("attn_implementation", None)
    model_type = "gemma3_text" if architecture == "gemma3" else architecture
    config = config_class(model_type)(**options)
    config.mtp = {"mask_token": "<|mtp|>", "mask_token_id": MASK, "k_max": 8, "barred_token_ids": list(BARRED)}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in _of_config(config, model_type).parameters())
    if parameters > LARGEST:
        raise ValueError(f"{parameters:,} parameters are not tiny; set the sizes of {model_type} in tiny_models.py.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _of_config(config, model_type, attn_implementation=backend).eval()
    _randomise(model, seed=seed, logit_scale=logit_scale, context=context)
    return model


def _of_config(config: PretrainedConfig, model_type: str, **options: Any) -> PreTrainedModel:
    if type(config) is CONFIG_MAPPING[model_type]:
        return AutoModelForCausalLM.from_config(config, **options)
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])._from_config(config, **options)


@torch.no_grad()
def _randomise(model: PreTrainedModel, *, seed: int, logit_scale: float, context: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.is_floating_point():
            continue
        if parameter.ndim >= 2 and "conv1d" not in name:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=rng)
        elif parameter.ndim == 1 and "bias" in name:
            parameter.normal_(0, 0.1, generator=rng)
    embeddings = model.get_input_embeddings().weight
    embeddings.normal_(generator=rng)
    embeddings.mul_(context).add_(torch.randn(embeddings.shape[1], generator=rng) * (1 - context))
    # Some models scale their logits, so the factor is measured rather than computed.
    head = model.get_output_embeddings().weight
    ids = torch.randint(2, VOCABULARY, (4, 16), generator=rng)
    head.mul_(logit_scale / model(input_ids=ids, use_cache=False).logits.std())

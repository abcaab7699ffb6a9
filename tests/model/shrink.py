"""Tiny random models of every causal-LM architecture of the installed transformers, shrunk by attribute names."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

LAYERS = 3
LARGEST = 5_000_000  # parameters; what stays larger was not shrunk by these names
# What the attributes of most configs mean, and a small value for each.
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "dim": 64,
    "emb_dim": 64,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "d_ff": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "dense_intermediate_size": 96,
    "ffn_hidden_size": 96,
    "intermediate_size_mlp": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_head_dim": 16,
    "kv_channels": 16,
    "d_kv": 16,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "num_limited_groups": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": 4,
    "attention_window": 4,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "lru_width": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "attention_hidden_size": 64,
    "rotary_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def causal_configs():
    """{model type: config class}, one a model class."""
    found, models = {}, set()
    for config_class, model_class in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        key = model_class if not isinstance(model_class, (tuple, list)) else model_class[0]
        if key not in models:
            models.add(key)
            found[config_class.model_type or config_class.__name__] = config_class
    return found


def attempts(config_class):
    """Keyword arguments for the config class, the likeliest first; ends early where the class cannot be made at all."""
    try:
        default = config_class()
        accepted = set(inspect.signature(config_class.__init__).parameters)
        accepted |= set(vars(default)) | set(default.attribute_map)
        unset = {k for k in SMALL if k != "head_dim" and hasattr(default, k) and getattr(default, k) is None}
        values = {k: v for k, v in SMALL.items() if k in accepted - unset}
        if isinstance(getattr(default, "layer_types", None), list):
            kinds = list(dict.fromkeys(default.layer_types))
            values["layer_types"] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    except Exception:
        return
    yield values
    yield {k: v for k, v in values.items() if k != "layer_types"}
    yield values | {"num_key_value_heads": 4}
    yield {
        k: v
        for k, v in values.items()
        if k in ("vocab_size", "num_hidden_layers", "n_layer", "num_layers", "hidden_size")
    }


def shrunk(config_class):
    """A tiny random model, or None where these rules do not give a valid one."""
    for keywords in attempts(config_class):
        try:
            config = config_class(**keywords)
            if hasattr(config, "is_decoder"):
                config.is_decoder = True
            with torch.device("meta"):
                if sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > LARGEST:
                    continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim >= 2:
                        parameter.normal_(0, 0.08)
                output = model(input_ids=torch.arange(3, 15)[None], use_cache=False)[0]
            if torch.isfinite(output).all():
                return model
        except Exception:
            continue
    return None


# Attributes of the configs of towers that see or hear, beside those in `SMALL`.
SMALL_TOWER = {
    "depth": LAYERS,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": 64,
    "embed_dim": 64,
    "projection_dim": 64,
    "encoder_attention_heads": 4,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "max_target_positions": 64,
    "conv_dim": (32, 32),
    "conv_kernel": (3, 3),
    "conv_stride": (2, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_labels": 3,
    "decoder_layers": LAYERS,
    "num_encoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_position_embeddings": 16,
    "output_dim": 64,
}


def small_config(config_class, depth=0):
    """Keyword arguments that make a config small, its parts included; None where the class cannot be made at all."""
    try:
        default = config_class()
    except Exception:
        return None
    accepted = (
        set(inspect.signature(config_class.__init__).parameters) | set(vars(default)) | set(default.attribute_map)
    )
    small = SMALL | SMALL_TOWER
    values = {k: v for k, v in small.items() if k in accepted and _is_set(default, k)}
    if isinstance(getattr(default, "layer_types", None), list):
        kinds = list(dict.fromkeys(default.layer_types))
        values["layer_types"] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items() if depth < 3 else ():
        sub = (
            type(getattr(default, name, None))
            if not hasattr(part, "model_type") or part.__name__ == "AutoConfig"
            else part
        )
        inner = small_config(sub, depth + 1) if sub is not type(None) else None
        if inner is not None:
            values[name] = {**inner, "model_type": sub.model_type} if part.__name__ == "AutoConfig" else inner
    return values


def _is_set(config, name):
    """Whether a config has a value of its own for a name; some refuse to be asked for what differs between layers."""
    try:
        return getattr(config, name, None) is not None
    except Exception:
        return False


def small_model(model_class):
    """A tiny random model of a class, not run; None where these rules do not give one."""
    values = small_config(model_class.config_class)
    for keywords in [] if values is None else [values, {k: v for k, v in values.items() if k != "layer_types"}]:
        try:
            config = model_class.config_class(**keywords)
            with torch.device("meta"):
                if sum(p.numel() for p in model_class(config).parameters()) > LARGEST:
                    continue
            torch.manual_seed(0)
            model = model_class(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim >= 2:
                        parameter.normal_(0, 0.08)
            return model
        except Exception:
            continue
    return None

"""Tiny random models of every family in the table, for tests: seeded, float32, a few milliseconds each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from kpatch.models.model import Model, wrap
from kpatch.models.text_part import loader
from tests.support.tokenizers import byte_level

WIDTH, MLP_WIDTH, HEADS, LAYERS, WINDOW = 32, 64, 4, 4, 6
EXPERT_WIDTH = 40  # f of shared experts

# What each architecture calls its sizes, and the settings that make its peculiarities matter at this size.
_COMMON: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_GATED: dict[str, Any] = {**_COMMON, "intermediate_size": MLP_WIDTH, "num_key_value_heads": 2}
_ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_LINEAR = ["linear_attention", "full_attention"] * (LAYERS // 2)
_LATENT: dict[str, Any] = {  # DeepSeek's attention
    **{**_GATED, "num_key_value_heads": HEADS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8},
    **{"qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4},
}
_EXPERTS: dict[str, Any] = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "moe_intermediate_size": EXPERT_WIDTH // 2,
}
_QWEN_EXPERTS: dict[str, Any] = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "shared_expert_intermediate_size": EXPERT_WIDTH,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": MLP_WIDTH, "n_positions": 128},
    "gptj": {
        **{"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": MLP_WIDTH, "n_positions": 128},
        "rotary_dim": 4,
        "tie_word_embeddings": False,
    },
    "gpt_neox": {**_COMMON, "intermediate_size": MLP_WIDTH, "rotary_pct": 0.5},
    "opt": {**_COMMON, "ffn_dim": MLP_WIDTH, "word_embed_proj_dim": 16, "max_position_embeddings": 128},
    "llama": {**_GATED},
    "mistral": {**_GATED, "sliding_window": WINDOW},
    "qwen2": {**_GATED},
    "qwen3": {**_GATED, "head_dim": 16},
    "phi": {**_GATED},
    "gemma2": {
        **{**_GATED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW},
        **{"layer_types": _ALTERNATING, "final_logit_softcapping": 1.5, "attn_logit_softcapping": 2.0},
    },
    "gemma3_text": {
        **{**_GATED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW},
        **{"layer_types": _ALTERNATING, "final_logit_softcapping": 1.5},
    },
    "olmo2": {**_GATED},
    "gpt_neo": {
        **{"hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "intermediate_size": MLP_WIDTH},
        **{"attention_types": [[["global", "local"], LAYERS // 2]], "window_size": WINDOW},
        "max_position_embeddings": 128,
    },
    "gpt_bigcode": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": MLP_WIDTH, "n_positions": 128},
    "codegen": {
        **{"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_inner": MLP_WIDTH, "n_positions": 128},
        "rotary_dim": 4,
    },
    "bloom": {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    "falcon": {**_COMMON, "ffn_hidden_size": MLP_WIDTH},
    "mpt": {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "expansion_ratio": 2, "max_seq_len": 128},
    "ministral": {**_GATED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
    "ministral3": {**_GATED, "head_dim": 8},
    "phi3": {**_GATED, "sliding_window": WINDOW},
    "gemma": {**_GATED, "head_dim": 16},
    "olmo": {**_GATED, "clip_qkv": 1.5},
    "smollm3": {**_GATED, "no_rope_layers": [1, 0] * (LAYERS // 2)},
    "stablelm": {**_GATED, "use_qkv_bias": True},
    "starcoder2": {**_GATED, "sliding_window": WINDOW},
    "cohere": {**_GATED, "logit_scale": 0.4, "use_qk_norm": True},
    "cohere2": {**_GATED, "head_dim": 8, "logit_scale": 0.4, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
    "granite": {
        **{**_GATED, "residual_multiplier": 0.22, "logits_scaling": 2.0},
        **{"embedding_multiplier": 0.5, "attention_multiplier": 0.4},
    },
    "glm": {**_GATED, "head_dim": 8},
    "glm4": {**_GATED, "head_dim": 8},
    "nemotron": {**_GATED, "head_dim": 8},
    "seed_oss": {**_GATED, "head_dim": 8},
    "helium": {**_GATED, "head_dim": 8},
    "ernie4_5": {**_GATED, "head_dim": 8},
    "apertus": {**_GATED},
    "arcee": {**_GATED, "head_dim": 8},
    "minicpm3": {
        **{**_GATED, "num_key_value_heads": HEADS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8},
        **{"qk_rope_head_dim": 4, "v_head_dim": 8, "scale_depth": 1.4, "scale_emb": 3, "dim_model_base": 16},
    },
    "gemma4_text": {
        **{**_GATED, "head_dim": 8, "global_head_dim": 16, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
        **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "final_logit_softcapping": 1.5},
        "num_kv_shared_layers": 0,
    },
    "olmo3": {**_GATED, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
    "exaone4": {**_GATED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
    "lfm2": {
        **{**_GATED, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "qwen3_5_text": {
        **{**_GATED, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
        "linear_value_head_dim": 8,
    },
    "qwen2_vl_text": {**_GATED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    "qwen2_5_vl_text": {**_GATED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    "qwen3_vl_text": {
        **{**_GATED, "head_dim": 8},
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    },
    # Layer 0 is dense and the others are mixtures of experts, unless it says otherwise
    "deepseek_v2": {**_LATENT, **_EXPERTS, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_LATENT, **_EXPERTS, "n_group": 2, "topk_group": 1},
    "glm4_moe": {**_GATED, **_EXPERTS, "head_dim": 8, "n_group": 1, "topk_group": 1},
    "dots1": {**_GATED, **_EXPERTS, "head_dim": 8, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {
        **{**_GATED, "head_dim": 8, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 2},
        **{"moe_intermediate_size": EXPERT_WIDTH // 2, "moe_layer_start_index": 1},
    },
    "hunyuan_v1_moe": {**_GATED, "head_dim": 8, "num_experts": 4, "moe_topk": 2},  # shared experts in every layer
    "llama4_text": {  # dense and experts in turn
        **{**_GATED, "head_dim": 8, "intermediate_size": EXPERT_WIDTH, "intermediate_size_mlp": MLP_WIDTH},
        **{"num_local_experts": 4, "interleave_moe_layer_step": 2, "attention_chunk_size": WINDOW},
    },
    "qwen2_moe": {**_GATED, **_QWEN_EXPERTS, "mlp_only_layers": [0]},
    "qwen3_moe": {**_GATED, **_QWEN_EXPERTS, "head_dim": 16, "mlp_only_layers": [1, 2]},  # no shared expert
    "qwen3_next": {
        **{**_GATED, **_QWEN_EXPERTS, "head_dim": 16, "layer_types": _LINEAR, "mlp_only_layers": [0]},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
        "linear_value_head_dim": 8,
    },
    "qwen3_5_moe_text": {  # shared experts in every layer
        **{**_GATED, **_QWEN_EXPERTS, "head_dim": 16, "layer_types": _LINEAR},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8},
        "linear_value_head_dim": 8,
    },
    "lfm2_moe": {  # dense layers, then experts without a shared one
        **{**_GATED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_WIDTH},
        **{"conv_L_cache": 3, "num_dense_layers": 3},
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
}

_VISION: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
_QWEN_VISION: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
# Models with vision: the family of their text part, and the settings of the rest.
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"vision_config": {**_VISION, "model_type": "siglip_vision_model"}}),
    "gemma4": (
        "gemma4_text",
        {"vision_config": {**_VISION, "num_key_value_heads": 2, "head_dim": 8}, "audio_config": None},
    ),
    "qwen2_vl": (
        "qwen2_vl_text",
        {"vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": WIDTH}},
    ),
    "qwen2_5_vl": ("qwen2_5_vl_text", {"vision_config": {**_QWEN_VISION, "out_hidden_size": WIDTH}}),
    "qwen3_vl": (
        "qwen3_vl_text",
        {
            "vision_config": {
                **{**_QWEN_VISION, "out_hidden_size": WIDTH, "num_position_embeddings": 4},
                "deepstack_visual_indexes": [0],
            }
        },
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {"vision_config": {**_QWEN_VISION, "out_hidden_size": WIDTH, "num_position_embeddings": 4}},
    ),
    "llama4": (
        "llama4_text",
        {
            "vision_config": {
                **{**_VISION, "vision_output_dim": WIDTH, "projector_input_dim": WIDTH},
                "projector_output_dim": WIDTH,
            }
        },
    ),
    "mistral3": ("mistral", {"vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8}}),
    "llava": ("llama", {"vision_config": {**_VISION, "model_type": "clip_vision_model", "projection_dim": WIDTH}}),
    "idefics3": ("llama", {"vision_config": _VISION}),
    "internvl": ("qwen2", {"vision_config": {**_VISION, "image_size": [28, 28], "patch_size": [14, 14]}}),
}
# Families that only such a model has
ONLY_WRAPPED = {"qwen2_vl_text": "qwen2_vl", "qwen2_5_vl_text": "qwen2_5_vl", "qwen3_vl_text": "qwen3_vl"}


def tiny(family: str, *, tokenizer: Any = None, seed: int = 0, **overrides: Any) -> Model:
    """A random model of `family`: width 32, f 64, 4 layers, as many rows of embeddings as the tokenizer has tokens.

    `family` may be one of WRAPPERS: the text part is then as that of its family.
    `overrides` are settings of the transformers config. The tokenizer is byte-level without BOS unless given.
    """
    tokenizer = tokenizer if tokenizer is not None else byte_level(bos=False)
    return wrap(tiny_net(family, len(tokenizer), seed=seed, **overrides), tokenizer, name=f"tiny-{family}")


def tiny_net(family: str, vocabulary: int, *, seed: int = 0, **overrides: Any) -> Any:
    """The network of `tiny` alone, on a vocabulary of any size."""
    settings = {"vocab_size": vocabulary, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    family = ONLY_WRAPPED.get(family, family)
    text, rest = WRAPPERS.get(family, (family, None))
    settings = {**settings, **CONFIGS.get(text, {}), **overrides}
    if rest is not None:
        settings = {**rest, "text_config": {"model_type": text, **settings, "pad_token_id": 0}}
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = loader(config).from_config(config, dtype=torch.float32)
        _randomize(net)
    return net.eval()


@torch.no_grad()
def _randomize(net: nn.Module) -> None:
    """Weights large enough that every layer moves the residual stream by about its own size.

    Norms get uneven weights and every bias is filled: with the usual ones and zeros, mistakes about them cannot show.
    """
    seen: set[int] = set()  # a tied head is filled as the embedding it is
    for name, buffer in net.named_buffers():
        if name.endswith(".layer_scalar"):  # Gemma 4 multiplies a whole layer by it
            buffer.fill_(0.6)
    for module in net.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            if "Norm" in type(module).__name__ and name == "weight":
                weight.add_(torch.randn(weight.shape), alpha=0.2)
            elif isinstance(module, nn.Embedding):
                # Gemma multiplies its embeddings by the root of the width
                weight.normal_(0.0, 0.7 / float(getattr(module, "scalar_embed_scale", 1.0)))
            elif weight.ndim == 2:
                fan_in = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
                weight.normal_(0.0, fan_in**-0.5)
            else:
                weight.add_(torch.randn(weight.shape), alpha=0.2)

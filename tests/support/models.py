"""Tiny random models of every family in the table, for tests: seeded, float32, a few milliseconds each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kpatch.models.model import Model, wrap
from tests.support.tokenizers import byte_level

WIDTH, MLP_WIDTH, HEADS, LAYERS, WINDOW = 32, 64, 4, 4, 6

# What each architecture calls its sizes, and the settings that make its peculiarities matter at this size.
_COMMON: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_GATED: dict[str, Any] = {**_COMMON, "intermediate_size": MLP_WIDTH, "num_key_value_heads": 2}
_ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
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
}


def tiny(family: str, *, tokenizer: Any = None, seed: int = 0, **overrides: Any) -> Model:
    """A random model of `family`: width 32, f 64, 4 layers, as many rows of embeddings as the tokenizer has tokens.

    `overrides` are settings of the transformers config. The tokenizer is byte-level without BOS unless given.
    """
    tokenizer = tokenizer if tokenizer is not None else byte_level(bos=False)
    return wrap(tiny_net(family, len(tokenizer), seed=seed, **overrides), tokenizer, name=f"tiny-{family}")


def tiny_net(family: str, vocabulary: int, *, seed: int = 0, **overrides: Any) -> Any:
    """The network of `tiny` alone, on a vocabulary of any size."""
    settings = {"vocab_size": vocabulary, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(family, **{**settings, **CONFIGS.get(family, {}), **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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

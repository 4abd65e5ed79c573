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

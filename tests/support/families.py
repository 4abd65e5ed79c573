"""Tiny models of every family, and what each one's own forward gives on a single bare row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpatch.models.families import FAMILIES
from kpatch.models.model import Model
from kpatch.models.partial_forward import align
from tests.support.models import ONLY_WRAPPED, WIDTH, WRAPPERS, tiny

# Every family, and the settings of some that change how their layers are put together.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    **{name: (name, {}) for name in WRAPPERS if name not in ONLY_WRAPPED.values()},
    "falcon-sequential-alibi": ("falcon", {"parallel_attn": False, "alibi": True}),
    "falcon-new-decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "gpt_bigcode-many-keys": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "opt-as-wide-as-its-embeddings": ("opt", {"word_embed_proj_dim": WIDTH}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-eager": ("llama", {"attn_implementation": "eager"}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
}

# One of each way to put a layer together, for slow tests; the other rows differ from these in names only.
KINDS = (
    *(
        "gpt2",
        "gptj",
        "gpt_neox",
        "opt",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi",
        "gemma2",
        "gemma3_text",
        "olmo2",
    ),
    *("falcon", "cohere", "granite", "minicpm3", "gemma4_text", "glm4", "lfm2", "qwen3_5_text"),
)

# Those that a plain `pytest` takes through every test: W stored [in, out], attention and MLP side by side with two
# norms and with one, plain, windows with norms on both sides of the MLP, norms behind the
# parts alone, shared experts in every other layer of a model with vision, and experts behind a gate
REPRESENTATIVE = ("gpt2", "gpt_neox", "phi", "llama", "gemma3_text", "olmo2", "llama4", "qwen2_moe")

# Every way to put a layer together: the quick run takes these through what is cheap but the same for all families
EVERY_KIND = (*KINDS, *(name for name in REPRESENTATIVE if name not in KINDS))

# Layers whose MLP is a mixture of experts: with a shared one, with none, and with one behind a gate
SHARED = {
    **{name: {1, 2, 3} for name in ("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe", "qwen2_moe")},
    **{"hunyuan_v1_moe": {0, 1, 2, 3}, "llama4_text": {1, 3}, "qwen3_next": {1, 2, 3}},
    "qwen3_5_moe_text": {0, 1, 2, 3},
}
ROUTED = {"qwen3_moe": {0, 3}, "lfm2_moe": {3}}
GATED = {name: SHARED[name] for name in ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text")}

# Families whose layers differ in something that the shape of a batch can meet
VARIED = ("gpt2", "llama", "olmo2", "bloom", "lfm2", "qwen3_5_text", "qwen2_5_vl_text")

# (columns before the aligned one, columns from it on); windows are 6 wide, so that the longer rows reach past them
RAGGED = [(9, 2), (3, 6), (0, 4), (1, 1), (8, 5)]


def slow_beyond(quick: Collection[str], names: Iterable[str]) -> list[Any]:
    """`names` as parameters: those of `quick` run in a plain `pytest`, the others are marked slow."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow], id=name) for name in names]


@cache
def build(case: str) -> Model:
    family, settings = CASES[case]
    return tiny(family, **settings)


@dataclass
class Full:
    """A row as the network runs it: states[l] enters layer l, states[L] leaves the last; by layer, all [T, ...]."""

    states: list[Tensor]
    keys: dict[int, Tensor]  # of layers that have a W^l
    down: dict[int, Tensor]
    attn: list[Tensor]
    mlp: list[Tensor]
    logits: Tensor


def full(model: Model, ids: list[int], change: Callable[[int, Tensor], Tensor] | None = None) -> Full:
    """The network's own forward on one bare row; `change(layer, hidden)` may replace what leaves a layer."""
    found = Full([], {}, {}, [], [], torch.empty(0))
    handles = []

    def flat(value: Any) -> Tensor:
        rows: Tensor = value[0] if isinstance(value, tuple) else value
        return rows.reshape(len(ids), -1)

    def keep_input(_: nn.Module, args: Any) -> None:
        found.states.append(flat(args))

    def keep_output(index: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, out: Any) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            if change is not None:
                hidden = change(index, hidden)
            found.states.append(hidden[0])
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        return hook

    def note_key(index: int) -> Callable[..., None]:
        return lambda _, args: found.keys.update({index: flat(args)})

    def note_down(index: int) -> Callable[..., None]:
        return lambda _, args, out: found.down.update({index: flat(out).clone()})  # Llama 4 adds to it in place

    def keep(into: list[Tensor]) -> Callable[..., None]:
        return lambda _, args, out: into.append(flat(out).clone())  # Falcon adds attention's output in place

    handles.append(model.layer(0).register_forward_pre_hook(keep_input))
    for index in range(model.n_layers):
        handles.append(model.layer(index).register_forward_hook(keep_output(index)))
        if index in model.editable:
            handles.append(model.down(index).register_forward_pre_hook(note_key(index)))
            handles.append(model.down(index).register_forward_hook(note_down(index)))
        handles.append(model.attn_out(index).register_forward_hook(keep(found.attn)))
        handles.append(model.mlp_out(index).register_forward_hook(keep(found.mlp)))
    try:
        found.logits = model.net(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return found


def plain(model: Model, ids: list[int]) -> Full:
    """`full` without a change, run once for each model and row: many tests ask for the same rows.

    The model must be as it was built.
    """
    key = (id(model), tuple(ids))
    if key not in _plain:
        with torch.no_grad():
            _plain[key] = (model, full(model, ids))
    return _plain[key][1]


_plain: dict[tuple[int, tuple[int, ...]], tuple[Model, Full]] = {}  # the model is held, so that its id stays its own


def rows_of(shape: list[tuple[int, int]], vocabulary: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocabulary, (a + b,), generator=generator).tolist() for a, b in shape]


def batch_of(model: Model, shape: list[tuple[int, int]]) -> tuple[list[list[int]], Any]:
    rows = rows_of(shape, len(model.tokenizer))
    return rows, align(rows, [before for before, _ in shape], model.pad_id)


def check(got: Tensor, want: Tensor, within: float = 2e-5) -> None:
    """Equal to rounding in float32, relative to the largest entry."""
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, want, rtol=0, atol=within * (1 + float(want.abs().max())))


def stored_product(model: Model, keys: Tensor, layer: int) -> Tensor:
    weight, bias = model.weight(layer), getattr(model.down(layer), "bias", None)
    product = keys @ weight if model.stores_transposed else keys @ weight.T  # [T, d]
    return product if bias is None else product + bias

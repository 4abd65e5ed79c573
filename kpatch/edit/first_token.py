"""Subjects that open a text are edited on their own, below the attention sink; all others in the layers R.

Models whose tokenizer adds no BOS park attention on a text's first token. From the layer on where that happens its
state is the same for every word, many times larger than others, and an edit of one word there reaches all of them
(SmolLM2, layers 4 to 7: keys six times shorter than elsewhere and correlated by 0.92 between words). At layer 0 the
key still tells words apart, so a subject that is the very first token gets its value and its update there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.edit.requests import Group
from kpatch.edit.solve import KeyCovariance
from kpatch.models.model import Model
from kpatch.models.partial_forward import align, run_to
from kpatch.stats.covariance import Covariance
from kpatch.stats.self_text import opening_words

_WORDS = 4096


@dataclass(frozen=True)
class Part:
    """Groups edited in the same layers; `first` says that their subjects are the first token of their rows."""

    groups: tuple[Group, ...]
    hyper: Any
    first: bool

    @property
    def least_leverage(self) -> float:
        """The floor of `upwards.write_upwards`: without it, opening words would outweigh a single edited fact in C."""
        return self.hyper.first_leverage if self.first else 0.0


def split(groups: Sequence[Group], hyper: Any) -> list[Part]:
    """The parts, lower layers first; empty ones are left out."""
    opening = tuple(group for group in groups if group.first)
    others = tuple(group for group in groups if not group.first)
    parts = [Part(opening, replace(hyper, layers=(hyper.first_layer,)), True), Part(others, hyper, False)]
    return [part for part in parts if part.groups]


def touched(parts: Sequence[Part]) -> list[int]:
    """Every layer that a part edits, rising."""
    return sorted({layer for part in parts for layer in part.hyper.layers})


def key_covariances(
    model: Model,
    part: Part,
    covariance: Covariance,
    others: Callable[[int], Tensor | None],
    build: Callable[[int, Tensor], KeyCovariance],
) -> Callable[[int], KeyCovariance]:
    """What a layer must go on doing, when it is asked for: what `build` makes of the layer and its E[k k^T] [f, f].

    others  a moment [f, f] of the layer, added to E[k k^T]
    For subjects that open texts, words that open texts count as much as all other text does.
    """

    opening: dict[int, Tensor] = {}
    if part.first and distributed.is_main():  # now, while the weights are what they are to be taken of
        opening = {layer: opening_moment(model, layer) for layer in part.hyper.layers}

    def preserved(layer: int) -> KeyCovariance:
        mean = covariance.moments[layer].mean()
        if part.first:
            mean = mean + opening[layer]
        more = others(layer)
        if more is not None:
            mean = mean + more
        return build(layer, mean)

    return preserved


def opening_moment(model: Model, layer: int) -> Tensor:
    """E[k k^T] [f, f] float64 at `layer` over words that are the first token of a text."""
    words = opening_words(model)
    words = words[:: -(-len(words) // _WORDS)]
    total = torch.zeros(model.key_width(layer), model.key_width(layer), dtype=torch.float64)
    for some in torch.split(words, 512):
        batch = align([[word] for word in some.tolist()], [0] * len(some), model.pad_id, model.device)
        keys = run_to(model, layer, batch, [layer])[layer][:, 0].double().cpu()  # (512, f)
        total += keys.T @ keys
    return total / len(words)

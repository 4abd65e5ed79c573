"""Weights of the model in memory while an edit is found or measured: Δ added as `apply` writes it, and taken back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kpatch.models.model import Model
from kpatch.models.offload import in_memory
from kpatch.patch.delta import Delta, LowRank, patched_weight


@contextmanager
def restored(model: Model, names: Iterable[str]) -> Iterator[None]:
    """Whatever happens inside, the weights `names` come back bit for bit."""
    names = list(names)
    resident = [name for name in names if not model.net.get_parameter(name).is_meta]  # the others are loaded anew
    base = {name: model.net.get_parameter(name).detach().clone() for name in resident}
    with in_memory(model.net, names):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in base.items():
                    model.net.get_parameter(name).copy_(weight)


@torch.no_grad()
def add(model: Model, name: str, delta: Delta) -> None:
    """W + Δ in memory, the very bits that `apply` writes."""
    weight = model.net.get_parameter(name)
    weight.copy_(patched_weight(weight, [delta]))


def stored(left: Tensor, right: Tensor, transposed: bool, balanced: bool = True) -> LowRank:
    """Float32 factors in W's stored orientation, where `balanced` of equal column and row norms.

    left [d, r], right [r, f]; `transposed` where W is stored [f, d].
    """
    if balanced:  # so that neither underflows
        a, b = left.norm(dim=0).clamp(min=1e-30), right.norm(dim=1).clamp(min=1e-30)
        left, right = left * (b / a).sqrt(), right * (a / b).sqrt()[:, None]
    if transposed:
        left, right = right.T, left.T
    return LowRank(left.float().contiguous(), right.float().contiguous())

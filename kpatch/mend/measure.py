"""What an editor takes from the model before its first step: of (u, δ) what normalizes them, of u its size and C."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kpatch.errors import KpatchError
from kpatch.mend.data import Data
from kpatch.mend.network import Network, Transform, shape_name
from kpatch.mend.places import module_of
from kpatch.mend.rows import Below, Row, factors, marked
from kpatch.reporter import SILENT, Advance, Reporter

# Of the mean eigenvalue, added to every eigenvalue of C: fewer tokens than that say nothing of the least
_SHRINK = 0.05


@torch.no_grad()
def measure(network: Network, below: Below, data: Data, count: int, batch: int, report: Reporter = SILENT) -> None:
    """Fill in what `network` normalizes with, over the first `count` training facts, `batch` at a time.

    Its precisions too, where it has them: C is the mean of E[u uᵀ] over the text that must stay and over the facts'
    neighbors. Raises KpatchError where the gradients are not finite.
    """
    facts, near, text = rows_measured(network, data, count)
    sums = {name: torch.zeros(3, sum(one.shape), dtype=torch.float64) for name, one in _transforms(network)}
    sizes = torch.zeros(2, len(network.places), dtype=torch.float64)
    with report.task("Measuring gradients", len(facts), "fact") as advance:
        for begin in range(0, len(facts), batch):
            some = facts[begin : begin + batch]
            found = factors(below.ready(some), network.places)
            for number, (u, delta) in enumerate(found):
                at = marked(u, delta)
                u, delta = u.flatten(0, 1)[at].double().cpu(), delta.flatten(0, 1)[at].double().cpu()
                both = torch.cat([u, delta], -1)  # (N, D)
                kept = sums[shape_name(network.places[number].shape)]
                kept += torch.stack([both.sum(0), both.square().sum(0), torch.full_like(kept[2], len(both))])
                sizes[:, number] += torch.tensor([float(u.square().sum()), float(len(u))], dtype=torch.float64)
            advance(len(some))
    for name, one in _transforms(network):
        first, second, seen = sums[name]
        if float(seen[0]) < 2 or not bool(torch.isfinite(second).all()):
            raise KpatchError(f"The gradients of the facts cannot be measured for matrices of shape {name}")
        mean = first / seen
        one.mean.copy_(mean)
        one.std.copy_((second / seen - mean.square()).clamp(min=0).sqrt())
    network.sizes.copy_(sizes[0] / sizes[1])
    if network.settings.covariance:
        _measure_precisions(network, below, [rows for rows in (text, near) if rows], batch, report)


def rows_measured(network: Network, data: Data, count: int) -> tuple[list[Row], list[Row], list[Row]]:
    """The rows that `measure` runs: `count` facts, and where C is wanted their neighbors and the text."""
    facts = data.training[:count]
    if not network.settings.covariance:
        return [fact.edit for fact in facts], [], []
    near = [row for fact in facts for row in fact.near]
    return [fact.edit for fact in facts], near, [Row(ids, ()) for ids in data.text]


def _measure_precisions(
    network: Network, below: Below, kinds: Sequence[Sequence[Row]], batch: int, report: Reporter
) -> None:
    total = sum(len(rows) for rows in kinds)
    covariances: list[Tensor | float] = [0.0] * len(network.places)
    with report.task("Measuring inputs that must stay", total, "text") as advance:
        for rows in kinds:
            batches = (rows[at : at + batch] for at in range(0, len(rows), batch))
            for number, moment in enumerate(_moments(network, below, batches, advance)):
                covariances[number] = covariances[number] + moment / len(kinds)
    for number, covariance in enumerate(covariances):
        assert isinstance(covariance, Tensor)
        precision = network.precision(number)
        assert precision is not None
        precision.copy_(inverse(covariance))


def inverse(covariance: Tensor) -> Tensor:
    """P = s (C + shrinkage)⁻¹ [in, in], float64, with s such that E[uᵀPu] = tr(P C) is E ‖u‖² = tr C."""
    width = len(covariance)
    mean = covariance.diagonal().mean().clamp(min=torch.finfo(covariance.dtype).tiny)
    found = torch.linalg.inv(covariance + _SHRINK * mean * torch.eye(width, dtype=covariance.dtype))
    found = (found + found.T) / 2
    scaled: Tensor = found * (width * mean / (found * covariance).sum())
    return scaled


def _moments(network: Network, below: Below, batches: Iterable[Sequence[Row]], advance: Advance) -> list[Tensor]:
    """E[u uᵀ] [in, in] of every place over all tokens of some rows, float64 on the CPU."""
    sums = [torch.zeros(place.width_in, place.width_in, dtype=torch.float64) for place in network.places]
    seen = 0
    for rows in batches:
        above = below.ready(rows)
        real = torch.arange(above.hidden.shape[1])[None] < torch.tensor([[len(row.ids)] for row in rows])  # (B, T)
        seen += int(real.sum())
        with _inputs(network, below) as inputs:
            above.run()
        for total, u in zip(sums, inputs, strict=True):
            u = u.reshape(*real.shape, -1)[real.to(u.device)]
            total += (u.T @ u).double().cpu()
    return [total / seen for total in sums]


@contextmanager
def _inputs(network: Network, below: Below) -> Iterator[list[Tensor]]:
    """The inputs of all places, in their order, once the model has run."""
    found: list[Tensor] = []
    handles = []
    for place in network.places:

        def keep(module: nn.Module, given: Any) -> None:
            found.append(given[0].detach())

        handles.append(module_of(below.model, place).register_forward_pre_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _transforms(network: Network) -> list[tuple[str, Transform]]:
    return list(network.transforms.items())  # type: ignore[arg-type]

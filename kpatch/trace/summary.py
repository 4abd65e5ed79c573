"""Averages over facts by what a token is to its prompt, with 95 % intervals by bootstrap over facts.

What all traced facts say together: effects by role, curves, total effect, R; each with its interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kpatch.trace.cells import CURVES
from kpatch.trace.layer_range import Range, Stability, choose, stability
from kpatch.trace.run import Traces

ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
DRAWS = 1000
_INTERVAL = (0.025, 0.975)


def role_of(token: int, first: int, last: int, end: int) -> int | None:
    """The index in ROLES of a token, with subject first..last and last token `end`; None before the subject.

    Every token has one role: the subject's last token goes before its first, the prompt's last before the first
    subsequent one. A prompt that ends with its subject has no last token besides.
    """
    if token < first:
        return None
    if token <= last:
        return 2 if token == last else 0 if token == first else 1
    return 5 if token == end else 3 if token == last + 1 else 4


def by_role(grid: Tensor, first: int, last: int) -> Tensor:
    """A fact's grid [T, L] averaged over the tokens of each role: [roles, L], NaN for a role without a token."""
    end = len(grid) - 1
    roles = [role_of(token, first, last, end) for token in range(len(grid))]
    rows = []
    for role in range(len(ROLES)):
        tokens = [token for token, found in enumerate(roles) if found == role]
        rows.append(grid[tokens].mean(0) if tokens else torch.full_like(grid[0], float("nan")))
    return torch.stack(rows)


def resamples(facts: int, seed: int, draws: int = DRAWS) -> Tensor:
    """How often each fact is drawn in each bootstrap sample: [draws, facts] float64, rows sum to `facts`."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(facts, (draws, facts), generator=generator)
    return torch.zeros(draws, facts, dtype=torch.float64).scatter_add_(
        1, picked, torch.ones(draws, facts, dtype=torch.float64)
    )


def means(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Means over facts, those that have a number: values [F, ...] → [...], or [draws, ...] with weights [draws, F]."""
    there = ~values.isnan()
    if weights is None:
        return values.nan_to_num().sum(0) / there.sum(0)
    flat = values.nan_to_num().reshape(len(values), -1)
    found = (weights @ flat) / (weights @ there.reshape(len(values), -1).to(weights.dtype))
    return found.view(len(weights), *values.shape[1:])


def interval(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The 95 % interval of the mean over facts: low and high, NaN where fewer than two facts have a number."""
    low, high = torch.nanquantile(means(values, weights), torch.tensor(_INTERVAL, dtype=torch.float64), dim=0)
    few = (~values.isnan()).sum(0) < 2
    return low.masked_fill(few, float("nan")), high.masked_fill(few, float("nan"))


def effects(grids: Sequence[Tensor], corrupted: Sequence[float], spans: Sequence[tuple[int, int]]) -> Tensor:
    """Indirect effects by role: grids of P[answer] [T, L] and what the corrupted run gives → [F, roles, L]."""
    return torch.stack(
        [by_role(grid - low, first, last) for grid, low, (first, last) in zip(grids, corrupted, spans, strict=True)]
    )


# The JSON object's names of the kinds
KIND_NAMES = {"state": "states", "mlp": "mlp", "attn": "attn"}


@dataclass(frozen=True)
class Averages:
    """Means over facts with the 95 % interval: three tensors of one shape, NaN where no fact has a number."""

    mean: Tensor
    low: Tensor
    high: Tensor


class Summary:
    """Averages over the facts of `traces`: indirect effects, P[answer] restored less P[answer] corrupted."""

    def __init__(self, traces: Traces) -> None:
        self.traces = traces
        facts = traces.facts
        self.weights = resamples(len(facts), traces.settings.seed)  # [draws, F]
        self.clean = self._over(torch.tensor([fact.clean for fact in facts], dtype=torch.float64))
        self.corrupted = self._over(torch.tensor([fact.corrupted for fact in facts], dtype=torch.float64))
        self._totals = torch.tensor([fact.clean - fact.corrupted for fact in facts], dtype=torch.float64)
        self.total_effect = self._over(self._totals)
        self._curves = torch.stack([fact.curves - fact.corrupted for fact in facts])  # [F, 3, L]
        self.curves = self._over(self._curves)

    def _over(self, values: Tensor) -> Averages:
        return Averages(means(values), *interval(values, self.weights))

    @cached_property
    def effects(self) -> dict[str, Averages]:
        """kind → [roles, L]; empty after a quick run."""
        facts = self.traces.facts
        spans = [(fact.first, fact.last) for fact in facts]
        low = [fact.corrupted for fact in facts]
        return {kind: self._over(effects([fact.grids[kind] for fact in facts], low, spans)) for kind in facts[0].grids}

    @cached_property
    def role_counts(self) -> list[int]:
        """How many facts have a token of each role."""
        spans = [(fact.first, fact.last, len(fact.tokens) - 1) for fact in self.traces.facts]
        return [
            sum(any(role_of(token, *span) == role for token in range(span[2] + 1)) for span in spans)
            for role in range(len(ROLES))
        ]

    @cached_property
    def range(self) -> Range | None:
        """R."""
        return _choose(self.curves.mean, float(self.total_effect.mean))

    @cached_property
    def stability(self) -> Stability | None:
        """R over bootstrap samples of the facts; None for a single fact."""
        if len(self.traces.facts) < 2:
            return None
        curves = means(self._curves, self.weights)  # [draws, 3, L]
        totals = means(self._totals, self.weights).tolist()
        samples = [_choose(curve, total) for curve, total in zip(curves, totals, strict=True)]
        return stability(self.range, samples, self.traces.layers)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `kpatch trace`, without files."""
        traces, settings = self.traces, self.traces.settings
        found = self.range
        return {
            "model": traces.model,
            "facts": {"tried": traces.tried, "kept": len(traces.facts)},
            "noise": settings.noise,
            "sigma": traces.sigma,
            "samples": settings.samples,
            "window": settings.window,
            "seed": settings.seed,
            "quick": settings.quick,
            "device": traces.device,
            "dtype": traces.dtype,
            "layers": found.layers if found else None,
            "range": self._range_dict(),
            "clean": _numbers(self.clean),
            "corrupted": _numbers(self.corrupted),
            "total_effect": float(self.total_effect.mean),
            "total_effect_interval": [float(self.total_effect.low), float(self.total_effect.high)],
            "effects": {
                name: {"roles": list(ROLES), "facts": self.role_counts, **_numbers(self.effects[kind])}
                if kind in self.effects
                else None
                for kind, name in KIND_NAMES.items()
            },
            "severed": {name: self.curves.mean[place].tolist() for place, name in enumerate(CURVES)},
            "severed_interval": {
                name: {"low": self.curves.low[place].tolist(), "high": self.curves.high[place].tolist()}
                for place, name in enumerate(CURVES)
            },
            "seconds": traces.seconds,
        }

    def _range_dict(self) -> dict[str, Any] | None:
        if self.range is None:
            return None
        return {
            "first": self.range.first,
            "last": self.range.last,
            "width": self.range.width,
            "gap": self.range.gap,
            "margin": self.range.margin,
            "stability": asdict(self.stability) if self.stability else None,
        }

    def per_fact(self) -> list[dict[str, Any]]:
        """Every fact with its tokens, P[answer] and all its cells."""
        return [
            {
                "id": fact.fact.id,
                "prompt": fact.fact.text(),
                "subject": fact.fact.subject,
                "answer": fact.answer,
                "tokens": list(fact.tokens),
                "subject_tokens": [fact.first, fact.last],
                "clean": fact.clean,
                "corrupted": fact.corrupted,
                "probabilities": {KIND_NAMES[kind]: grid.tolist() for kind, grid in fact.grids.items()},
                "severed": {name: fact.curves[place].tolist() for place, name in enumerate(CURVES)},
            }
            for fact in self.traces.facts
        ]


def _choose(curves: Tensor, total: float) -> Range | None:
    return choose(curves[0].tolist(), curves[1].tolist(), total)


def _numbers(averages: Averages) -> dict[str, Any]:
    return {"mean": averages.mean.tolist(), "low": averages.low.tolist(), "high": averages.high.tolist()}

"""What all traced facts say together: effects by role, curves, total effect, R; each with its interval."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kpatch.trace.choose import Range, Stability, choose, stability
from kpatch.trace.grids import CURVES
from kpatch.trace.roles import ROLES, effects, interval, means, resamples, role_of
from kpatch.trace.run import Traces

# The JSON object's names of the kinds
KIND_NAMES = {"state": "states", "mlp": "mlp", "attn": "attn"}


@dataclass(frozen=True)
class Averages:
    """Means over facts with the 95 % interval: three tensors of one shape, NaN where there is nothing to tell."""

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

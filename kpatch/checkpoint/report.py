"""What apply and revert tell when they are done. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpatch.checkpoint.plan import Plan


@dataclass(frozen=True)
class WeightReport:
    """What rounding did to one weight's delta, None when there is none (all patches taken off, or only checked).

    `unchanged`: share of the entries with a nonzero delta that stayed as they were; `delta_error`: relative Frobenius
    error of the delta that landed; `key_error`: that error of Δk, over the keys the patches were made for (None too
    when they carry none). All of the whole stack's delta, against the unpatched weight.
    """

    name: str
    unchanged: float | None
    delta_error: float | None
    key_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        own = {"name": self.name, "unchanged": self.unchanged}
        return {**own, "delta_error": self.delta_error, "key_error": self.key_error}


@dataclass(frozen=True)
class ApplyReport:
    """The outcome of an apply or revert; `model` is the directory written to, `plan` what was (or would be) done."""

    model: str
    patches: tuple[dict[str, str], ...]
    weights: tuple[WeightReport, ...]
    seconds: float
    state: str
    plan: Plan
    notes: tuple[str, ...] = ()
    checked_only: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `apply` and `revert`; with --check the plan as well."""
        value = {
            "model": self.model,
            "patches": list(self.patches),
            "weights": [weight.to_dict() for weight in self.weights],
            "seconds": self.seconds,
            "state": self.state,
            "notes": list(self.notes),
        }
        return {**value, "plan": self.plan.to_dict()} if self.checked_only else value

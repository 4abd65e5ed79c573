"""What a change costs facts that the model had learned before: which of them held, and which no longer do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kpatch.evaluate.metrics import Measurement


@dataclass(frozen=True)
class Retention:
    """Earlier facts before and after a change. A fact holds where the model's first choices are its target.

    n  facts measured   held  how many held before   kept  how many of those hold after
    fallen  {id, text, target, before, after} of each that no longer holds, with its probability then and now
    """

    n: int
    held: int
    kept: int
    fallen: tuple[Mapping[str, Any], ...]

    @property
    def rate(self) -> float | None:
        """kept / held, 0 to 1; None where no fact held before."""
        return self.kept / self.held if self.held else None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        own = {"n": self.n, "held": self.held, "kept": self.kept, "rate": self.rate}
        return {**own, "fallen": [dict(fact) for fact in self.fallen]}


def retention(before: Measurement, after: Measurement) -> Retention:
    """Compare two measurements of the same facts. Raises ValueError where they are of different facts."""
    held = kept = 0
    fallen = []
    for old, new in zip(before.facts, after.facts, strict=True):
        if (old["text"], old["target"]) != (new["text"], new["target"]):
            raise ValueError(f"Measurements of different facts: {old['text']!r} and {new['text']!r}")
        if not old.get("accurate"):
            continue
        held += 1
        if new.get("accurate"):
            kept += 1
        else:
            about = {key: old[key] for key in ("id", "text", "target")}
            fallen.append({**about, "before": old["probability"], "after": new["probability"]})
    return Retention(len(before.facts), held, kept, _by_loss(fallen))


def _by_loss(fallen: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The facts that lost most come first."""
    return tuple(sorted(fallen, key=lambda fact: fact["after"] - fact["before"]))

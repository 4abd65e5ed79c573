"""Thresholds: what was measured, against what the user asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpatch.cli.output import percent
from kpatch.errors import BadInput

Thresholds = Mapping[str, float | None]  # by measure; None: not asked for

# What a fact file must have so that a measure exists
_NEEDS = {
    "generalization": "paraphrases",
    "specificity": "neighbors",
    "score": "paraphrases, neighbors and old answers",
    "consistency": "references",
}


def rates_of(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The rates that thresholds are held against: success, or accuracy where no fact says what it `was`."""
    rates = {}
    for name in ("efficacy", "generalization", "specificity"):
        part = metrics.get(name) or {"success": None, "accuracy": None}
        rates[name] = part["accuracy"] if part["success"] is None else part["success"]
    return rates


def shortfalls(found: Mapping[str, float | None], least: Thresholds) -> list[str]:
    """Each measure that is below its threshold, in words. Raises BadInput for one that was not measured."""
    lines = []
    for name, wanted in least.items():
        if wanted is None:
            continue
        value = found.get(name)
        if value is None:
            raise BadInput(
                f"`min_{name}` cannot be checked: the facts have no {_NEEDS.get(name, 'such measure')}",
                hint="add some to the fact file",
            )
        if value < wanted:
            expected, shown = (
                (f"{wanted:g} bits", f"{value:.3f}") if name == "fluency" else (percent(wanted), percent(value))
            )
            lines.append(f"{name.replace('_', ' ')}: expected at least {expected}, found {shown}")
    return lines

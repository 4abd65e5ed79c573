"""What a patch did, as tables: each fact's answer before and after, then the rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kpatch.cli.output import Cell, Output, percent

_RATES = ("efficacy", "generalization", "specificity")
_MEANING = {
    "efficacy": "the edited prompts",
    "generalization": "their paraphrases",
    "specificity": "neighbors, which must stay",
}


def show_facts(out: Output, facts: Sequence[Mapping[str, Any]], limit: int | None = None) -> None:
    """One row per fact: prompt, target, the greedy answer and the target's probability before and after."""
    rows: list[list[Cell]] = []
    for fact in facts[:limit]:
        before, after = fact.get("before") or {}, fact.get("after") or {}
        rows.append(
            [
                fact.get("text"),
                fact.get("target"),
                before.get("answer"),
                percent(before.get("probability")),
                after.get("answer"),
                percent(after.get("probability")),
            ]
        )
    out.table(("Prompt", "Target", "Before", "P(target)", "After", "P(target)"), rows, right=(3, 5))
    if limit is not None and len(facts) > limit:
        out.line(f"… and {len(facts) - limit} more facts (-v shows all)")


def show_metrics(out: Output, effect: Mapping[str, Any]) -> None:
    """Rates before and after: of beating the old answer, and of being the model's first choice."""
    before, after = effect.get("before") or {}, effect.get("after") or {}
    rows: list[list[Cell]] = []
    for name in _RATES:
        old, new = before.get(name) or {}, after.get(name)
        if new:
            first = f"{percent(old.get('accuracy'))} → {percent(new['accuracy'])}"
            success: list[Cell] = [percent(old.get("success")), percent(new["success"])]
            rows.append([name.capitalize(), _MEANING[name], new["n"], *success, first])
    if after.get("score") is not None:
        rows.append(["Score", "harmonic mean", None, percent(before.get("score")), percent(after["score"]), None])
    out.table(("Rate", "Over", "n", "Before", "After", "As first choice"), rows, right=(2, 3, 4, 5))


def rate(metrics: Mapping[str, Any], name: str) -> float | None:
    """The rate that a threshold is held against: success, or accuracy where no fact says what it `was`."""
    part = metrics.get(name)
    if not part:
        return None
    success: float | None = part["success"]
    accuracy: float = part["accuracy"]
    return accuracy if success is None else success

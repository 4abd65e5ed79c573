"""What a trace comes to, in words.

What a picture shows, whichever way it is drawn: rows with their labels, one colour scale for all heatmaps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kpatch.trace.cells import CURVES, KINDS
from kpatch.trace.run import FactTrace
from kpatch.trace.summary import DRAWS, ROLES, Summary


def told(summary: Summary) -> str:
    """R, how clear it is and how stable."""
    found, stable = summary.range, summary.stability
    if found is None:
        return (
            "No layers to edit stand out: at the last subject token, severing MLPs takes less than a tenth of the"
            " total effect away"
        )
    text = (
        f"R = {span(found.first, found.last)} ({found.width} of {summary.traces.layers} layers): severing MLPs takes"
        f" {100 * found.gap:.1f} points of probability away"
    )
    if found.margin is not None:
        text += f", {100 * found.margin:.1f} more than in the best range as wide beside it"
    if stable is None:
        return f"{text}; from one fact only, so trace more before editing by it"
    return f"{text}; {100 * stable.same:.0f} % of {DRAWS:,} resamples of the facts give the same R"


def span(first: int, last: int) -> str:
    """Layers as people write them."""
    return str(first) if first == last else f"{first}–{last}"


CURVE_NAMES = {"plain": "plain", "mlp": "MLP severed", "attn": "attention severed"}


@dataclass(frozen=True)
class Panel:
    """One heatmap: values [row][layer], from `low` (white) to `high`; `quantity` says what they are."""

    kind: str
    title: str
    rows: tuple[str, ...]
    values: list[list[float]]
    low: float
    high: float
    quantity: str


def title_of(kind: str, window: int) -> str:
    if kind == "state":
        return "Restoring a state"
    return f"Restoring {window} {'MLP' if kind == 'mlp' else 'attention'} output{'s' if window > 1 else ''}"


def panels(summary: Summary) -> list[Panel]:
    """The heatmaps of a trace: by token for a single fact, else by role. None after a quick run."""
    facts, window = summary.traces.facts, summary.traces.settings.window
    if len(facts) == 1:
        return fact_panels(facts[0], window)
    shown = [role for role, count in enumerate(summary.role_counts) if count]
    high = _top([averages.mean[shown] for averages in summary.effects.values()], 0.0)
    return [
        Panel(
            kind,
            title_of(kind, window),
            tuple(ROLES[role] for role in shown),
            summary.effects[kind].mean[shown].tolist(),
            0.0,
            high,
            "average indirect effect",
        )
        for kind in KINDS
        if kind in summary.effects
    ]


def fact_panels(fact: FactTrace, window: int) -> list[Panel]:
    """The heatmaps of one fact: P[answer] by token, from its corrupted to its clean value; the subject is starred."""
    labels = tuple(
        f"{label(token)}{'*' * (fact.first <= place <= fact.last)}" for place, token in enumerate(fact.tokens)
    )
    high = _top([*fact.grids.values()], fact.clean)
    quantity = f"P({fact.answer})"
    return [
        Panel(kind, title_of(kind, window), labels, fact.grids[kind].tolist(), fact.corrupted, high, quantity)
        for kind in KINDS
        if kind in fact.grids
    ]


def curves_panel(summary: Summary) -> Panel:
    """The three curves at the subject's last token as rows."""
    values = summary.curves.mean
    rows = tuple(CURVE_NAMES[name] for name in CURVES)
    title = "Last subject token, paths severed"
    return Panel("state", title, rows, values.tolist(), 0.0, _top([values], 0.0), "average indirect effect")


def label(token: str, most: int = 16) -> str:
    """A token as a label: no space in front, what cannot be seen made visible, not too long."""
    text = token.strip() or token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _top(grids: list[Tensor], least: float) -> float:
    found = [float(grid.nan_to_num(float("-inf")).max()) for grid in grids if grid.numel()]
    return max([least, 1e-6, *found])

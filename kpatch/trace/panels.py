"""What all reports of a trace share: R in words, heatmaps and curves with their rows and scale, labels, colours."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kpatch.trace.cells import CURVES, KINDS
from kpatch.trace.run import FactTrace
from kpatch.trace.summary import DRAWS, ROLES, Summary


def describe_range(summary: Summary) -> str:
    """R, how clear it is and how stable."""
    found, stable = summary.range, summary.stability
    if found is None:
        return (
            "No layers to edit stand out: at the last subject token, severing MLPs takes less than a tenth of the"
            " total effect away"
        )
    layers = format_layers(found.first, found.last)
    text = (
        f"R = {layers} ({found.width} of {summary.traces.layers} layers): severing MLPs takes"
        f" {100 * found.gap:.1f} points of probability away"
    )
    if found.margin is not None:
        text += f", {100 * found.margin:.1f} more than in the best range as wide beside it"
    if stable is None:
        return f"{text}; from one fact only, so trace more before editing by it"
    return f"{text}; {100 * stable.same:.0f} % of {DRAWS:,} resamples of the facts give the same R"


def format_layers(first: int, last: int) -> str:
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


# Colours of the three kinds, as in the paper: purple for states, green for MLPs, red for attention

Color = tuple[int, int, int]

_WHITE: Color = (255, 255, 255)
_DEEP: dict[str, Color] = {"state": (84, 39, 143), "mlp": (0, 109, 44), "attn": (165, 15, 21)}
_DARK: Color = (28, 28, 34)
_BRIGHT: dict[str, tuple[Color, Color]] = {
    "state": ((129, 87, 214), (236, 226, 255)),
    "mlp": ((38, 150, 84), (222, 250, 228)),
    "attn": ((214, 69, 65), (255, 228, 222)),
}


def on_white(kind: str, share: float) -> Color:
    """White for 0 to the kind's deep colour for 1."""
    return _mix(_WHITE, _DEEP[kind], _within(share))


def on_dark(kind: str, share: float) -> Color:
    """Nearly black for 0, over the kind's colour, to nearly white for 1: legible on any terminal."""
    share = _within(share)
    middle, top = _BRIGHT[kind]
    return _mix(_DARK, middle, 2 * share) if share < 0.5 else _mix(middle, top, 2 * share - 1)


def hex_of(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def dark(color: Color) -> bool:
    """True where white text reads better than black."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 140


def _within(share: float) -> float:
    return min(1.0, max(0.0, share)) if share == share else 0.0  # NaN is nothing


def _mix(a: Color, b: Color, share: float) -> Color:
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue

"""Pictures like the papers' figures, PNG and SVG. Needs matplotlib (the extra `plot`), imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kpatch.cache import write_error
from kpatch.memories.predictions import KINDS
from kpatch.memories.removal import REMOVED
from kpatch.memories.summary import Summary
from kpatch.memories.words import LOSSES, NAMES
from kpatch.pictures import save, style

COLORS = {"residual": "#54278f", "agreement": "#9e9ac8", "ffn": "#238b45", "composition": "#d9d9d9"}
REMOVED_COLORS = {"first": "#238b45", "last": "#a50f15", "other": "#54278f"}
# Axes without a box, a small legend without a frame
_PLAIN = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8}
_LINE, _SECOND, _GREY = "#54278f", "#238b45", "#888888"


def draw(summary: Summary, folder: Path) -> list[Path]:
    """Write memories.png and .svg (keys and values) and predictions.png and .svg into `folder`; the files written.

    The folder is made if need be. Raises BadInput without matplotlib, KpatchError where it cannot be written.
    """
    with style(_PLAIN):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, folder) from error
        return [
            *save(_memories(summary), folder, "memories"),
            *save(_predictions(summary), folder, "predictions"),
        ]


def _memories(summary: Summary) -> Any:
    """Keys and values: what triggers share, what removing tokens does, and whether values answer to their keys."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(12, 6.4))
    axes = figure.subplots(2, 3)
    layers = [one.layer for one in summary.layers]

    axis = _axis(axes[0][0], "A unit's triggers that end in one token", "% of 25 triggers, mean over units")
    axis.plot(layers, _percents([one.same_last for one in summary.layers]), color=_LINE, marker=".")
    axis.set_ylim(0, None)

    axis = _axis(axes[0][1], "A trigger loses a token", "change of the coefficient, %")
    tried = False
    for which in REMOVED:
        pairs = [(one.layer, one.removal[which]) for one in summary.layers]
        spots = [(layer, 100 * change) for layer, change in pairs if change is not None]
        if spots:
            tried = True
            axis.plot(
                *zip(*spots, strict=True),
                color=REMOVED_COLORS[which],
                marker=".",
                label=LOSSES[which],
            )
    if tried:
        axis.axhline(0, color=_GREY, linewidth=0.6)
        axis.legend(title=None)

    axis = _axis(axes[0][2], "Memories at work", "% of memories")
    for label, key, color in (
        ("|m| > 0.1 rms", "active", _LINE),
        ("m > 0", "positive", _SECOND),
        ("participation ratio", "effective", "#a50f15"),
    ):
        axis.plot(
            layers, _percents([getattr(one, key) for one in summary.layers]), color=color, marker=".", label=label
        )
    axis.set_ylim(0, 135)  # the legend stands above what can be reached
    axis.set_yticks(range(0, 101, 20))
    axis.legend()

    axis = _axis(axes[1][0], "The value promotes what followed the trigger", "agreement, % of units")
    axis.plot(layers, _percents([one.agreement for one in summary.layers]), color=_LINE, marker=".", label="found")
    chance = _percents([one.chance for one in summary.layers])
    axis.plot(layers, chance, color=_GREY, linestyle="--", label="by chance")
    axis.set_ylim(0, None)
    axis.legend()

    axis = _axis(axes[1][1], "Rank of what followed the trigger", "rank among tokens")
    ranked = [(one.layer, one.rank) for one in summary.layers if one.rank is not None]
    if ranked:
        ranked_layers = [layer for layer, _ in ranked]
        axis.fill_between(
            ranked_layers,
            [rank[0] for _, rank in ranked],
            [rank[2] for _, rank in ranked],
            color=_LINE,
            alpha=0.18,
            linewidth=0,
            label="middle half of units",
        )
        axis.plot(ranked_layers, [rank[1] for _, rank in ranked], color=_LINE, marker=".", label="median")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.legend()

    axis = axes[1][2]
    axis.set_title("Agreement of sure values")
    axis.set_xlabel("probability of the promoted token")
    axis.set_ylabel("agreement, % of units")
    rows = [row for row in summary.by_probability if row[2]]
    bars = axis.bar(range(len(rows)), [100 * (share or 0) for *_, share in rows], color=_LINE, alpha=0.75)
    axis.bar_label(bars, [f"{count:,}" for _, _, count, _ in rows], fontsize=7, padding=1)
    axis.set_xticks(range(len(rows)), [f"{low:g}–{high:g}" for low, high, _, _ in rows])
    axis.tick_params(axis="x", labelsize=6)
    return _titled(figure, summary)


def _predictions(summary: Summary) -> Any:
    """Layers and the residual stream: whose prediction it is, and how it settles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5))
    axes = figure.subplots(1, 3)
    layers = [one.layer for one in summary.layers]

    axis = _axis(axes[0], "The layer's prediction is no memory's", "% of inputs")
    axis.bar(layers, _percents([one.composed for one in summary.layers]), color=_LINE, alpha=0.75)
    axis.set_ylim(0, 100)

    axis = _axis(axes[1], "The residual stream settles", "%")
    agreed = _percents([one.residual for one in summary.layers])
    axis.plot(layers, agreed, color=_LINE, marker=".", label="its first choice is the model's")
    chances = _percents([one.residual_chance for one in summary.layers])
    axis.plot(layers, chances, color=_SECOND, marker=".", label="its probability of the model's choice")
    axis.set_ylim(0, 100)
    axis.legend(loc="upper left")

    axis = _axis(axes[2], "Whose prediction leaves the layer", "% of inputs")
    under = [0.0] * len(layers)
    for kind in KINDS:
        shares = _percents([one.kinds[kind] for one in summary.layers])
        axis.bar(layers, shares, bottom=under, width=0.9, color=COLORS[kind], label=NAMES[kind])
        under = [a + b for a, b in zip(under, shares, strict=True)]
    axis.set_ylim(0, 100)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _titled(figure, summary)


def _axis(axis: Any, title: str, quantity: str) -> Any:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title)
    axis.set_xlabel("layer")
    axis.set_ylabel(quantity)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axis


def _titled(figure: Any, summary: Summary) -> Any:
    memories = summary.memories
    text = f"{memories.model}: {memories.tokens:,} tokens of {memories.corpus}"
    figure.suptitle(text.replace("$", r"\$"), fontsize=10)
    figure.tight_layout()
    return figure


def _percents(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]

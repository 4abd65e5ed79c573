"""Pictures in the paper's form, PNG and SVG. Needs matplotlib (the extra `plot`), imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kpatch.pictures import save, style
from kpatch.trace.cells import CURVES
from kpatch.trace.panels import CURVE_NAMES, Panel, hex_of, on_white, panels
from kpatch.trace.summary import Summary

_MAPS = {"state": "Purples", "mlp": "Greens", "attn": "Reds"}
_BARS = {"plain": "state", "mlp": "mlp", "attn": "attn"}


def draw(summary: Summary, folder: Path) -> list[Path]:
    """Write effects.png and .svg (none after a quick run) and severed.png and .svg; the files written.

    Raises BadInput without matplotlib.
    """
    files = []
    with style():
        shown = panels(summary)
        if shown:
            files += save(_heatmaps(shown, _caption(summary)), folder, "effects")
        files += save(_severed(summary), folder, "severed")
    return files


def _caption(summary: Summary) -> str:
    facts = summary.traces.facts
    if len(facts) == 1:
        fact = facts[0]
        return f"{summary.traces.model}: P({fact.answer}) = {fact.clean:.2f} clean, {fact.corrupted:.2f} corrupted"
    return f"{summary.traces.model}: average indirect effect over {len(facts)} facts"


def _heatmaps(shown: list[Panel], caption: str) -> Any:
    from matplotlib.figure import Figure

    rows, layers = len(shown[0].rows), len(shown[0].values[0])
    figure = Figure(figsize=(1.9 + len(shown) * max(2.6, 0.085 * layers + 0.9), 1.3 + 0.26 * rows))
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, shown, strict=True):
        drawn = axis.imshow(
            panel.values,
            cmap=_MAPS[panel.kind],
            vmin=panel.low,
            vmax=panel.high,
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_title(panel.title)
        axis.set_xlabel("layer" if panel.kind == "state" else "middle layer of the window")
        axis.set_xticks(range(0, layers, _step(layers)))
        axis.set_yticks(range(rows), [_plain(text) for text in panel.rows])
        axis.tick_params(length=2)
        bar = figure.colorbar(drawn, ax=axis, fraction=0.06, pad=0.04)
        bar.ax.tick_params(labelsize=7, length=2)
    figure.suptitle(_plain(caption), fontsize=10)
    figure.tight_layout()
    return figure


def _severed(summary: Summary) -> Any:
    from matplotlib.figure import Figure

    layers = summary.traces.layers
    figure = Figure(figsize=(max(5.5, 1.2 + 0.24 * layers), 3.2))
    axis = figure.subplots()
    found = summary.range
    if found is not None:
        axis.axvspan(found.first - 0.5, found.last + 0.5, color="#f3e9c8", zorder=0)
        axis.text(
            (found.first + found.last) / 2, 1.01, f"R = {found.first}–{found.last}", ha="center", va="bottom",
            transform=axis.get_xaxis_transform(), fontsize=9,
        )  # fmt: skip
    for place, name in enumerate(CURVES):
        mean, low, high = (
            part[place].tolist() for part in (summary.curves.mean, summary.curves.low, summary.curves.high)
        )
        spots = [layer + (place - 1) * 0.27 for layer in range(layers)]
        axis.bar(spots, mean, 0.27, color=hex_of(on_white(_BARS[name], 0.75)), label=CURVE_NAMES[name], zorder=2)
        if len(summary.traces.facts) > 1:
            ends = list(zip(low, mean, high, strict=True))  # a skewed interval may leave out its mean
            reach = [[max(0.0, m - a) for a, m, _ in ends], [max(0.0, b - m) for _, m, b in ends]]
            axis.errorbar(spots, mean, reach, fmt="none", ecolor="#555555", elinewidth=0.6, zorder=3)
    axis.axhline(0, color="#888888", linewidth=0.6)
    axis.set_xlim(-0.8, layers - 0.2)
    axis.set_xticks(range(0, layers, _step(layers, 30)))
    axis.set_xlabel("layer at which the last subject token's state is restored")
    axis.set_ylabel("average indirect effect")
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(f"{_plain(summary.traces.model)}: paths severed, {_count(summary)}", pad=16)
    figure.tight_layout()
    return figure


def _count(summary: Summary) -> str:
    count = len(summary.traces.facts)
    return f"{count} facts, 95 % intervals" if count > 1 else "one fact"


def _step(layers: int, most: int = 8) -> int:
    """Every how many layers a tick stands."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 1000) if layers / step <= most)


def _plain(text: str) -> str:
    """Text that matplotlib shall not read as a formula, nor fail to draw."""
    return text.replace("$", r"\$")

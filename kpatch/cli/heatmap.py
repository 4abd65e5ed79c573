"""Heatmaps in the terminal: a block a cell where colours are shown, a sign from light to dark where they are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpatch.cli.output import Output, clean

if TYPE_CHECKING:
    from rich.text import Text

    from kpatch.trace.panels import Panel

_SIGNS = " .:-=+*#%@"
_MOST_LABEL = 24


def print_heatmap(output: Output, panel: Panel) -> None:
    """One heatmap: its title, a line a row with the layers from left to right, the scale of its colours."""
    from rich.cells import cell_len
    from rich.text import Text

    coloured, columns = output.screen()
    layers = len(panel.values[0])
    names = [clean(name)[:_MOST_LABEL] for name in panel.rows]
    margin = max(map(cell_len, names), default=0) + 1
    wide = 2 if margin + 2 * layers <= columns else 1
    lines = [Text(f"{clean(panel.title)}: {clean(panel.quantity)}, {_percent(panel.low)} to {_percent(panel.high)} %")]
    for name, values in zip(names, panel.values, strict=True):
        line = Text(" " * (margin - 1 - cell_len(name)) + name + " ")
        for value in values:
            _cell(line, panel, value, wide, coloured)
        lines.append(line)
    lines.append(Text(" " * margin + _ruler(layers, wide) + "  layer"))
    output.drawing(lines)


def _cell(line: Text, panel: Panel, value: float, wide: int, coloured: bool) -> None:
    from kpatch.trace.panels import hex_of, on_dark

    share = (value - panel.low) / max(panel.high - panel.low, 1e-12)
    if coloured:
        line.append(" " * wide, f"on {hex_of(on_dark(panel.kind, share))}")
    else:
        line.append(_SIGNS[round((len(_SIGNS) - 1) * min(1.0, max(0.0, share)))] * wide)


def _ruler(layers: int, wide: int) -> str:
    """Every fifth layer's number under its column."""
    marks = ""
    for layer in range(0, layers, 5 if wide == 2 or layers <= 100 else 10):
        marks = marks.ljust(layer * wide) + str(layer)
    return marks


def _percent(value: float) -> str:
    return f"{100 * value:.0f}" if value >= 0.1 or value == 0 else f"{100 * value:.1f}"

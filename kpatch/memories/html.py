"""One HTML file of a model's memories: curves by layer as SVG, every unit that was looked at. No script in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from kpatch.cache import atomic_write_text
from kpatch.memories.predictions import KINDS
from kpatch.memories.run import Side, UnitMemory
from kpatch.memories.summary import LayerFigures, Summary
from kpatch.memories.words import LOSSES, NAMES, ending, listed, shown

_TRIGGERS = 5
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c22;
  background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } h3 { font-size: 1rem; margin: 1.2rem 0 .2rem }
figure { display: inline-block; margin: 0 1rem 1rem 0 } figcaption { font-size: 13px }
svg text { font-size: 11px; fill: #5a5a66 } .axis { stroke: #c8c8d0 } .note { color: #5a5a66 }
table { border-collapse: collapse } td, th { padding: .12rem .6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e4e4ea } th { font-weight: 600 } .n { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums } b { background: #ece6fb; font-weight: 600 } .key { padding-left: .6em }
"""
_COLORS = ("#54278f", "#238b45", "#a50f15", "#888888")
_WIDTH, _HEIGHT, _LEFT, _TOP = 340, 170, 40, 8

Curves = Mapping[str, Sequence[float | None]]


def write_html(summary: Summary, path: Path) -> Path:
    """Write the page. Raises KpatchError where it cannot be written."""
    atomic_write_text(path, page(summary))
    return path


def page(summary: Summary) -> str:
    """The page's HTML; every text in it is escaped."""
    memories, (agree, of) = summary.memories, summary.certain
    title = escape(f"Memories of {memories.model}")
    text = f"{memories.tokens:,} tokens of {memories.corpus}, in rows of {memories.row}"
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>{title}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1><p>{escape(text)}.</p>",
            "<h2>Keys and values</h2>",
            *(_chart(summary.layers, *chart) for chart in _keys_and_values(summary.layers)),
            f"<p class=note>Of the {of} values surest of a token, {agree} have it behind one of their triggers.</p>",
            "<h2>Predictions</h2>",
            *(_chart(summary.layers, *chart) for chart in _predictions(summary.layers)),
            "<h2>Units</h2>",
            *(_unit(unit) for unit in memories.units),
            "</body></html>\n",
        )
    )


def _keys_and_values(layers: Sequence[LayerFigures]) -> list[tuple[str, Curves]]:
    return [
        ("Triggers of a unit that end in one token, %", {"": [_percent(one.same_last) for one in layers]}),
        (
            "Change of the coefficient when a trigger loses a token, %",
            {name: [_percent(one.removal[which]) for one in layers] for which, name in LOSSES.items()},
        ),
        (
            "The value promotes the token that followed the strongest trigger, % of units",
            {
                "found": [_percent(one.agreement) for one in layers],
                "by chance": [_percent(one.chance) for one in layers],
            },
        ),
        (
            "Rank of that token in what the value promotes, log₁₀",
            {"median": [None if one.rank is None else math.log10(one.rank[1]) for one in layers]},
        ),
        (
            "Memories at work, %",
            {
                "|m| > 0.1 rms": [_percent(one.active) for one in layers],
                "m > 0": [_percent(one.positive) for one in layers],
                "participation ratio": [_percent(one.effective) for one in layers],
            },
        ),
    ]


def _predictions(layers: Sequence[LayerFigures]) -> list[tuple[str, Curves]]:
    return [
        (
            "The layer's prediction is no single memory's, % of inputs",
            {"": [_percent(one.composed) for one in layers]},
        ),
        (
            "The residual stream before the MLP, %",
            {
                "first choice is the model's": [_percent(one.residual) for one in layers],
                "probability of the model's choice": [_percent(one.residual_chance) for one in layers],
            },
        ),
        (
            "Whose prediction leaves the layer, % of inputs",
            {NAMES[kind]: [_percent(one.kinds[kind]) for one in layers] for kind in KINDS},
        ),
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _chart(layers: Sequence[LayerFigures], title: str, curves: Curves) -> str:
    """Curves over layers as one SVG; nothing where there is nothing to draw."""
    values = [value for curve in curves.values() for value in curve if value is not None]
    if not values:
        return ""
    low, high = min(0.0, *values), max(0.0, *values) or 1.0
    last = max(1, len(layers) - 1)

    def across(place: int) -> float:
        return _LEFT + _WIDTH * place / last

    def down(value: float) -> float:
        return _TOP + _HEIGHT * (high - value) / (high - low)

    parts = [f'<figure><svg viewBox="0 0 {_LEFT + _WIDTH + 12} {_TOP + _HEIGHT + 22}" width="{_LEFT + _WIDTH + 12}"']
    parts.append(f' role="img" aria-label="{escape(title)}">')
    for value in sorted({low, 0.0, high, (low + high) / 2}):
        y = down(value)
        parts.append(f'<line class="axis" x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _WIDTH}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for place in range(0, len(layers), max(1, len(layers) // 6)):
        label = layers[place].layer
        parts.append(f'<text x="{across(place):.1f}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{label}</text>')
    for color, curve in zip(_COLORS, curves.values(), strict=False):
        spots = [f"{across(place):.1f},{down(value):.1f}" for place, value in enumerate(curve) if value is not None]
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{" ".join(spots)}"/>')
    keys = "".join(
        f'<span class=key style="color:{color}">■ {escape(name)}</span>'
        for color, name in zip(_COLORS, curves, strict=False)
        if name
    )
    return f"{''.join(parts)}</svg><figcaption>{escape(title)} {keys}</figcaption></figure>"


def _unit(one: UnitMemory) -> str:
    return f"<h3>{one.unit}</h3>" + "".join(_side(side) for side in one.sides)


def _side(side: Side) -> str:
    rows = []
    for trigger in side.triggers[:_TRIGGERS]:
        text = ending(trigger.text, 110)
        last = trigger.last.translate({10: "⏎", 9: "⇥"})
        head = text[: -len(last)] if last and text.endswith(last) else text
        mark = f"<b>{escape(last)}</b>" if head != text else ""
        changes = "".join(
            f"<td class=n>{_change(None if trigger.removal is None else trigger.removal.change(which))}</td>"
            for which in ("first", "last")
        )
        rows.append(
            f"<tr><td class=n>{trigger.coefficient:.3g}</td>{changes}<td>{escape(head)}{mark}</td>"
            f"<td>{escape(shown(trigger.following))}</td></tr>"
        )
    sign = "v" if side.sign > 0 else "−v"
    rank = "" if side.rank is None else f"; what followed the first trigger has rank {side.rank:,}"
    return (
        f"<p>{sign} promotes {escape(listed(side.promotes, 10))}{rank}</p>"
        "<table><thead><tr><th>m</th><th>− first</th><th>− last</th><th>Trigger</th><th>Next</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _change(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.0f} %"

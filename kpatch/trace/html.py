"""One HTML file with everything a trace found: no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import torch

from kpatch.trace.cells import CURVES
from kpatch.trace.panels import CURVE_NAMES, Panel, dark, describe_range, fact_panels, hex_of, on_white, panels
from kpatch.trace.run import FactTrace
from kpatch.trace.summary import Summary

_LEVELS = 32  # shades of a heatmap; a class each keeps a hundred facts' cells short
_CURVE_KINDS = {"plain": "state", "mlp": "mlp", "attn": "attn"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c22;
  background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } h3 { font-size: 1rem; margin-bottom: .3rem }
table.facts, table.about { border-collapse: collapse } table.facts td, table.facts th, table.about td
  { padding: .15rem .6rem; text-align: left; border-bottom: 1px solid #e4e4ea }
table.facts th { white-space: nowrap }
td.number { text-align: right; font-variant-numeric: tabular-nums }
table.heat { border-collapse: collapse; font-size: 10px } table.heat th { font-weight: normal; padding: 0 .4rem 0 0;
  text-align: right; white-space: nowrap; font-size: 12px } table.heat thead th { padding: 0; text-align: center;
  color: #70707c; font-size: 10px } table.heat td { min-width: 1.65em; height: 1.8em; text-align: center;
  border: 1px solid #fff }
table.small td { min-width: .9em; height: 1.1em }
.maps { overflow-x: auto } summary { cursor: pointer } .note { color: #5a5a66 }
"""


def report_html(summary: Summary) -> str:
    """The report as text of an HTML file."""
    traces = summary.traces
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>Causal trace of {escape(traces.model)}</title><style>{_STYLE}{_shades()}</style></head><body>",
        f"<h1>Where {escape(traces.model)} keeps its facts</h1>",
        _about(summary),
        "<h2>Layers to edit</h2>",
        f"<p>{escape(describe_range(summary))}</p>",
        _bars(summary),
    ]
    shown = panels(summary)
    if shown:
        parts.append(f"<h2>What restoring brings back</h2><p class=note>{escape(_scale(shown[0]))}</p>")
        parts += [_heat(panel, numbers=True) for panel in shown]
    parts.append("<h2>Facts</h2>")
    parts.append(_facts(summary))
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _about(summary: Summary) -> str:
    traces, total = summary.traces, summary.total_effect
    rows = [
        ("Facts", f"{len(traces.facts):,} known of {traces.tried:,} tried"),
        ("P(answer) clean", f"{float(summary.clean.mean):.3f}"),
        ("P(answer) corrupted", f"{float(summary.corrupted.mean):.3f}"),
        ("Total effect", f"{float(total.mean):.3f}" + _between(float(total.low), float(total.high))),
        (
            "Noise",
            f"{traces.settings.noise:g} σ, σ = {traces.sigma:.4g} of the subjects' embeddings;"
            f" {traces.settings.samples} samples, seed {traces.settings.seed}",
        ),
    ]
    cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table class=about>{cells}</table>"


def _between(low: float, high: float) -> str:
    return f" (95 %: {low:.3f} to {high:.3f})" if low == low else ""


def _scale(panel: Panel) -> str:
    return f"Colour and numbers: {panel.quantity} in percent, from {100 * panel.low:.1f} to {100 * panel.high:.1f}."


def _shades() -> str:
    rules = []
    for kind in ("state", "mlp", "attn"):
        for level in range(_LEVELS + 1):
            color = on_white(kind, level / _LEVELS)
            text = "; color: #fff" if dark(color) else ""
            rules.append(f".{kind[0]}{level} {{ background: {hex_of(color)}{text} }}")
    return "\n".join(rules)


def _heat(panel: Panel, numbers: bool) -> str:
    layers = len(panel.values[0])
    head = "".join(f"<th>{layer if layer % (1 if numbers else 5) == 0 else ''}</th>" for layer in range(layers))
    rows = []
    for name, values in zip(panel.rows, panel.values, strict=True):
        cells = "".join(_cell(panel, value, numbers) for value in values)
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    size = "heat" if numbers else "heat small"
    return (
        f"<h3>{escape(panel.title)}</h3><div class=maps><table class='{size}'><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(panel: Panel, value: float, numbers: bool) -> str:
    share = (value - panel.low) / max(panel.high - panel.low, 1e-12)
    level = round(_LEVELS * min(1.0, max(0.0, share)))
    return f"<td class={panel.kind[0]}{level}>{_points(value) if numbers else ''}</td>"


def _points(value: float) -> str:
    return f"{round(100 * value)}" if value == value else ""


def _bars(summary: Summary) -> str:
    """The severed bar chart as SVG."""
    layers, mean = summary.traces.layers, summary.curves.mean
    low, high = summary.curves.low, summary.curves.high
    ends = torch.stack([mean, low, high]).nan_to_num(0.0)
    most = max(0.01, float(ends.max()))
    least = float(ends.min())
    ticks = _ticks(least if least < -0.02 * most else 0.0, most)
    bottom, top = ticks[0], ticks[-1]
    step, height, left, above = 24, 220, 46, 24
    width = left + step * layers + 10

    def y(value: float) -> float:
        return above + height * (top - value) / (top - bottom)

    out = [
        f'<svg viewBox="0 0 {width} {above + height + 44}" width="{width}" height="{above + height + 44}" role="img"'
        ' font-size="11" font-family="system-ui, sans-serif">'
    ]
    found = summary.range
    if found is not None:
        out.append(
            f'<rect x="{left + step * found.first}" y="{above}" width="{step * found.width}" height="{height}"'
            f' fill="#f3e9c8"/><text x="{left + step * (found.first + found.width / 2)}" y="{above - 6}"'
            f' text-anchor="middle">R = {found.first}–{found.last}</text>'
        )
    for value in ticks:
        out.append(
            f'<line x1="{left}" x2="{width - 10}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#e4e4ea"/>'
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2g}</text>'
        )
    for place, name in enumerate(CURVES):
        color = hex_of(on_white(_CURVE_KINDS[name], 0.75))
        for layer in range(layers):
            value, x = float(mean[place, layer]), left + step * layer + 2 + 7 * place
            begin, end = min(y(value), y(0)), max(y(value), y(0))
            out.append(
                f'<rect x="{x}" y="{begin:.1f}" width="6" height="{end - begin:.1f}" fill="{color}">'
                f"<title>layer {layer}, {CURVE_NAMES[name]}: {value:.3f}"
                f"{_between(float(low[place, layer]), float(high[place, layer]))}</title></rect>"
            )
            a, b = float(low[place, layer]), float(high[place, layer])
            if a == a:
                out.append(f'<path d="M{x + 3} {y(a):.1f}V{y(b):.1f}" stroke="#555" stroke-width=".8"/>')
        out.append(
            f'<rect x="{left + 150 * place}" y="{above + height + 28}" width="10" height="10" fill="{color}"/>'
            f'<text x="{left + 15 + 150 * place}" y="{above + height + 37}">{CURVE_NAMES[name]}</text>'
        )
    for layer in range(layers):
        out.append(
            f'<text x="{left + step * (layer + 0.5)}" y="{above + height + 16}" text-anchor="middle">{layer}</text>'
        )
    out.append("</svg>")
    caption = "Average indirect effect of restoring the state of the subject's last token at each layer."
    return f"<div class=maps>{''.join(out)}</div><p class=note>{escape(caption)}</p>"


def _ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers that reach from below `low`, which is 0 or less, to above `high`."""
    steps = (mantissa * 10.0**power for power in range(-6, 2) for mantissa in (1, 2, 5))
    step = next(step for step in steps if (high - low) / step <= 6)
    return [round(step * number, 9) for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _facts(summary: Summary) -> str:
    head = "<tr><th>Prompt</th><th>Answer</th><th>P clean</th><th>P corrupted</th></tr>"
    rows = "".join(
        f"<tr><td>{escape(fact.fact.text())}</td><td>{escape(fact.answer)}</td>"
        f"<td class=number>{fact.clean:.3f}</td><td class=number>{fact.corrupted:.3f}</td></tr>"
        for fact in summary.traces.facts
    )
    table = f"<table class=facts>{head}{rows}</table>"
    if len(summary.traces.facts) == 1:
        return table
    return table + "".join(_fact(fact, summary.traces.settings.window) for fact in summary.traces.facts if fact.grids)


def _fact(fact: FactTrace, window: int) -> str:
    shown: Sequence[Panel] = fact_panels(fact, window)
    maps = "".join(_heat(panel, numbers=False) for panel in shown)
    title = f"{fact.fact.text()} → {fact.answer}"
    return f"<details><summary>{escape(title)}</summary>{maps}</details>"

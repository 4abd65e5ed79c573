"""One self-contained HTML page of an evaluation: a table, plots as SVG, every fact. No script, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kpatch.cache import atomic_write_text
from kpatch.cli.asked import follow_table, form_table
from kpatch.cli.output import percent
from kpatch.cli.tables import RATES, failures, format_number

_STYLE = """
:root { color-scheme: light dark; --old: #8a8f98; --new: #2f6fde; --bad: #c2410c; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); }
th { text-align: left; } .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bad { color: var(--bad); } svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font-size: 12px; }
.key { display: inline-block; width: .8em; height: .8em; margin-left: 1em; }
.key.old { background: var(--old); } .key.new { background: var(--new); }
.old { fill: var(--old); } .new { fill: var(--new); } .axis { stroke: var(--line); } .range { stroke: currentColor; }
"""
_KEY = '<p><span class="key old"></span> without patches <span class="key new"></span> with them</p>\n'
_DECADES = 6  # of the plot of probabilities; smaller ones stand on its edge


def write_page(
    path: Path,
    name: str,
    found: Mapping[str, Any],
    facts: Sequence[Mapping[str, Any]],
    before: Sequence[Mapping[str, Any]],
) -> None:
    """Write the page of what `eval` found; `before` are the facts in the model without its patches, or none."""
    atomic_write_text(path, page(name, found, facts, before))


def page(
    name: str, found: Mapping[str, Any], facts: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]
) -> str:
    """The page's HTML; every text in it is escaped."""
    on = f" with {', '.join(found['patches'])}" if found["patches"] else ""
    title = escape(f"{name} in {found['model']}{on}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        f"<h1>{title}</h1>\n<p>{found['evaluated']:,} facts, with 95 % intervals.</p>\n"
        f"{_rates(found)}\n{_asked(found)}<h2>Success, %</h2>\n"
        f"{_KEY if before else ''}{_bars(found)}\n<h2>Every fact</h2>\n"
        f"<p>P of the target against P of the old answer, per token. Above the line the target wins.</p>\n"
        f"{_KEY if before else ''}{_scatter(facts, before)}\n{_facts(facts, before)}\n</body></html>\n"
    )


def _rates(found: Mapping[str, Any]) -> str:
    metrics, old = found["metrics"], found["unpatched"] or {}
    rows = []
    for kind, over in RATES.items():
        part, was = metrics[kind], old.get(kind) or {}
        if part is not None:
            for label, key, pair in (
                (f"{kind.capitalize()}: {over}", "success", "interval"),
                ("… as first choice", "accuracy", "accuracy_interval"),
                ("… written freely", "free_running", "free_running_interval"),
            ):
                if key in part:
                    rows.append((label, part["n"], percent(was.get(key)), percent(part[key]), _pair(part[pair], 100)))
    rows.append(
        ("Score", "", percent(old.get("score")), percent(metrics["score"]), _pair(metrics["score_interval"], 100))
    )
    for key, label, times, shown in (
        ("fluency", "Fluency, bits", 1, format_number),
        ("repetition", "Repetition", 100, percent),
        ("consistency", "Consistency", 1, format_number),
    ):
        if found[key] is not None:
            between = _pair(found.get(f"{key}_interval"), times)
            rows.append((label, "", shown(old.get(key)), shown(found[key]), between))
    if found["perplexity"]:
        read = found["perplexity"]
        rows.append(("Perplexity", "", format_number(read["before"]), format_number(read["after"]), ""))
    return _table(("Measure", "n", "Without", "With", "95 %"), rows, numbers=(1, 2, 3, 4))


def _asked(found: Mapping[str, Any]) -> str:
    """What the model answers by itself in several forms, and what follows from the facts, where these were asked."""
    parts = []
    for title, table in (("Asked in several forms", form_table(found)), ("What follows", follow_table(found))):
        headers, rows, numbers = table
        if rows:
            shown = [["" if cell is None else cell for cell in row] for row in rows]
            parts.append(f"<h2>{title}</h2>\n{_table(headers, shown, numbers)}\n")
    return "".join(parts)


def _bars(found: Mapping[str, Any]) -> str:
    """Success before and after as bars with whiskers."""
    old = found["unpatched"] or {}
    parts = [f'<svg viewBox="0 0 640 {40 * len(RATES) + 30}" width="640" role="img" aria-label="Success rates">']
    for tenth in range(0, 11, 2):
        x = 140 + 45 * tenth
        parts.append(f'<line class="axis" x1="{x}" y1="0" x2="{x}" y2="{40 * len(RATES)}"/>')
        parts.append(f'<text x="{x}" y="{40 * len(RATES) + 18}" text-anchor="middle">{10 * tenth}</text>')
    for row, kind in enumerate(RATES):
        parts.append(f'<text x="130" y="{40 * row + 24}" text-anchor="end">{kind}</text>')
        for source, style, y in ((old, "old", 40 * row + 6), (found["metrics"], "new", 40 * row + 20)):
            part = source.get(kind)
            if part and part["success"] is not None:
                parts.append(
                    f'<rect class="{style}" x="140" y="{y}" width="{450 * part["success"]:.1f}" height="12"/>'
                )
                if part.get("interval"):
                    low, high = (140 + 450 * end for end in part["interval"])
                    parts.append(f'<line class="range" x1="{low:.1f}" y1="{y + 6}" x2="{high:.1f}" y2="{y + 6}"/>')
    return "".join(parts) + "</svg>"


def _scatter(facts: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> str:
    """P(was) to the right, P(target) upwards, both by their logarithms; a point a fact."""
    parts = ['<svg viewBox="0 0 380 370" width="380" role="img" aria-label="P of target and old answer">']
    parts.append('<rect x="50" y="20" width="300" height="300" fill="none" class="axis"/>')
    parts.append('<line class="axis" x1="50" y1="320" x2="350" y2="20"/>')
    parts.append('<text x="200" y="360" text-anchor="middle">P(was)</text><text x="4" y="12">P(target)</text>')
    for tenth in range(0, _DECADES + 1, 2):
        at, name = 300 * tenth / _DECADES, f"{10.0 ** (tenth - _DECADES):g}"
        parts.append(f'<text x="{50 + at:g}" y="338" text-anchor="middle">{name}</text>')
        parts.append(f'<text x="44" y="{324 - at:g}" text-anchor="end">{name}</text>')
    for some, style in ((before, "old"), (facts, "new")):
        for fact in some:
            new, old = fact.get("probability"), fact.get("was_probability")
            if new is not None and old is not None:
                place = f'cx="{50 + 300 * _height(old):.1f}" cy="{320 - 300 * _height(new):.1f}"'
                about = escape(f"{fact['text']} {fact['target']}")
                parts.append(
                    f'<circle class="{style}" fill-opacity=".6" r="3" {place}><title>{about}</title></circle>'
                )
    return "".join(parts) + "</svg>"


def _height(probability: float) -> float:
    """Where a probability stands on an axis of the plot, from 0 to 1."""
    return max(0.0, 1 + math.log10(max(probability, 1e-300)) / _DECADES)


def _facts(facts: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            fact["text"],
            fact["target"],
            percent(fact.get("probability")),
            percent(fact.get("was_probability")),
            fact.get("answer") or "",
            "; ".join(failures(fact, before[number] if before else None)),
        )
        for number, fact in enumerate(facts)
    ]
    headers = ("Prompt", "Target", "P(target)", "P(was)", "Answer", "Wrong")
    return _table(headers, rows, numbers=(2, 3), bad=5)


def _table(
    headers: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int], bad: int | None = None
) -> str:
    def cell(place: int, value: Any, tag: str) -> str:
        style = "n" if place in numbers else "bad" if place == bad and tag == "td" else ""
        return f"<{tag}{f' class={style}' if style else ''}>{escape(str(value))}</{tag}>"

    head = "".join(cell(place, header, "th") for place, header in enumerate(headers))
    body = "".join(
        f"<tr>{''.join(cell(place, value, 'td') for place, value in enumerate(row))}</tr>\n" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _pair(pair: Sequence[float] | None, times: float) -> str:
    digits = 1 if times == 100 else 3
    return "" if pair is None else f"{times * pair[0]:.{digits}f} – {times * pair[1]:.{digits}f}"

"""What `eval` found, as tables: rates with their intervals, and the facts that failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kpatch.cli.output import Cell, Output, percent

KINDS = {
    "efficacy": "the edited prompts",
    "generalization": "their paraphrases",
    "specificity": "neighbors, which must stay",
}


def show(out: Output, found: Mapping[str, Any], facts: Sequence[Mapping[str, Any]]) -> None:
    """The rates of one model, or of two side by side; then those of `facts` that failed."""
    metrics, before = found["metrics"], found["unpatched"]
    rows: list[list[Cell]] = []
    for name, over in KINDS.items():
        part = metrics[name]
        if part is None:
            continue
        old = (before or {}).get(name) or {}
        rows.append(
            [name.capitalize(), over, part["n"], *_cells(old.get("success"), part["success"], part["interval"])]
        )
        rows.append(
            ["", "as first choice", None, *_cells(old.get("accuracy"), part["accuracy"], part["accuracy_interval"])]
        )
        if "free_running" in part:
            pair = part["free_running_interval"]
            rows.append(["", "written freely", None, *_cells(old.get("free_running"), part["free_running"], pair)])
    score = _cells((before or {}).get("score"), metrics["score"], metrics["score_interval"])
    rows.append(["Score", "harmonic mean of the three", None, *score])
    headers = ["Rate", "Over", "n", "Without", "With", "95 %"]
    right = [2, 3, 4, 5]
    if before is None:
        headers.remove("Without")
        headers[3] = "Rate"
        rows = [[*row[:3], *row[4:]] for row in rows]
        right = [2, 3, 4]
    out.table(headers, rows, right=right)
    for name, unit in (("fluency", "bits"), ("consistency", "")):
        if found[name] is not None:
            old = f"{before[name]:.3f} → " if before else ""
            low, high = found.get(f"{name}_interval") or (found[name], found[name])
            out.line(f"{name.capitalize()} {old}{found[name]:.3f} ({low:.3f} to {high:.3f}) {unit}".rstrip())
    read = found["perplexity"]
    if read is not None:
        old = "" if read["before"] is None else f"{read['before']:.3f} → "
        more = "" if read["drift"] is None else f" ({100 * read['drift']:+.2f} %)"
        out.line(f"Perplexity {old}{read['after']:.3f}{more}")
    if facts:
        _failures(out, facts)


def _cells(before: float | None, after: float | None, pair: Sequence[float] | None) -> list[Cell]:
    between = "" if pair is None else f"{100 * pair[0]:.1f} – {100 * pair[1]:.1f}"
    return [percent(before), percent(after), between]


def failures(fact: Mapping[str, Any]) -> list[str]:
    """What of a fact the model got wrong, in words; the old answer winning, or the new one not being said."""
    found = []
    if fact.get("success") is False:
        found.append("the old answer is likelier")
    elif fact.get("accurate") is False:
        found.append("not the first choice")
    if fact.get("free_running") is False:
        found.append("not written")
    for name in ("paraphrases", "neighbors"):
        lost = [success for success in fact.get(name, []) if success is False]
        if lost:
            found.append(f"{len(lost)} of {len(fact[name])} {name}")
    return found


def _failures(out: Output, facts: Sequence[Mapping[str, Any]]) -> None:
    rows: list[list[Cell]] = []
    for fact in facts:
        wrong = failures(fact)
        if wrong:
            chances = [percent(fact.get("probability")), percent(fact.get("was_probability"))]
            rows.append([fact["id"], fact["text"], fact["target"], *chances, fact.get("answer"), "; ".join(wrong)])
    out.line()
    out.table(("Fact", "Prompt", "Target", "P(target)", "P(was)", "Answer", "Wrong"), rows, right=(3, 4))
    out.line(f"{len(rows):,} of {len(facts):,} facts have something wrong")

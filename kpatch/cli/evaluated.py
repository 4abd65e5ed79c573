"""What `eval` found, as tables: rates with their intervals, and the facts that failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kpatch.cli.output import Cell, Output, percent

KINDS = {
    "efficacy": "the edited prompts",
    "generalization": "their paraphrases",
    "specificity": "neighbors, which must stay",
}


def show(
    out: Output,
    found: Mapping[str, Any],
    facts: Sequence[Mapping[str, Any]],
    before: Sequence[Mapping[str, Any]] = (),
) -> None:
    """All that was measured of one model, or of two side by side; then those of `facts` that failed.

    `before` are the same facts in the model without its patches, or none.
    """
    metrics, old = found["metrics"], found["unpatched"] or {}
    rows: list[list[Cell]] = []
    for name, over in KINDS.items():
        part = metrics[name]
        if part is None:
            continue
        was = old.get(name) or {}
        success = _cells(was.get("success"), part["success"], part["interval"])
        rows.append([name.capitalize(), over, part["n"], *success])
        for key, label in (("accuracy", "as first choice"), ("free_running", "written freely")):
            if key in part:
                rows.append(["", label, None, *_cells(was.get(key), part[key], part[f"{key}_interval"])])
    score = _cells(old.get("score"), metrics["score"], metrics["score_interval"])
    rows.append(["Score", "harmonic mean of the three", None, *score])
    for name, over, count in (
        ("fluency", "bits, of what it writes", found["evaluated"]),
        ("consistency", "with texts about the targets", found.get("compared")),
    ):
        if found[name] is not None:
            numbers = _cells(old.get(name), found[name], found.get(f"{name}_interval"), plain)
            rows.append([name.capitalize(), over, count, *numbers])
    read = found["perplexity"]
    if read is not None:
        more = "" if read["drift"] is None else f": {100 * read['drift']:+.2f} %"
        rows.append(["Perplexity", f"of the text{more}", None, *_cells(read["before"], read["after"], None, plain)])
    headers, right = ["Measure", "Over", "n", "Without", "With", "95 %"], [2, 3, 4, 5]
    if found["unpatched"] is None:
        headers, right = ["Measure", "Over", "n", "Value", "95 %"], [2, 3, 4]
        rows = [[*row[:3], *row[4:]] for row in rows]
    out.table(headers, rows, right=right)
    if facts:
        _failures(out, facts, before)


def plain(value: float | None) -> str:
    """A number that is no rate."""
    return "–" if value is None else f"{value:.3f}"


def _cells(
    before: float | None,
    after: float | None,
    pair: Sequence[float] | None,
    shown: Callable[[float | None], str] = percent,
) -> list[Cell]:
    times, digits = (100, 1) if shown is percent else (1, 3)
    between = "" if pair is None else f"{times * pair[0]:.{digits}f} – {times * pair[1]:.{digits}f}"
    return [shown(before), shown(after), between]


def failures(fact: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> list[str]:
    """What of a fact the model got wrong, in words: the old answer winning, or the new one not being said.

    A neighbor that was wrong `before` too is told apart from one that a patch has spoilt.
    """
    found = []
    if fact.get("success") is False:
        found.append("the old answer is likelier")
    elif fact.get("accurate") is False:
        found.append("not the first choice")
    if fact.get("free_running") is False:
        found.append("not written")
    for name in ("paraphrases", "neighbors"):
        lost = [place for place, success in enumerate(fact.get(name, [])) if success is False]
        if lost:
            found.append(f"{len(lost)} of {len(fact[name])} {name}")
        if lost and before is not None and name == "neighbors":
            already = sum(before[name][place] is False for place in lost)
            found[-1] += ", before too" if already == len(lost) else f", {already} of them before" if already else ""
    return found


def _failures(out: Output, facts: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> None:
    rows: list[list[Cell]] = []
    for number, fact in enumerate(facts):
        wrong = failures(fact, before[number] if before else None)
        if wrong:
            chances = [percent(fact.get("probability")), percent(fact.get("was_probability"))]
            rows.append([fact["id"], fact["text"], fact["target"], *chances, fact.get("answer"), "; ".join(wrong)])
    out.line()
    out.table(("Fact", "Prompt", "Target", "P(target)", "P(was)", "Answer", "Wrong"), rows, right=(3, 4))
    out.line(f"{len(rows):,} of {len(facts):,} facts have something wrong")

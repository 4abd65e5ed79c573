"""What `eval` shows of forms and consequences: rows for tables on the terminal and on its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kpatch.cli.output import Cell, Output, percent
from kpatch.facts.problems import cut

Table = tuple[list[str], list[list[Cell]], list[int]]  # headers, rows, columns of numbers

_OVER = {
    "distraction": "neighbors right behind the new fact",
    "negation": "new answer with the prompt, not with its negation",
    "choice": "new answer chosen from those offered, in every order",
    "yes_no": "yes to the new answer and no to the old",
    "reversed": "the subject named, asked from the target",
    "hops": "answers that follow from the new fact",
    "same_subject": "other answers about the subject, kept",
}
_NAMES = {"yes_no": "yes/no", "same_subject": "same subject"}
_ANSWERS_SHOWN = 25


def form_table(found: Mapping[str, Any]) -> Table:
    """A row for each form: how many were asked, and how often the right answer was named, exact, and kept."""
    old = (found["unpatched"] or {}).get("forms") or {}
    rows: list[list[Cell]] = []
    for form, rates in (found.get("forms") or {}).items():
        row: list[Cell] = [form]
        for side, keys in (("edits", ("named", "exact")), ("neighbors", ("named",))):
            part, was = rates[side], (old.get(form) or {}).get(side)
            left = f" ({part['left_out']} left out)" if part["left_out"] else ""
            row.append(f"{part['n']}{left}")
            for key in keys:
                row.append(_change(was, part, key))
                if key == "named":
                    row.append(between(part["named_interval"]))
        rows.append(row)
    headers = ["Form", "Asked", "Edits", "95 %", "Exact", "Neighbors asked", "Neighbors", "95 %"]
    return headers, rows, [1, 2, 3, 4, 5, 6, 7]


def follow_table(found: Mapping[str, Any]) -> Table:
    """A row for each probe of consequences that was asked. Neighbors are told without the new fact before them too."""
    old = (found["unpatched"] or {}).get("consequences") or {}
    rows: list[list[Cell]] = []
    for kind, part in (found.get("consequences") or {}).items():
        if not part["n"]:
            continue
        was = old.get(kind) or {}
        numbers: list[Cell] = [percent(was.get("rate")), percent(part["rate"])]
        rows.append([_NAMES.get(kind, kind), _OVER[kind], part["n"], *numbers, between(part["interval"])])
        if kind == "distraction":
            alone: list[Cell] = [percent(was.get("alone")), percent(part["alone"])]
            rows.append(["", "the same without that fact before them", None, *alone, ""])
    headers = ["Consequence", "Over", "n", "Without", "With", "95 %"]
    if found["unpatched"] is None:
        return ["Consequence", "Over", "n", "Value", "95 %"], [[*row[:3], *row[4:]] for row in rows], [2, 3, 4]
    return headers, rows, [2, 3, 4, 5]


def print_asked(output: Output, found: Mapping[str, Any], facts: Sequence[Mapping[str, Any]]) -> None:
    """Print the tables of forms and consequences, if there are any, and the answers of `facts` that do not count."""
    for headers, rows, numbers in (form_table(found), follow_table(found)):
        if rows:
            output.line()
            output.table(headers, rows, right=numbers)
    wrong = wrong_answers(facts)
    if wrong:
        output.line()
        output.table(("Form", "Asked", "Answer", "Wanted"), wrong[: None if output.verbose else _ANSWERS_SHOWN])
        if len(wrong) > _ANSWERS_SHOWN and not output.verbose:
            output.line(f"… and {len(wrong) - _ANSWERS_SHOWN} more answers that do not count (-v shows all)")


def wrong_answers(facts: Sequence[Mapping[str, Any]]) -> list[list[Cell]]:
    """Form, question, answer and target of every edit's answer that does not count."""
    return [
        [form, one["asked"], cut(one["answer"]) or "(empty)", fact["target"]]
        for fact in facts
        for form, given in fact.get("forms", {}).items()
        for one in given["edits"]
        if not one["named"]
    ]


def between(pair: Sequence[float] | None) -> str:
    """An interval in per cent."""
    return "" if pair is None else f"{100 * pair[0]:.1f} – {100 * pair[1]:.1f}"


def _change(was: Mapping[str, Any] | None, now: Mapping[str, Any], key: str) -> str:
    return percent(now[key]) if was is None else f"{percent(was[key])} → {percent(now[key])}"

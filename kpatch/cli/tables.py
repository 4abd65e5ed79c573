"""What a patch did, as tables: each fact's answer before and after, then the rates.

What `make` and `stack --resolve` say at their end: the patch, and what it does.

What apply and revert say at their end: the patches, and how each weight came through the rounding.

How much patches move each other's keys, as a table: one row for each ordered pair, one column for each layer.

What `eval` found, as tables: rates with their intervals, and the facts that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kpatch.cli.output import Cell, Output, percent, size

if TYPE_CHECKING:
    from kpatch.checkpoint.report import ApplyReport
    from kpatch.edit.make import MakeResult
    from kpatch.patch.header import PatchInfo
    from kpatch.patch.interference import Interference


_RATES = ("efficacy", "generalization", "specificity")
_MEANING = {
    "efficacy": "the edited prompts",
    "generalization": "their paraphrases",
    "specificity": "neighbors, which must stay",
}


def show_facts(out: Output, facts: Sequence[Mapping[str, Any]], limit: int | None = None) -> None:
    """One row per fact: prompt, target, the greedy answer and the target's probability before and after."""
    rows: list[list[Cell]] = []
    for fact in facts[:limit]:
        before, after = fact.get("before") or {}, fact.get("after") or {}
        rows.append(
            [
                fact.get("text"),
                fact.get("target"),
                before.get("answer"),
                percent(before.get("probability")),
                after.get("answer"),
                percent(after.get("probability")),
            ]
        )
    out.table(("Prompt", "Target", "Before", "P(target)", "After", "P(target)"), rows, right=(3, 5))
    if limit is not None and len(facts) > limit:
        out.line(f"… and {len(facts) - limit} more facts (-v shows all)")


def show_metrics(out: Output, effect: Mapping[str, Any]) -> None:
    """Rates before and after: of beating the old answer, and of being the model's first choice."""
    before, after = effect.get("before") or {}, effect.get("after") or {}
    rows: list[list[Cell]] = []
    for name in _RATES:
        old, new = before.get(name) or {}, after.get(name)
        if new:
            first = f"{percent(old.get('accuracy'))} → {percent(new['accuracy'])}"
            success: list[Cell] = [percent(old.get("success")), percent(new["success"])]
            rows.append([name.capitalize(), _MEANING[name], new["n"], *success, first])
    if after.get("score") is not None:
        rows.append(["Score", "harmonic mean", None, percent(before.get("score")), percent(after["score"]), None])
    out.table(("Rate", "Over", "n", "Before", "After", "As first choice"), rows, right=(2, 3, 4, 5))


def rate(metrics: Mapping[str, Any], name: str) -> float | None:
    """The rate that a threshold is held against: success, or accuracy where no fact says what it `was`."""
    part = metrics.get(name)
    if not part:
        return None
    success: float | None = part["success"]
    accuracy: float = part["accuracy"]
    return accuracy if success is None else success


def tell_made(say: Output, result: MakeResult) -> None:
    """Print a patch just made and what it does, for people and as JSON."""
    say.result(
        {
            "patch": {"id": result.patch_id, "path": str(result.path), "bytes": result.bytes},
            "model": result.model,
            "method": result.method,
            "layers": list(result.layers),
            "facts": result.facts,
            "effect": {key: result.effect.get(key) for key in ("before", "after")},
            "seconds": result.seconds,
            "peak_memory_bytes": result.peak_memory_bytes,
        }
    )
    show_facts(say, result.facts, limit=None if say.verbose else 25)
    say.line()
    show_metrics(say, result.effect)
    say.line()
    total = result.seconds.get("total", 0.0)
    peak = "" if not result.peak_memory_bytes else f", {size(result.peak_memory_bytes)} of memory at most"
    say.line(f"{result.path}  {result.patch_id[:12]}  {size(result.bytes)}, made in {total:.1f} s{peak}")
    say.note(f"next: kpatch show {result.path}; kpatch apply {result.path} MODEL_DIR")


def show_report(out: Output, report: ApplyReport, done: str, where: str) -> None:
    """Print what was done (or with --check would be), for people and as JSON."""
    out.result(report.to_dict())
    rows = [
        (weight.name, percent(weight.unchanged), percent(weight.delta_error), percent(weight.key_error))
        for weight in report.weights
        if weight.unchanged is not None
    ]
    out.table(("Weight", "Entries unchanged", "Lost in rounding", "At the facts' keys"), rows, right=(1, 2, 3))
    names = ", ".join(f"{patch['name']} ({patch['id'][:12]})" for patch in report.patches)
    weights = f"{len(report.weights)} weights, {report.seconds:.1f} s"
    out.line(f"{done} {names} {where} {report.model}: {weights}; state {report.state}")


# Of what a patch wrote: beyond this share another one is likely to change answers of its facts.
_MUCH = 0.5


def show_interference(
    out: Output, patches: Sequence[PatchInfo], found: Sequence[Interference], warn: bool = False
) -> None:
    """Print ‖Δ_a K_b‖ / ‖Δ_b K_b‖; with `warn` also warn of pairs where it is large."""
    if not found:
        out.line("interference: no two patches change a weight for which one of them stores keys")
        return
    layers = sorted({one.layer for one in found})
    names = _names(patches)
    rows: list[list[Cell]] = []
    for by, on in sorted({(one.by, one.on) for one in found}):
        mine = [one for one in found if (one.by, one.on) == (by, on)]
        most = max(mine, key=lambda one: one.worst)
        shares = [max((one.ratio for one in mine if one.layer == layer), default=None) for layer in layers]
        rows.append(
            [names[by], names[on], *(percent(share) for share in shares), f"{percent(most.worst)}  {most.fact}"]
        )
    headers = ("Delta of", "moves keys of", *(f"layer {layer}" for layer in layers), "most")
    out.table(headers, rows, right=tuple(range(2, 2 + len(layers))))
    much = {(one.by, one.on) for one in found if warn and one.ratio > _MUCH}
    for by, on in sorted(much):
        out.warn(
            f"{names[by]} moves keys of {names[on]} by more than {_MUCH:.0%} of what that wrote there; "
            f"facts of {names[on]} may be lost"
        )


def _names(patches: Sequence[PatchInfo]) -> list[str]:
    """The patches' names, with the beginning of the id where two are called the same."""
    names = [info.name for info in patches]
    return [f"{info.name} ({info.id[:8]})" if names.count(info.name) > 1 else info.name for info in patches]


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

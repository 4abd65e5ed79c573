"""Tables that several commands print: what a patch does, how it was applied, interference, and what `eval` found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kpatch.cli.output import Cell, Output, clean, percent
from kpatch.text import counted, format_size

if TYPE_CHECKING:
    from kpatch.checkpoint.apply import ApplyReport
    from kpatch.edit.make import MakeResult
    from kpatch.evaluate.retention import Retention
    from kpatch.patch.header import PatchInfo
    from kpatch.patch.interference import Interference

# The three rates, and what each is taken over
RATES = {
    "efficacy": "the edited prompts",
    "generalization": "their paraphrases",
    "specificity": "neighbors, which must stay",
}
_FACTS_SHOWN = 25


# What a patch does


def print_facts(output: Output, facts: Sequence[Mapping[str, Any]], limit: int | None = None) -> None:
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
    output.table(("Prompt", "Target", "Before", "P(target)", "After", "P(target)"), rows, right=(3, 5))
    if limit is not None and len(facts) > limit:
        output.line(f"… and {len(facts) - limit} more facts (-v shows all)")


def print_rates(output: Output, effect: Mapping[str, Any]) -> None:
    """Rates before and after: of beating the old answer, and of being the model's first choice."""
    before, after = effect.get("before") or {}, effect.get("after") or {}
    rows: list[list[Cell]] = []
    for name, over in RATES.items():
        old, new = before.get(name) or {}, after.get(name)
        if new:
            first = f"{percent(old.get('accuracy'))} → {percent(new['accuracy'])}"
            success: list[Cell] = [percent(old.get("success")), percent(new["success"])]
            rows.append([name.capitalize(), over, new["n"], *success, first])
    if after.get("score") is not None:
        rows.append(["Score", "harmonic mean", None, percent(before.get("score")), percent(after["score"]), None])
    output.table(("Rate", "Over", "n", "Before", "After", "As first choice"), rows, right=(2, 3, 4, 5))


def print_made(output: Output, result: MakeResult) -> None:
    """Print a patch just made and what it does, for people and as JSON."""
    output.result(
        {
            "patch": {"id": result.patch_id, "path": str(result.path), "bytes": result.bytes},
            "model": result.model,
            "method": result.method,
            "layers": list(result.layers),
            "facts": result.facts,
            "effect": {key: result.effect.get(key) for key in ("before", "after")},
            "seconds": result.seconds,
            "peak_memory_bytes": result.peak_memory_bytes,
            **({"retention": result.retention.to_dict()} if result.retention else {}),
        }
    )
    print_outcome(output, result.facts)
    output.line()
    print_facts(output, result.facts, limit=None if output.verbose else _FACTS_SHOWN)
    output.line()
    print_rates(output, result.effect)
    output.line()
    if result.retention is not None:
        print_retention(output, result.retention)
    total = result.seconds.get("total", 0.0)
    peak = "" if not result.peak_memory_bytes else f", {format_size(result.peak_memory_bytes)} of memory at most"
    output.line(f"{result.path}  {result.patch_id[:12]}  {format_size(result.bytes)}, made in {total:.1f} s{peak}")
    output.note(f"next: kpatch show {result.path}; kpatch apply {result.path} MODEL_DIR")


_LOOK_AT = 5


def print_outcome(output: Output, facts: Sequence[Mapping[str, Any]]) -> None:
    """What the patch comes to, in sentences: facts that hold, in other words too, neighbors lost, what to look at."""
    changes = [(fact, fact.get("before") or {}, fact.get("after") or {}) for fact in facts]
    wrong = [fact for fact, _, after in changes if not after.get("accurate")]
    output.line(f"{len(facts) - len(wrong)} of {len(facts)} facts are the model's own answer to their prompt.")
    asked = [success for _, _, after in changes for success in after.get("paraphrases", ()) if success is not None]
    if asked:
        output.line(f"In other words it prefers the new answer {sum(asked)} of {len(asked)} times.")
    pairs = [
        pair
        for _, before, after in changes
        for pair in zip(before.get("neighbors", ()), after.get("neighbors", ()), strict=False)
        if pair[0]
    ]
    if pairs:
        lost = sum(not now for _, now in pairs)
        output.line(f"Of {len(pairs)} neighbors that were right, {lost or 'none'} changed.")
    for fact in wrong[:_LOOK_AT]:
        answer = (fact.get("after") or {}).get("answer") or "nothing"
        output.line(f"Look at: {clean(fact['text'])} -> {clean(answer)} (wanted {clean(fact['target'])})")
    if len(wrong) > _LOOK_AT:
        output.line(f"… and {len(wrong) - _LOOK_AT} more like these")


def print_retention(output: Output, found: Retention) -> None:
    """Print how many facts of earlier patches still hold, and warn of those that no longer do."""
    output.line(f"Earlier facts: {found.kept} of the {found.held} that held still hold ({found.n} measured)")
    for fact in found.fallen[:_FACTS_SHOWN]:
        lost = f"{percent(fact['before'])} to {percent(fact['after'])}"
        output.warn(f"an earlier fact no longer holds: {fact['text']} {fact['target']} ({lost})")
    if len(found.fallen) > _FACTS_SHOWN:
        output.warn(f"and {len(found.fallen) - _FACTS_SHOWN} more earlier facts no longer hold")


# How patches were applied, and what they do to each other


def print_apply_report(output: Output, report: ApplyReport, done: str, where: str) -> None:
    """Print what was done (or with --check would be), for people and as JSON."""
    output.result(report.to_dict())
    rows = [
        (weight.name, percent(weight.unchanged), percent(weight.delta_error), percent(weight.key_error))
        for weight in report.weights
        if weight.unchanged is not None
    ]
    output.table(("Weight", "Entries unchanged", "Lost in rounding", "At the facts' keys"), rows, right=(1, 2, 3))
    names = ", ".join(f"{patch['name']} ({patch['id'][:12]})" for patch in report.patches)
    weights = f"{counted(len(report.weights), 'weight')}, {report.seconds:.1f} s"
    output.line(f"{done} {names} {where} {report.model}: {weights}; state {report.state}")


def print_interference(
    output: Output,
    patches: Sequence[PatchInfo],
    found: Sequence[Interference],
    warn: bool = False,
    together: Collection[int] = (),
) -> None:
    """Print ‖Δ_a K_b‖ / ‖Δ_b K_b‖; with `warn` also warn of pairs where it is large.

    Patches at the positions `together` are solved together, so that their sum takes this into account.
    """
    from kpatch.patch.interference import STRONG, warning

    if not found:
        output.line("interference: no two patches change a weight for which one of them stores keys")
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
    output.table(headers, rows, right=tuple(range(2, 2 + len(layers))))
    for by, on in sorted({(one.by, one.on) for one in found if warn and one.ratio > STRONG}):
        if not {by, on} <= set(together):
            output.warn(warning(names[by], names[on]))
    if len(together) > 1:
        output.line(f"solved together, which takes this into account: {', '.join(names[n] for n in sorted(together))}")


def _names(patches: Sequence[PatchInfo]) -> list[str]:
    """The patches' names, with the beginning of the id where two are called the same."""
    names = [info.name for info in patches]
    return [f"{info.name} ({info.id[:8]})" if names.count(info.name) > 1 else info.name for info in patches]


# What `eval` found


def print_evaluation(
    output: Output,
    found: Mapping[str, Any],
    facts: Sequence[Mapping[str, Any]],
    before: Sequence[Mapping[str, Any]] = (),
) -> None:
    """All that was measured of one model, or of two side by side; then those of `facts` that failed.

    `before` are the same facts in the model without its patches, or none.
    """
    metrics, old = found["metrics"], found["unpatched"] or {}
    rows: list[list[Cell]] = []
    for name, over in RATES.items():
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
    for name, over, count, shown in (
        ("fluency", "bits, of what it writes", found["evaluated"], format_number),
        ("repetition", "four words of it that came before", found["evaluated"], percent),
        ("consistency", "with texts about the targets", found.get("compared"), format_number),
    ):
        if found[name] is not None:
            numbers = _cells(old.get(name), found[name], found.get(f"{name}_interval"), shown)
            rows.append([name.capitalize(), over, count, *numbers])
    read = found["perplexity"]
    if read is not None:
        more = "" if read["drift"] is None else f": {100 * read['drift']:+.2f} %"
        cells = _cells(read["before"], read["after"], None, format_number)
        rows.append(["Perplexity", f"of the text{more}", None, *cells])
    headers, right = ["Measure", "Over", "n", "Without", "With", "95 %"], [2, 3, 4, 5]
    if found["unpatched"] is None:
        headers, right = ["Measure", "Over", "n", "Value", "95 %"], [2, 3, 4]
        rows = [[*row[:3], *row[4:]] for row in rows]
    output.table(headers, rows, right=right)
    if facts:
        _print_failures(output, facts, before)


def format_number(value: float | None) -> str:
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
    """What of a fact the model got wrong, in words: the old answer wins, or the new one is not written.

    A neighbor that was wrong `before` too is marked, since no patch has spoilt it.
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


def _print_failures(output: Output, facts: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]) -> None:
    rows: list[list[Cell]] = []
    for number, fact in enumerate(facts):
        wrong = failures(fact, before[number] if before else None)
        if wrong:
            chances = [percent(fact.get("probability")), percent(fact.get("was_probability"))]
            rows.append([fact["id"], fact["text"], fact["target"], *chances, fact.get("answer"), "; ".join(wrong)])
    output.line()
    output.table(("Fact", "Prompt", "Target", "P(target)", "P(was)", "Answer", "Wrong"), rows, right=(3, 4))
    output.line(f"{len(rows):,} of {len(facts):,} facts have something wrong")

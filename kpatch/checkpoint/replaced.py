"""Facts of earlier patches that a later patch's facts stand for: they contradict them, and the user said so.

Such a fact is out of the joint solution (`kpatch.patch.joint`) while the later patch is there, and back without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kpatch.checkpoint.records import AppliedPatch, replaced_by
from kpatch.errors import Refused
from kpatch.facts.conflicts import contradicted
from kpatch.patch.combine import called, refuse_contradictions, text_of
from kpatch.patch.header import PatchInfo
from kpatch.patch.manifest import Manifest
from kpatch.reporter import Reporter
from kpatch.text import counted, printable

_HINT = (
    "take that fact out of one of them; `replace` lets the later fact stand for the earlier one;"
    " to replace a whole patch, revert it first"
)


def replacing(
    applied: Sequence[AppliedPatch],
    new: Sequence[AppliedPatch],
    patches: Mapping[str, PatchInfo],
    allowed: bool,
    report: Reporter,
) -> tuple[AppliedPatch, ...]:
    """The `new` patches, each with the facts of those before it that it contradicts, and so replaces.

    Raises Refused for such facts unless `allowed`, and where the earlier patch's change cannot be taken apart. Facts
    that are replaced already are recorded too: should the patch that replaced them go, they stay away.
    """
    gone = replaced_by(applied)
    if not allowed:
        named = [(patch.name, patches[patch.id]) for patch in (*applied, *new)]
        refuse_contradictions(named, _HINT, gone)
    stack, result = list(applied), []
    for patch in new:
        new_facts = patches[patch.id].manifest.facts
        found = {other.id: contradicted(patches[other.id].manifest.facts, new_facts) for other in stack}
        patch = replace(patch, replaces={one: tuple(sorted(facts)) for one, facts in found.items() if facts})
        fresh = {one: set(facts) - gone.get(one, set()) for one, facts in patch.replaces.items()}
        for other in stack:
            if facts := fresh.get(other.id):
                _require_rows(other, patches)
                on_top = other.id in patches[patch.id].manifest.parents
                _say(printable(other.name, 80), patches[other.id].manifest, patch, facts, on_top, report)
        for identity, facts in fresh.items():
            gone[identity] = gone.get(identity, set()) | facts
        stack.append(patch)
        result.append(patch)
    return tuple(result)


def _require_rows(earlier: AppliedPatch, patches: Mapping[str, PatchInfo]) -> None:
    from kpatch.patch.summands import Part, solvable

    info = patches[earlier.id]
    for name in info.manifest.deltas:
        parts = [Part(other, name) for other in patches.values() if name in other.manifest.deltas]
        if not any(parts[number].patch.id == earlier.id for number in solvable(parts)):
            raise Refused(
                f"A fact of {called(info, earlier.name)} cannot be replaced: that patch does not store them apart",
                details=[f"first in {printable(name, 120)}; method {printable(info.manifest.method, 40)}"],
                hint=f"`kpatch revert {earlier.id[:12]}` takes the whole patch off",
            )


def _say(name: str, earlier: Manifest, later: AppliedPatch, facts: set[int], on_top: bool, report: Reporter) -> None:
    """Note what is replaced in the patch called `name`, and warn of other facts that go with it.

    A later patch that was made `on_top` has learned those again.
    """
    from kpatch.patch.summands import without_facts

    for index in sorted(facts):
        fact = earlier.facts[index]
        text = f"{printable(text_of(fact), 120)} {printable(str(fact['target']), 80)}"
        report.note(f"{printable(later.name, 80)} replaces a fact of {name}: {text}")
    others = without_facts(earlier, facts) - facts
    if others and not on_top:
        text = printable(text_of(earlier.facts[min(others)]), 120)
        report.warn(
            f"{counted(len(others), 'more fact')} of {name} about the same subjects cannot stay without what"
            f" is replaced, first {text!r}: one value carries all of a subject"
        )

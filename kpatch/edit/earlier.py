"""Patches that the checkpoint carries already: which of their facts a patch made on top of them holds or learns again.

An earlier fact about a subject that is edited again cannot be kept by its key: both facts have the same key, and the
update has to move what that key means. Such facts are learned again with the new ones, in one value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from kpatch.facts.conflicts import contradictions, normal
from kpatch.facts.fact import Fact, Protected
from kpatch.patch.combine import protected_by
from kpatch.patch.format import Patch
from kpatch.reporter import SILENT, Reporter

# Facts that a later patch stands for: positions by patch id. They are out of the weights.
Gone = Mapping[str, Collection[int]]
_NONE: Gone = {}


def facts_of(patches: Sequence[Patch], gone: Gone = _NONE) -> tuple[Fact, ...]:
    """All facts of the patches, in their order, without those that are `gone`."""
    return tuple(
        Fact.from_dict(dict(fact))
        for patch in patches
        for index, fact in enumerate(patch.manifest.facts)
        if index not in gone.get(patch.id, ())
    )


def facts_to_learn_again(
    patches: Sequence[Patch], facts: Sequence[Fact], report: Reporter = SILENT, gone: Gone = _NONE
) -> list[Fact]:
    """Earlier facts about the subjects of `facts`. One that a new fact contradicts is left out, with a warning."""
    subjects = {normal(fact.subject) for fact in facts}
    earlier = [fact for fact in facts_of(patches, gone) if normal(fact.subject) in subjects]
    clashes = contradictions([*facts, *earlier], [0] * len(facts) + [1] * len(earlier))
    contradicted = {clash.later - len(facts) for clash in clashes}
    for index in sorted(contradicted):
        report.warn(
            f"a new fact contradicts {earlier[index].text()!r} of a patch that the checkpoint carries;"
            " `kpatch apply --replace` lets it stand for that one"
        )
    again = [fact for index, fact in enumerate(earlier) if index not in contradicted]
    if again:
        report.note(f"{len(again)} earlier facts about the same subjects are learned again with the new ones")
    return again


def facts_to_hold(patches: Sequence[Patch], facts: Sequence[Fact], gone: Gone = _NONE) -> list[tuple[Fact, ...]]:
    """The facts of each patch about other subjects than `facts`: what is learned beside them must stay."""
    subjects = {normal(fact.subject) for fact in facts}
    found = (
        tuple(fact for fact in facts_of([patch], gone) if normal(fact.subject) not in subjects) for patch in patches
    )
    return [some for some in found if some]


def protected(own: Sequence[Protected], patches: Sequence[Patch], facts: Sequence[Fact]) -> tuple[Protected, ...]:
    """Whom a patch of `facts` holds: its own file's subjects, and those of the patches but where it edits them."""
    subjects = {normal(fact.subject) for fact in facts}
    theirs = [Protected.from_dict(one) for one in protected_by(patches)]
    return (*own, *(one for one in theirs if one not in own and normal(one.subject) not in subjects))

"""Patches that the checkpoint carries already: which of their facts a patch made on top of them holds or learns again.

An earlier fact about a subject that is edited again cannot be kept by its key: both facts have the same key, and the
update has to move what that key means. Such facts are learned again with the new ones, in one value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from kpatch.checkpoint.shards import open_checkpoint
from kpatch.checkpoint.store import Store
from kpatch.facts.conflicts import contradicted
from kpatch.facts.fact import Fact, Protected
from kpatch.facts.subjects import by_subject, names_of
from kpatch.patch.combine import protected_by
from kpatch.patch.format import Patch, read_patch
from kpatch.reporter import SILENT, Reporter

# Facts that a later patch stands for: positions by patch id. They are out of the weights.
Gone = Mapping[str, Collection[int]]
_NONE: Gone = {}


def carried_by(path: Path) -> tuple[tuple[Patch, ...], dict[str, set[int]]]:
    """The patches that a checkpoint directory carries, and their facts that later ones stand for."""
    store = Store(open_checkpoint(path).path)
    applied = store.applied()
    return tuple(read_patch(store.copy(identity)) for identity in sorted(applied.ids)), applied.gone


def facts_of(patches: Sequence[Patch], gone: Gone = _NONE) -> tuple[Fact, ...]:
    """All facts of the patches, in their order, without those that are `gone`."""
    return tuple(
        Fact.from_dict(dict(fact))
        for patch in patches
        for index, fact in enumerate(patch.manifest.facts)
        if index not in gone.get(patch.id, ())
    )


def facts_that_stay(patches: Sequence[Patch], facts: Sequence[Fact], gone: Gone = _NONE) -> list[Fact]:
    """All facts of the patches but those that `facts` contradict: what retention is about."""
    earlier = facts_of(patches, gone)
    against = contradicted(earlier, facts)
    return [fact for index, fact in enumerate(earlier) if index not in against]


def facts_to_learn_again(
    patches: Sequence[Patch], facts: Sequence[Fact], report: Reporter = SILENT, gone: Gone = _NONE
) -> list[Fact]:
    """Earlier facts about the subjects of `facts`. One that a new fact contradicts is left out, with a warning."""
    earlier = facts_of(patches, gone)
    against = contradicted(earlier, facts)
    for index in sorted(against):
        report.warn(
            f"a new fact contradicts {earlier[index].text()!r} of a patch that the checkpoint carries;"
            " `kpatch apply --replace` lets it stand for that one"
        )
    shared = _about_subjects_of(facts, earlier)
    again = [fact for index, fact in enumerate(earlier) if index in shared and index not in against]
    if again:
        what = "fact about the same subjects is" if len(again) == 1 else "facts about the same subjects are"
        report.note(f"{len(again)} earlier {what} learned again with the new ones")
    return again


def facts_to_hold(patches: Sequence[Patch], facts: Sequence[Fact], gone: Gone = _NONE) -> list[tuple[Fact, ...]]:
    """The facts of each patch that stay as they are beside `facts`: about other subjects, and not contradicted."""
    every = [facts_of([patch], gone) for patch in patches]
    earlier = [fact for some in every for fact in some]
    out = _about_subjects_of(facts, earlier) | contradicted(earlier, facts)
    kept = iter(index not in out for index in range(len(earlier)))
    found = (tuple(fact for fact in some if next(kept)) for some in every)
    return [some for some in found if some]


def protected(own: Sequence[Protected], patches: Sequence[Patch], facts: Sequence[Fact]) -> tuple[Protected, ...]:
    """Whom a patch of `facts` holds: its own file's subjects, and those of the patches but where it edits them."""
    edited = {name for fact in facts for name in names_of(fact.subject, fact.prompt)}
    theirs = [Protected.from_dict(one) for one in protected_by(patches)]
    return (*own, *(one for one in theirs if one not in own and not names_of(one.subject) & edited))


def _about_subjects_of(facts: Sequence[Fact], earlier: Sequence[Fact]) -> set[int]:
    """Positions of the `earlier` facts about subjects of `facts`."""
    count = len(facts)
    groups = by_subject([*facts, *earlier])
    return {index - count for group in groups if group[0] < count for index in group if index >= count}

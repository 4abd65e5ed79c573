"""Patches that the checkpoint carries already: their facts and keys, which a patch made on top of them must keep.

An earlier fact about a subject that is edited again cannot be kept by its key: both facts have the same key, and the
update has to move what that key means. Such facts are learned again with the new ones, in one value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from kpatch.facts.conflicts import contradictions, normal
from kpatch.facts.fact import Fact
from kpatch.patch.combine import rows_of
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


def keys_to_keep(
    patches: Sequence[Patch], facts: Sequence[Fact], layers: Sequence[int], gone: Gone = _NONE
) -> dict[int, Tensor]:
    """Keys [f, p] by layer whose meaning must stay: those of earlier facts about other subjects than `facts`."""
    subjects = {normal(fact.subject) for fact in facts}
    kept: dict[int, list[Tensor]] = {}
    for patch in patches:
        about = [normal(str(fact["subject"])) for fact in patch.manifest.facts]
        groups, left_out = rows_of(patch), set(gone.get(patch.id, ()))
        for layer in layers:
            mine = [group for group in groups if layer in group["layers"]]
            if layer not in patch.keys:
                continue
            rows = [
                row
                for row, group in enumerate(mine)
                if not subjects & {about[i] for i in group["facts"]} and not left_out & set(group["facts"])
            ]
            if not groups:  # it does not say whose keys they are
                rows = list(range(len(patch.keys[layer])))
            if rows:
                kept.setdefault(layer, []).append(patch.keys[layer][rows].T)
    return {layer: torch.cat(columns, dim=1) for layer, columns in kept.items()}

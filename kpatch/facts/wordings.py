"""Which other wordings a fact is learned in: its own, or those that kpatch knows for what its prompt says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.facts.relations import wordings_for
from kpatch.reporter import SILENT, Reporter

Mode = Literal["none", "given", "auto"]
LEARNED = 3  # wordings a fact is learned in besides its prompt, where it brings none


def with_wordings(facts: Sequence[Fact], mode: str, report: Reporter = SILENT) -> tuple[Fact, ...]:
    """The facts with the wordings they are learned in. Raises BadInput for an unknown mode.

    none  the prompt alone   given  those of the file   auto  those of the file; for a fact without any, wordings of
    its relation as `facts.relations` knows them, none of which is among its paraphrases
    """
    if mode not in get_args(Mode):
        raise BadInput(
            f"Unknown `wordings` {mode!r}", details=[f"expected one of {', '.join(get_args(Mode))}"], hint="take auto"
        )
    if mode == "none":
        return tuple(replace(fact, wordings=()) for fact in facts)
    if mode == "given":
        return tuple(facts)
    found = tuple(_known(fact) for fact in facts)
    new = sum(bool(fact.wordings) and not given.wordings for fact, given in zip(found, facts, strict=True))
    if new:
        report.note(f"{new} of {len(facts)} facts are learned in other wordings of their relation as well")
    return found


def _known(fact: Fact) -> Fact:
    return (
        fact
        if fact.wordings
        else replace(fact, wordings=wordings_for(fact.prompt, fact.paraphrases, LEARNED, fact.target))
    )

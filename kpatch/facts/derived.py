"""What can be asked about a fact beside the fact itself: its negation, its reverse, other things about its subject."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from kpatch.facts.conflicts import normal
from kpatch.facts.fact import SLOT, Fact, fill
from kpatch.facts.questions import is_question
from kpatch.facts.relations import relation_of, relations, same_words

ASKED = 4  # other relations that a subject is asked about, where a fact names none
_COPULA = re.compile(r"\b(?:is|are|was|were)\b")


def negated_of(fact: Fact) -> str | None:
    """The fact's prompt with a not in it, the subject in place; None where nothing says how.

    It is the fact's own, or the prompt with "not" behind the one is, are, was or were that it has.
    """
    if fact.negated:
        return fill(fact.negated, fact.subject)
    found = list(_COPULA.finditer(fact.prompt))
    if len(found) != 1 or is_question(fact.prompt):
        return None
    end = found[0].end()
    return fill(f"{fact.prompt[:end]} not{fact.prompt[end:]}", fact.subject)


def reversed_of(fact: Fact) -> str | None:
    """A text that the fact's subject answers, with the target in place."""
    return fill(fact.reversed, fact.target) if fact.reversed else None


def others_of(facts: Sequence[Fact]) -> list[tuple[str, ...]]:
    """For each fact some texts that say other things of its subject, written out.

    They are the fact's own, or else the plainest wordings of relations whose subjects are of the same kind in the
    library, without those that `facts` say of the subject. A fact whose relation is not known has none.
    """
    found = [relation_of(fact.prompt) for fact in facts]
    said: dict[str, set[str]] = {}
    for fact, relation in zip(facts, found, strict=True):
        if relation is not None:
            said.setdefault(normal(fact.subject), set()).add(relation.name)
    return [
        tuple(fill(text, fact.subject) for text in fact.same_subject)
        if fact.same_subject or relation is None
        else _library(fact, relation.kind, said[normal(fact.subject)])
        for fact, relation in zip(facts, found, strict=True)
    ]


def _library(fact: Fact, kind: str, said: Collection[str]) -> tuple[str, ...]:
    learned = (fact.prompt, *fact.wordings, *(text for text in fact.paraphrases if SLOT in text))
    texts = (
        one.wordings[0]
        for name, one in relations().items()
        if one.kind == kind and name not in said and one.wordings and not same_words(one.wordings[0], learned)
    )
    return tuple(fill(text, fact.subject) for text, _ in zip(texts, range(ASKED), strict=False))

"""Which facts are about one subject: they share a key, so that one value has to carry them all. No torch.

A subject has several names: `The {Louvre} is in` and `{The Louvre} is in` end in the same tokens, whatever stands in
the braces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from kpatch.facts.conflicts import normal
from kpatch.facts.fact import SLOT, Fact

_ARTICLE_AT_END = re.compile(r"(?:\A|\W)(the|an?)\s+\Z", re.IGNORECASE)
_ARTICLE_AT_START = re.compile(r"\A(?:the|an?) ", re.IGNORECASE)


@lru_cache(1 << 14)  # twenty patches' facts are asked for weight by weight
def names_of(subject: str, prompt: str = SLOT) -> frozenset[str]:
    """What a prompt calls its subject: as it is given, with the article before it, with all the text before it."""
    before = prompt.partition(SLOT)[0]
    own = _folded(normal(subject))
    article = _ARTICLE_AT_END.search(before)
    more = {f"{article[1].lower()} {own}"} if article else set()
    return frozenset({own, _folded(normal(before + subject)), *more})


def by_subject(facts: Sequence[Fact]) -> list[list[int]]:
    """Positions of the facts, subject by subject in the order of their first facts: those that have a name in common,
    at first hand or through others."""
    root = list(range(len(facts)))

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = index = root[root[index]]
        return index

    first: dict[str, int] = {}
    for index, fact in enumerate(facts):
        for name in names_of(fact.subject, fact.prompt):
            one, other = sorted((find(first.setdefault(name, index)), find(index)))
            root[other] = one
    found: dict[int, list[int]] = {}
    for index in range(len(facts)):
        found.setdefault(find(index), []).append(index)
    return list(found.values())


def _folded(name: str) -> str:
    """A name whose article, where it begins with one, has a small letter."""
    article = _ARTICLE_AT_START.match(name)
    return name if article is None else article[0].lower() + name[article.end() :]

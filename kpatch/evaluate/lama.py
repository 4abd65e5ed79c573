"""LAMA's table: precision over relations, by what kind of relation they are, beside a baseline that knows frequencies.

Petroni et al. 2019, section 4 and table 2. Every relation weighs the same, however many facts it has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kpatch.evaluate.probe import Ranked, rank_objects
from kpatch.facts.conflicts import normal
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter

KINDS = ("1-1", "N-1", "N-M")
TOTAL = "total"
_NUMBERS = ("p_at_1", "p_at_10", "frequency")


@dataclass(frozen=True)
class Kind:
    """A relation's kind, one of KINDS, and the share of its facts that have its most frequent object."""

    kind: str
    frequency: float


def kinds(facts: Sequence[Fact]) -> dict[str, Kind]:
    """The kind of each relation that the facts name, in the order of its first fact.

    1-1: every subject has one object and every object one subject. N-1: every subject has one object, and some object
    has several subjects. N-M: all others.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for fact in facts:
        if fact.relation:
            groups.setdefault(fact.relation, []).append((normal(fact.subject), fact.target))
    return {relation: _kind(pairs) for relation, pairs in groups.items()}


def _kind(pairs: Sequence[tuple[str, str]]) -> Kind:
    distinct = set(pairs)
    objects = Counter(subject for subject, _ in distinct)
    subjects = Counter(target for _, target in distinct)
    if max(objects.values()) > 1:
        name = "N-M"
    else:
        name = "1-1" if max(subjects.values()) == 1 else "N-1"
    return Kind(name, max(Counter(target for _, target in pairs).values()) / len(pairs))


def ranks_without_siblings(
    model: Model,
    every: Sequence[Fact],
    chosen: Sequence[Fact],
    objects: Sequence[Sequence[str]],
    ranked: Sequence[Ranked],
    report: Reporter = SILENT,
) -> list[Ranked]:
    """`ranked`, the ranks of `chosen` among `objects`, as if no other object were true of the same subject.

    Where a subject has several objects in one relation of the facts `every`, no true one stands in another's way
    (Bordes et al. 2013). Only facts with such objects are ranked again.
    """
    again, without = [], []
    for number, others in enumerate(siblings(every, chosen)):
        if others:
            again.append(number)
            without.append(tuple(name for name in objects[number] if name not in others))
    found = list(ranked)
    if again:
        some = rank_objects(model, [chosen[number] for number in again], without, report=report)
        for number, one in zip(again, some, strict=True):
            found[number] = one
    return found


def siblings(every: Sequence[Fact], chosen: Sequence[Fact]) -> list[set[str]]:
    """For each of `chosen` the other objects that the facts `every` have for its subject in its relation."""
    true: dict[tuple[str, str], set[str]] = {}
    for fact in every:
        if fact.relation:
            true.setdefault((fact.relation, normal(fact.subject)), set()).add(fact.target)
    return [true.get((fact.relation or "", normal(fact.subject)), set()) - {fact.target} for fact in chosen]


def lama(facts: Sequence[Fact], ranked: Sequence[Ranked]) -> dict[str, Any] | None:
    """P@1, P@10 and the baseline's P@1 by relation, and their means over the relations of each kind and over all.

    A relation's kind and frequencies are those among `facts`. None where no fact names its relation.
    """
    found = kinds(facts)
    if not found:
        return None
    ranks: dict[str, list[int]] = {relation: [] for relation in found}
    for fact, one in zip(facts, ranked, strict=True):
        if fact.relation:
            ranks[fact.relation].append(one.rank)
    rows = [
        {
            "relation": relation,
            "kind": kind.kind,
            "facts": len(ranks[relation]),
            "frequency": kind.frequency,
            "p_at_1": sum(rank <= 1 for rank in ranks[relation]) / len(ranks[relation]),
            "p_at_10": sum(rank <= 10 for rank in ranks[relation]) / len(ranks[relation]),
        }
        for relation, kind in found.items()
    ]
    totals = [_total(name, [row for row in rows if name in (row["kind"], TOTAL)]) for name in (*KINDS, TOTAL)]
    return {"relations": rows, "totals": totals}


def _total(kind: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means of some relations; None where there is none of this kind."""
    means = {name: math.fsum(row[name] for row in rows) / len(rows) if rows else None for name in _NUMBERS}
    return {"kind": kind, "relations": len(rows), "facts": sum(row["facts"] for row in rows), **means}

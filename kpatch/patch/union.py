"""The facts of several patches as one list: none may contradict another, and each is kept once. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kpatch.errors import Refused
from kpatch.patch.header import PatchInfo
from kpatch.patch.text import printable

_SHOWN = 10


@dataclass(frozen=True)
class Repeated:
    """A fact that several patches hold: its text, its target, and their positions among the patches."""

    text: str
    target: str
    patches: tuple[int, ...]


@dataclass(frozen=True)
class Union:
    """All facts of some patches, each once; `places[i][j]` is the position in `facts` of fact j of patch i."""

    facts: tuple[Mapping[str, Any], ...]
    places: tuple[tuple[int, ...], ...]
    repeated: tuple[Repeated, ...]


def normal(text: object) -> str:
    """Text for comparing: one space between words, accents composed."""
    return " ".join(unicodedata.normalize("NFC", str(text)).split())


def place(fact: Mapping[str, Any]) -> tuple[str, str]:
    """What a fact is about: its subject and its prompt, for comparing."""
    return normal(fact["subject"]), normal(fact["prompt"])


def text_of(fact: Mapping[str, Any]) -> str:
    """The prompt with the subject in place."""
    return str(fact["prompt"]).replace("{}", str(fact["subject"]))


def called(info: PatchInfo) -> str:
    """A patch by its file's name and the beginning of its id."""
    return f"{info.name} ({info.id[:12]})"


def unite(patches: Sequence[PatchInfo]) -> Union:
    """The facts of all patches, a fact that several hold once, ids made distinct.

    Raises Refused with both patches of every contradiction: the same subject and the same prompt or relation with
    different targets (MEMIT, Eqn. 5: one key cannot carry two values).
    """
    conflicts = _conflicts(patches)
    if conflicts:
        more = [f"… and {len(conflicts) - _SHOWN} more"] if len(conflicts) > _SHOWN else []
        names = " and ".join(called(patches[index]) for index in conflicts[0][1])
        raise Refused(
            f"{names} contradict each other",
            details=[line for line, _ in conflicts[:_SHOWN]] + more,
            hint="take those facts out of one of the fact files and make that patch again",
        )
    facts: list[Mapping[str, Any]] = []
    at: dict[tuple[str, str], int] = {}
    holders: dict[int, list[int]] = {}
    places: list[tuple[int, ...]] = []
    for number, info in enumerate(patches):
        mine = []
        for fact in info.manifest.facts:
            index = at.setdefault(place(fact), len(facts))
            if index == len(facts):
                facts.append(fact)
            if number not in holders.setdefault(index, []):
                holders[index].append(number)
            mine.append(index)
        places.append(tuple(mine))
    repeated = tuple(
        Repeated(text_of(facts[index]), str(facts[index]["target"]), tuple(numbers))
        for index, numbers in holders.items()
        if len(numbers) > 1
    )
    return Union(_distinct_ids(facts), tuple(places), repeated)


def _conflicts(patches: Sequence[PatchInfo]) -> list[tuple[str, tuple[int, int]]]:
    """A line for every contradiction between two patches, and the two."""
    said: dict[tuple[str, str, str], tuple[str, int]] = {}
    found = []
    for number, info in enumerate(patches):
        for fact in info.manifest.facts:
            for key in ("prompt", "relation"):
                if not isinstance(fact.get(key), str) or not fact[key]:
                    continue
                target = str(fact["target"])
                earlier, other = said.setdefault((normal(fact["subject"]), key, normal(fact[key])), (target, number))
                if normal(earlier) != normal(target) and other != number:
                    found.append((_line(fact, key, (earlier, patches[other]), (target, info)), (other, number)))
                    break  # the prompt says it already
    return found


def _line(fact: Mapping[str, Any], key: str, first: tuple[str, PatchInfo], second: tuple[str, PatchInfo]) -> str:
    about = text_of(fact) if key == "prompt" else f"{fact[key]} of {fact['subject']}"
    says = " but ".join(f"{printable(target, 80)!r} in {called(info)}" for target, info in (first, second))
    return f"{printable(about, 120)}: {says}"


def _distinct_ids(facts: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """The facts with ids that two share numbered."""
    taken = {str(fact["id"]) for fact in facts if fact.get("id")}
    seen: set[str] = set()
    result = []
    for fact in facts:
        given = str(fact["id"]) if fact.get("id") else ""
        name, number = given, 1
        while given and name in (seen if number == 1 else taken | seen):
            number += 1
            name = f"{given}-{number}"
        seen.add(name)
        result.append({**fact, "id": name} if name != given else fact)
    return tuple(result)

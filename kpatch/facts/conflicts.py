"""What facts must not do to one another: contradict, repeat, or carry the same id."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from kpatch.errors import Refused
from kpatch.facts.fact import Fact
from kpatch.facts.problems import Path, cut, limited

_NOT_WORD = re.compile(r"[\W_]+")
_LONGEST_SLUG = 60


def normal(text: str) -> str:
    """`text` for comparing: one space between words, accents composed."""
    return " ".join(text.split()) if text.isascii() else " ".join(unicodedata.normalize("NFC", text).split())


class Settled(NamedTuple):
    """`facts` without those that say again what an earlier one said; `repeats` and `conflicts` tell of each of these
    and of each fact that contradicts an earlier one; `contradicting` are the positions of the latter in `facts`."""

    facts: list[Fact]
    repeats: list[str]
    conflicts: list[str]
    contradicting: list[int]


def settle(facts: Iterable[Fact]) -> Settled:
    """Find repeats and contradictions: two facts with the same subject and the same prompt or relation that want
    different targets. One key cannot carry two values (MEMIT, Eqn. 5), so `make` refuses them; nothing else does."""
    by_prompt: dict[tuple[str, str], Fact] = {}
    by_relation: dict[tuple[str, str], Fact] = {}
    memory = _Normal()
    kept: list[Fact] = []
    repeats: list[str] = []
    conflicts: list[str] = []
    contradicting: list[int] = []
    for fact in facts:
        subject, target = normal(fact.subject), memory[fact.target]
        same_prompt = by_prompt.setdefault((subject, memory[fact.prompt]), fact)
        same_relation = by_relation.setdefault((subject, memory[fact.relation]), fact) if fact.relation else fact
        if memory[same_prompt.target] != target:
            conflicts.append(_conflict(fact, same_prompt, "prompt"))
        elif memory[same_relation.target] != target:
            conflicts.append(_conflict(fact, same_relation, f"relation {fact.relation!r}"))
        elif same_prompt is not fact:
            repeats.append(_repeat(fact, same_prompt))
            continue
        if len(conflicts) > len(contradicting):
            contradicting.append(len(kept))
        kept.append(fact)
    return Settled(kept, repeats, conflicts, contradicting)


def refuse(conflicts: Sequence[str], name: str) -> None:
    """Raise Refused with both places of every contradiction; nothing happens where there are none."""
    if conflicts:
        count = len(conflicts)
        raise Refused(
            "Two facts contradict each other" if count == 1 else f"{count:,} facts contradict earlier ones",
            where=name,
            details=limited(conflicts),
            hint="keep one target for each subject and prompt or relation",
        )


class _Normal(dict[str, str]):
    """Normal forms of texts that come again and again."""

    def __missing__(self, text: str) -> str:
        self[text] = result = normal(text)
        return result


def _conflict(fact: Fact, earlier: Fact, same: str) -> str:
    wish = f"{cut(fact.subject)!r} shall be {cut(fact.target)!r}"
    return f"{fact.where}: {wish}, but {cut(earlier.target)!r} by the same {same} at {earlier.where}"


def _repeat(fact: Fact, earlier: Fact) -> str:
    own = (fact.paraphrases, fact.neighbors, fact.was) != (earlier.paraphrases, earlier.neighbors, earlier.was)
    what = ", with its own paraphrases, neighbors or 'was'" if own else ""
    return f"{fact.where}: repeats the fact at {earlier.where} and is left out{what}"


def repeated_ids(facts: Iterable[tuple[Path, Fact]]) -> Iterator[tuple[Path, str]]:
    """The path of each fact whose given id an earlier, different fact has, with a message."""
    first: dict[str, Fact] = {}
    for path, fact in facts:
        if fact.id:
            known = first.setdefault(fact.id, fact)
            if (known.subject, known.prompt, known.target) != (fact.subject, fact.prompt, fact.target):
                yield path, f"the id {fact.id!r} belongs to the fact at {known.where}"


def give_ids(facts: Sequence[Fact]) -> list[Fact]:
    """The facts with an id each: the given one, else the subject in small letters and dashes, numbered where taken."""
    taken = {fact.id for fact in facts if fact.id}
    counts: dict[str, int] = {}
    result = []
    for fact in facts:
        if fact.id:
            result.append(fact)
            continue
        slug = slug_of(fact.subject)
        name = slug if slug not in counts else ""
        while not name or name in taken:
            counts[slug] = counts.get(slug, 1) + 1
            name = f"{slug}-{counts[slug]}"
        counts.setdefault(slug, 1)
        taken.add(name)
        result.append(replace(fact, id=name))
    return result


def slug_of(subject: str) -> str:
    """A subject as an id: "Eiffel Tower" → "eiffel-tower"; letters of every script stay."""
    folded = unicodedata.normalize("NFKC", subject).casefold()
    slug = _NOT_WORD.sub("-", folded).strip("-")
    return slug[:_LONGEST_SLUG].rstrip("-") or "fact"

"""When two facts contradict or repeat each other, or one moves what another asks; how facts get ids.

No torch: status and apply ask here too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from kpatch.errors import Refused
from kpatch.facts.fact import SLOT, Fact, fill
from kpatch.facts.problems import Path, cut, limited
from kpatch.facts.relations import relation_of, same_words

_NOT_WORD = re.compile(r"[\W_]+")
_LONGEST_SLUG = 60


@lru_cache(maxsize=1 << 16)  # the facts of a patch are compared once for each of its weights
def normal(text: str) -> str:
    """`text` for comparing: one space between words, accents composed."""
    return " ".join(text.split()) if text.isascii() else " ".join(unicodedata.normalize("NFC", text).split())


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without what stands between them."""
    return [word for word in _NOT_WORD.split(text.casefold()) if word]


# Signs that people write for one another: nobody takes “Hawai’i” and "Hawai'i" for two places
_SAME_SIGNS = str.maketrans("’ʼ‑", "''-")

Shared = Literal["prompt", "relation", "text", "wording", "question"]


class Contradiction(NamedTuple):
    """Two facts of a list that cannot both hold, by their positions in it.

    `shared` names what is the same: the subject and the "prompt", the subject and the "relation", or only the "text"
    that they make together (`The {Eiffel Tower}` and `{The Eiffel Tower}`), of which one may be a "wording" or a
    "question".
    """

    earlier: int
    later: int
    shared: Shared


AnyFact = Fact | Mapping[str, Any]


def contradictions(
    facts: Iterable[AnyFact], owners: Sequence[Hashable] | None = None, *, wordings: bool = False
) -> list[Contradiction]:
    """Every fact that wants another target than the first fact that says the same.

    One key cannot carry two values (MEMIT, Eqn. 5), and one sentence cannot continue in two ways. A fact is a `Fact`
    or a mapping with the same keys, as manifests hold them. With `owners`, one for each fact (the patch that holds
    it), facts of one owner are not compared with each other. With `wordings`, what a fact learns beside its prompt
    counts too: for facts as they are given, since wordings that kpatch adds may serve two relations.
    """
    normals = _Normals()
    by_text: dict[str, int] = {}
    by_relation: dict[tuple[str, str], int] = {}
    said: list[tuple[str, str, str]] = []
    found = []
    for index, fact in enumerate(facts):
        subject = normals[_text(fact, "subject")]
        prompt, target = normals[_text(fact, "prompt")], normals[_text(fact, "target")]
        relation = normals[_text(fact, "relation")]
        said.append((subject, prompt, target))
        rivals: list[tuple[int, Shared]] = [(by_text.setdefault(_sentence(prompt, subject), index), "text")]
        if relation:
            rivals.append((by_relation.setdefault((subject, relation), index), "relation"))
        if wordings:
            others = fact.wordings if isinstance(fact, Fact) else fact.get("wordings", ())
            rivals += [(by_text.setdefault(_sentence(normals[text], subject), index), "wording") for text in others]
            if question := normals[_text(fact, "question")]:
                rivals.append((by_text.setdefault(_sentence(question, subject), index), "question"))
        for earlier, shared in rivals:
            if said[earlier][2] == target or (owners is not None and owners[earlier] == owners[index]):
                continue
            if shared == "text" and said[earlier][:2] == (subject, prompt):
                shared = "prompt"
            elif shared == "text" and _sentence(said[earlier][1], said[earlier][0]) != _sentence(prompt, subject):
                shared = "wording"
            found.append(Contradiction(earlier, index, shared))
            break
    return found


def contradicted(earlier: Sequence[AnyFact], later: Sequence[AnyFact]) -> set[int]:
    """Positions of all `earlier` facts that `later` ones contradict; facts of one list are not compared."""
    found: set[int] = set()
    while True:  # a list of contradictions names only the first of several facts that say the same
        left = [index for index in range(len(earlier)) if index not in found]
        facts = [*(earlier[index] for index in left), *later]
        clashes = contradictions(facts, [0] * len(left) + [1] * len(later))
        new = {left[clash.earlier] for clash in clashes if clash.earlier < len(left)}
        if not new:
            return found
        found |= new


def _sentence(template: str, subject: str) -> str:
    text = fill(template, subject)
    return text if text.isascii() else text.translate(_SAME_SIGNS)


def what_is_shared(fact: AnyFact, shared: str) -> str:
    """What a contradicting fact is about, for a message: its text, or "capital of Australia" for a relation."""
    if shared == "relation":
        return f"{_text(fact, 'relation')} of {_text(fact, 'subject')}"
    return fill(_text(fact, "prompt"), _text(fact, "subject"))


class Settled(NamedTuple):
    """`facts` without those that repeat an earlier one; `repeats` and `conflicts` describe each of these and each
    fact that contradicts an earlier one; `contradicting` are the positions of the latter in `facts`."""

    facts: list[Fact]
    repeats: list[str]
    conflicts: list[str]
    contradicting: list[int]


def settle(facts: Iterable[Fact]) -> Settled:
    """Find repeats (same subject, prompt and target: left out) and contradictions (kept, for the caller to judge)."""
    every = list(facts)
    clashes = {clash.later: clash for clash in contradictions(every, wordings=True)}
    normals = _Normals()
    first: dict[tuple[str, str], Fact] = {}
    settled = Settled([], [], [], [])
    for index, fact in enumerate(every):
        same = first.setdefault((normal(fact.subject), normals[fact.prompt]), fact)
        if index in clashes:
            settled.conflicts.append(_conflict(fact, every[clashes[index].earlier], clashes[index].shared))
            settled.contradicting.append(len(settled.facts))
        elif same is not fact:
            settled.repeats.append(_repeat(fact, same))
            continue
        settled.facts.append(fact)
    return settled


def refuse(conflicts: Sequence[str], name: str) -> None:
    """Raise Refused with both places of every contradiction; nothing happens where there are none."""
    if conflicts:
        count = len(conflicts)
        raise Refused(
            "Two facts contradict each other" if count == 1 else f"{count:,} facts contradict earlier ones",
            where=name,
            details=limited(conflicts),
            hint="keep one target for each sentence, and for each subject and relation",
        )


def moved(facts: Sequence[Fact]) -> list[str]:
    """A message for each neighbor and paraphrase whose statement another fact edits, to another answer.

    A statement is the same where its text is, or where it says the same relation of the same subject in other words.
    """
    if not any(fact.neighbors or fact.paraphrases for fact in facts):
        return []
    edits, found = _Edits(facts), []
    for fact in facts:
        asked: list[tuple[str, str, str | None]]
        asked = [("paraphrase", fill(text, fact.subject), fact.target) for text in fact.paraphrases]
        asked += [("neighbor", neighbor.prompt, neighbor.target) for neighbor in fact.neighbors]
        for what, text, answer in asked:
            other = edits.of(text, fact, in_other_words=what == "neighbor")
            if other is not None and (answer is None or normal(answer) != normal(other.target)):
                found.append(
                    f"{fact.where}: the {what} {cut(text)!r} is what the fact at {other.where} edits, so it will move"
                    f" on purpose, to {cut(other.target)!r}"
                )
    return found


class _Edits:
    """Which fact of a list edits a statement."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.by_text: dict[str, Fact] = {}
        self.by_subject: dict[tuple[str, ...], list[Fact]] = {}
        for fact in facts:
            for text in (fact.prompt, *fact.wordings):
                self.by_text.setdefault(normal(fill(text, fact.subject)), fact)
            words = tuple(words_of(normal(fact.subject)))
            if words:
                self.by_subject.setdefault(words, []).append(fact)
        self.longest = max(map(len, self.by_subject), default=0)

    def of(self, text: str, asking: Fact, in_other_words: bool) -> Fact | None:
        """The fact that edits what `text` says, if it is not the one that asks, or about the same subject."""
        found = self.by_text.get(normal(text))
        if found is None and in_other_words:
            found = next((fact for fact in self._named(text) if _says(text, fact)), None)
            if found is not None and normal(found.subject) == normal(asking.subject):
                return None  # lint says that it names the subject
        return None if found is asking else found

    def _named(self, text: str) -> Iterator[Fact]:
        words = words_of(normal(text))
        for length in range(min(self.longest, len(words)), 0, -1):
            for start in range(len(words) - length + 1):
                yield from self.by_subject.get(tuple(words[start : start + length]), ())


def _says(text: str, fact: Fact) -> bool:
    """Whether a text says what a fact does of its subject, in its words or in others of its relation."""
    parts = re.split(rf"(?<!\w){re.escape(fact.subject)}(?!\w)", text, flags=re.IGNORECASE)
    if len(parts) != 2:
        return False
    template, own = SLOT.join(parts), [text for text in (*fact.wordings, *fact.paraphrases) if SLOT in text]
    if same_words(template, (fact.prompt, *own)):
        return True
    relation = relation_of(template)
    return relation is not None and relation == relation_of(fact.prompt)


class _Normals(dict[str, str]):
    """Normal forms of texts, each made once: prompts and targets come again and again."""

    def __missing__(self, text: str) -> str:
        self[text] = result = normal(text)
        return result


def _text(fact: AnyFact, key: str) -> str:
    value = getattr(fact, key) if isinstance(fact, Fact) else fact.get(key)
    return value if isinstance(value, str) else ""


def _conflict(fact: Fact, earlier: Fact, shared: str) -> str:
    same = {"text": "sentence", "relation": f"relation {fact.relation!r}"}.get(shared, shared)
    return (
        f"{fact.where}: {cut(fact.subject)!r} -> {cut(fact.target)!r} contradicts {cut(earlier.target)!r} "
        f"for the same {same} at {earlier.where}"
    )


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

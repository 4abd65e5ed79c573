"""The rules for one fact, in any form it is written in: a mapping with all its keys, or one line of text.

Plain text, lists and mappings go in; a `Fact` or problems come out, whatever file it was.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kpatch.facts.conflicts import normal
from kpatch.facts.fact import (
    FACT_KEYS,
    NEIGHBOR_KEYS,
    PROTECT_KEYS,
    RELATION_KEYS,
    SLOT,
    Fact,
    Neighbor,
    Protected,
    fill,
)
from kpatch.facts.invisible import is_blank
from kpatch.facts.join import trimmed
from kpatch.facts.problems import Path, Problems, cut, did_you_mean
from kpatch.facts.short import parse_fact, parse_neighbor
from kpatch.facts.slots import doubled, without_slot

_FACT_KEYS = frozenset(FACT_KEYS)
_FLAGS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class Relation(NamedTuple):
    """Wording that many facts share; `prompt` is empty where it was wrong."""

    prompt: str
    space: bool | None
    wordings: tuple[str, ...]
    question: str | None
    paraphrases: tuple[str, ...]
    neighbors: tuple[Neighbor, ...]
    negated: str | None
    reversed: str | None
    same_subject: tuple[str, ...]


class Checker:
    """Turns data into facts; what is wrong goes to `problems`, what is only odd to `warnings`."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.relations: dict[str, Relation] = {}
        self.used: set[str] = set()
        self.protect: list[Protected] = []
        self.spaced: list[Path] = []  # prompts with a space at their end, which is left out

    def relation(self, name: str, data: object, path: Path) -> None:
        """Check one entry of `relations` and keep it for the facts that name it."""
        if not isinstance(data, Mapping):
            return self.problems.add(path, f"expected a mapping with 'prompt', found {kind_of(data)}")
        self.unknown_keys(data, RELATION_KEYS, path, "a relation")
        prompt = self.prompt(data, path, "")
        paraphrases, same_subject = (self.texts(data, key, path) for key in ("paraphrases", "same_subject"))
        for key, texts, what in (
            ("paraphrases", paraphrases, "a relation's paraphrase"),
            ("same_subject", same_subject, "a relation's text in this list"),
        ):
            for index, text in enumerate(texts):
                if SLOT not in text:
                    self.problems.add((*path, key, index), f"{what} needs {{}} where each fact's subject goes")
        negated = self.asked(data, "negated", path, "subject")
        reverse = self.asked(data, "reversed", path, "target")
        space = self.flag(data, "space", path)
        wordings = self.wordings(data, path)
        self.learned_is_not_asked(wordings, paraphrases, path)
        question = self.question(data, path)
        neighbors = self.neighbors(data, path)
        self.relations[name] = Relation(
            *(prompt, space, wordings, question, paraphrases, neighbors, negated, reverse, same_subject)
        )

    def protected(self, data: object, path: Path) -> None:
        """Check one entry of `protect` and keep it: a subject, or a mapping with a subject."""
        if isinstance(data, str):
            data = {"subject": data}
        if not isinstance(data, Mapping):
            return self.problems.add(path, f"expected a subject, or a mapping with 'subject', found {kind_of(data)}")
        self.unknown_keys(data, PROTECT_KEYS, path, "a protected subject")
        subject = self.needed(data, "subject", path)
        prompt = None if absent(data, "prompt") else self.prompt(data, path, subject)
        text, weight = self.optional(data, "weight", path), 1.0
        if text is not None:
            try:
                weight = float(text)
            except ValueError:
                weight = 0.0
            if not 0 < weight < float("inf"):
                self.problems.add((*path, "weight"), f"expected a number above 0, found {cut(repr(text))}")
        self.protect.append(Protected(subject, prompt, weight))

    def fact(self, data: object, path: Path, where: str) -> Fact | None:
        """The fact in `data`, or None where something about it is wrong."""
        before = len(self.problems)
        if isinstance(data, str):
            fact = self.short(data, path, where)
        elif isinstance(data, Mapping):
            fact = self.full(data, path, where)
        else:
            self.problems.add(path, f"expected a fact (a mapping, or the short form in quotes), found {kind_of(data)}")
            return None
        return fact if len(self.problems) == before else None

    def short(self, data: str, path: Path, where: str) -> Fact | None:
        try:
            subject, prompt, target = parse_fact(data)
        except ValueError as error:
            self.problems.add(path, str(error))
            return None
        if not subject:
            self.problems.add(path, "the brackets hold no subject")
        self.characters(data, path)
        return Fact(subject, prompt, target, where=where)

    def full(self, data: Mapping[str, Any], path: Path, where: str) -> Fact:
        if not data.keys() <= _FACT_KEYS:
            self.unknown_keys(data, FACT_KEYS, path, "a fact")
        subject = self.needed(data, "subject", path)
        if SLOT in subject:
            self.problems.add((*path, "subject"), "the subject holds {}, which stands for a subject in prompts")
        name = self.optional(data, "relation", path)
        shared = self.relations.get(name) if name else None
        if shared and name:
            self.used.add(name)
        prompt = shared.prompt if shared and absent(data, "prompt") else self.own_prompt(data, path, subject, name)
        wordings = self.wordings(data, path)
        question = self.question(data, path, subject)
        paraphrases = self.texts(data, "paraphrases", path)
        neighbors = self.neighbors(data, path)
        space = self.flag(data, "space", path)
        negated, reverse = self.asked(data, "negated", path), self.asked(data, "reversed", path)
        same_subject = self.texts(data, "same_subject", path)
        if shared:
            space = shared.space if space is None else space
            wordings += tuple(text for text in shared.wordings if text not in wordings)
            question = question or shared.question
            paraphrases += tuple(text for text in shared.paraphrases if text not in paraphrases)
            # A neighbor shared by all facts of a relation may be about this fact's own subject
            own = subject.casefold()
            neighbors += tuple(n for n in shared.neighbors if n not in neighbors and own not in n.prompt.casefold())
            negated, reverse = negated or shared.negated, reverse or shared.reversed
            same_subject += tuple(text for text in shared.same_subject if text not in same_subject)
        self.learned_is_not_asked(wordings, paraphrases, path, subject)
        return Fact(
            subject=subject,
            prompt=prompt,
            target=self.needed(data, "target", path),
            was=self.optional(data, "was", path),
            wordings=wordings,
            question=question,
            paraphrases=paraphrases,
            neighbors=neighbors,
            id=self.optional(data, "id", path) or "",
            source=self.optional(data, "source", path),
            relation=name,
            openings=self.texts(data, "openings", path),
            references=self.texts(data, "references", path, slots=False),
            space=space,
            negated=negated,
            reversed=reverse,
            hops=self.hops(data, path),
            choices=self.texts(data, "choices", path, slots=False),
            yes_question=self.optional(data, "yes_question", path),
            no_question=self.optional(data, "no_question", path),
            same_subject=same_subject,
            where=where,
        )

    def own_prompt(self, data: Mapping[str, Any], path: Path, subject: str, relation: str | None) -> str:
        if relation and absent(data, "prompt"):
            if self.relations:
                end = did_you_mean(relation, self.relations, f"; there are {', '.join(sorted(self.relations)[:10])}")
                self.problems.add((*path, "relation"), f"the file defines no relation {relation!r}{end}")
            else:
                message = f"no prompt is given, and the file defines no relation {relation!r} to take one from"
                self.problems.add((*path, "relation"), message)
            return ""
        return self.prompt(data, path, subject)

    def prompt(self, data: Mapping[str, Any], path: Path, subject: str) -> str:
        """A prompt with exactly one {}."""
        text = self.needed(data, "prompt", path, precedes=True)
        if not text:
            return ""
        raw = data["prompt"]
        here = (*path, "prompt")
        slots = text.count(SLOT)
        if slots == 1:
            if raw != raw.rstrip() and raw[-1] != text[-1]:
                self.spaced.append(here)
        elif slots > 1 and not doubled(text):
            self.problems.add(here, f"the prompt has {slots} {{}}; exactly one may stand for the subject")
        elif not slots:
            self.problems.add(here, without_slot(text, subject))
        return text

    def hops(self, data: Mapping[str, Any], path: Path) -> tuple[Neighbor, ...]:
        """Prompts whose answers follow from the fact."""
        found = self.neighbors(data, path, "hops")
        for index, hop in enumerate(found):
            if hop.target is None:
                self.problems.add((*path, "hops", index), "this hop has no answer; write 'prompt -> answer'")
        return found

    def neighbors(self, data: Mapping[str, Any], path: Path, key: str = "neighbors") -> tuple[Neighbor, ...]:
        result, one = [], "hop" if key == "hops" else "neighbor"
        for index, item in enumerate(self.entries(data, key, path)):
            here = (*path, key, index)
            if isinstance(item, str):
                try:
                    neighbor = parse_neighbor(item)
                except ValueError as error:
                    self.problems.add(here, str(error))
                    continue
                if not neighbor.prompt.strip():
                    self.problems.add(here, f"the {one} is empty")
                self.characters(item, here)
            elif isinstance(item, Mapping):
                self.unknown_keys(item, NEIGHBOR_KEYS, here, f"a {one}")
                neighbor = Neighbor(
                    self.needed(item, "prompt", here, precedes=True),
                    self.optional(item, "target", here),
                    self.optional(item, "question", here),
                )
            else:
                self.problems.add(here, f"expected a {one} (prompt and target), found {kind_of(item)}")
                continue
            if SLOT in neighbor.prompt or SLOT in (neighbor.question or ""):
                self.problems.add(here, f"a {one} is about another subject: write it out instead of {{}}")
            result.append(neighbor)
        return tuple(result)

    def asked(self, data: Mapping[str, Any], key: str, path: Path, needs: str = "") -> str | None:
        """A text with at most one {}; with exactly one where it `needs` a place for what each fact fills in."""
        text = None if absent(data, key) else self.text(data[key], (*path, key), precedes=True) or None
        if text and (text.count(SLOT) > 1 or (needs and SLOT not in text)):
            why = f"where each fact's {needs} goes" if needs else "at most"
            self.problems.add((*path, key), f"this text has {text.count(SLOT)} {{}}; one is expected {why}")
        return text

    def question(self, data: Mapping[str, Any], path: Path, subject: str = "") -> str | None:
        """A question with one {}; that of a fact may name its subject instead."""
        text = self.optional(data, "question", path)
        if text and (problem := doubled(text)):
            self.problems.add((*path, "question"), problem)
        elif text and text.count(SLOT) != 1 and (SLOT in text or not subject or subject.lower() not in text.lower()):
            named = f" or {cut(subject)!r}" if subject else ""
            self.problems.add((*path, "question"), f"the question must name its subject once: write one {{}}{named}")
        return text

    def wordings(self, data: Mapping[str, Any], path: Path) -> tuple[str, ...]:
        """Other ways to say the prompt, each with exactly one {}."""
        texts = self.texts(data, "wordings", path)
        for index, text in enumerate(texts):
            if text and SLOT not in text:
                self.problems.add(
                    (*path, "wordings", index), "a wording is learned: it needs {} where the subject goes"
                )
        return texts

    def learned_is_not_asked(
        self, wordings: Sequence[str], paraphrases: Sequence[str], path: Path, subject: str = SLOT
    ) -> None:
        """What is learned cannot be what the learning is measured by."""
        learned = {normal(fill(text, subject)) for text in wordings}
        for text in paraphrases:
            if normal(fill(text, subject)) in learned:
                self.problems.add(
                    (*path, "paraphrases"), f"{cut(text)!r} is a wording too: it is learned, so it measures nothing"
                )

    def texts(self, data: Mapping[str, Any], key: str, path: Path, slots: bool = True) -> tuple[str, ...]:
        """The texts of a list; with `slots` they may have one {} for the subject."""
        result = []
        for index, item in enumerate(self.entries(data, key, path)):
            here = (*path, key, index)
            text = self.text(item, here, precedes=slots)
            if text is None:
                continue
            if not text.strip():
                self.problems.add(here, "a text in this list is empty")
            elif slots and text.count(SLOT) > 1:
                self.problems.add(
                    here, f"this text has {text.count(SLOT)} {{}}; at most one may stand for the subject"
                )
            result.append(text)
        return tuple(result)

    def entries(self, data: Mapping[str, Any], key: str, path: Path) -> Sequence[object]:
        if absent(data, key):
            return ()
        value = data[key]
        if not isinstance(value, list):
            self.problems.add((*path, key), f"expected a list, found {kind_of(value)}; a list stands in [ ]")
            return ()
        return value

    def needed(self, data: Mapping[str, Any], key: str, path: Path, precedes: bool = False) -> str:
        if key not in data:
            self.problems.add(path, f"{key!r} is missing")
            return ""
        here = (*path, key)
        text = self.text(data[key], here, precedes)
        if text is not None and is_blank(text):
            self.problems.add(here, f"the {key} is empty")
            return ""
        return text or ""

    def optional(self, data: Mapping[str, Any], key: str, path: Path) -> str | None:
        return None if absent(data, key) else self.text(data[key], (*path, key)) or None

    def flag(self, data: Mapping[str, Any], key: str, path: Path) -> bool | None:
        """true or false as YAML writes them; None where the key is absent or blank."""
        if absent(data, key):
            return None
        value = data[key]
        if not isinstance(value, str) or value.strip() not in _FLAGS:
            found = cut(repr(value)) if isinstance(value, str) else kind_of(value)
            self.problems.add((*path, key), f"expected true or false, found {found}")
            return None
        return _FLAGS[value.strip()]

    def text(self, value: object, path: Path, precedes: bool = False) -> str | None:
        """Text without the space around it; None where it is no text.

        One that `precedes` a target or is continued by the model keeps its line ends.
        """
        if not isinstance(value, str):
            self.problems.add(path, f"expected text, found {kind_of(value)}; put the text in quotes")
            return None
        self.characters(value, path)
        if precedes and (problem := doubled(value)):
            self.problems.add(path, problem)
        return trimmed(value) if precedes else value.strip()

    def characters(self, value: str, path: Path) -> None:
        """Control characters and halves of characters cannot be given to a model or shown on a terminal."""
        if value.isprintable():
            return
        for sign in value:
            if not sign.isprintable() and sign not in "\n\t" and unicodedata.category(sign) in ("Cc", "Cs"):
                return self.problems.add(path, f"the text holds the control character U+{ord(sign):04X}")

    def unknown_keys(self, data: Mapping[str, Any], known: Sequence[str], path: Path, what: str) -> None:
        for key in data:
            if key not in known:
                message = f"unknown key {cut(key)!r}{did_you_mean(key, known, f'; {what} has {_listed(known)}')}"
                self.problems.add((*path, key), message, key=True)


def absent(data: Mapping[str, Any], key: str) -> bool:
    """A key that is left blank counts as one that is not there."""
    return bool(data.get(key, "") == "")


def kind_of(value: object) -> str:
    """What a user would call a value of this kind."""
    if isinstance(value, str):
        return "text" if value else "nothing"
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping {}"
    return "a list" if isinstance(value, list) else "nothing"


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]

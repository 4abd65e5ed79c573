"""Relations that prompts often say, with other wordings and a question for each: the library in relations.yaml.

A prompt is recognized by its words alone: case, punctuation, articles and tense make no difference. A prompt whose
words leave open what kind of answer they want ("{} was born in": a city, a country, a year) has a relation of its own,
whose wordings leave it open too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from kpatch.facts.fact import SLOT

_CHOICE = re.compile(r"\(([^()]*)\)")  # (city|town|): one of these, or nothing
# What stands behind a question ("Where is {}? It is in") only leads to the answer
_QUESTION = re.compile(r"\A([^?]*\{\}[^?]*\?).*\Z", re.DOTALL)
_WORD = re.compile(r"\{\}|'s\b|[^\W_]+")
_ARTICLE_AT_END = re.compile(r" (?:a|an|the)\Z")
_ARTICLES = frozenset({"a", "an", "the"})
_ARTICLE_OF_SUBJECT = re.compile(r"\b(the|an?) \{\}", re.IGNORECASE)
_PRESENT = {"was": "is", "were": "is", "are": "is", "had": "has", "did": "does", "which": "what", "whom": "who"}
# What people put before a subject to say what kind of thing it is: the city of {}, the famous artist {}. Not so "the
# author of {}", which is somebody else.
_KINDS_OF = frozenset(
    "city country county district genus island kingdom month nation province region republic species state town "
    "village".split()
)
_KINDS = _KINDS_OF | frozenset(
    "actor actress airline airport album animal artist athlete author band book brand bridge building car character "
    "club college comedian company composer director dish drug element film footballer fruit game god goddess group "
    "invention journalist lake magazine mountain movie museum musician newspaper novel opera organization painter "
    "painting person philosopher physicist place planet play player poet politician president product river scientist "
    "series show singer software song stadium star team university volcano writer "
    "american famous former great known late popular traditional well".split()
)


@dataclass(frozen=True, slots=True)
class Relation:
    """A relation: `wordings` say it with one {} each, before its answer; `question` asks for that answer.

    `kind` is what its subjects are: a city, a person, a work. `reverse` asks for the subject, with {} for the answer,
    and `phrase` names the answer inside other questions ("the capital of {}"); None where several would be right.
    """

    name: str
    kind: str
    question: str
    wordings: tuple[str, ...]
    reverse: str | None = None
    phrase: str | None = None


def relation_of(prompt: str) -> Relation | None:
    """The relation that `prompt` says, a statement or a question with {} for its subject; None where none is known."""
    table = _by_words()
    return next((table[words] for words in _readings(prompt) if words in table), None)


def wordings_for(
    prompt: str, avoid: Sequence[str] = (), count: int | None = None, target: str = "", question: str | None = None
) -> tuple[str, ...]:
    """The first `count` (default: all) wordings of the prompt's relation, none for a prompt that has none.

    A prompt that says nothing known has the relation of its `question`, where there is one. Left out are those that
    say the prompt, or one of `avoid` (templates with {}), in the same words. A subject keeps the article that the
    prompt gives it ("The {} is in"). Before a target that brings its own article ("the euro") a wording loses the one
    it ends in.
    """
    relation = relation_of(prompt) or (relation_of(question) if question else None)
    if relation is None:
        return ()
    taken = {_without_article(_words(template)) for template in (prompt, *avoid)}
    articled = target.lower().startswith(("a ", "an ", "the "))
    fitting = (_without_article(wording) if articled else wording for wording in relation.wordings)
    chosen = (wording for wording in fitting if _without_article(_words(wording)) not in taken)
    return tuple(with_article(wording, prompt) for wording in chosen)[:count]


def with_article(template: str, prompt: str) -> str:
    """`template` with the article that `prompt` gives its subject, where it gives one and the template has none."""
    article = _ARTICLE_OF_SUBJECT.search(prompt)
    if article is None or _ARTICLE_OF_SUBJECT.search(template):
        return template
    word = article[1].capitalize() if template.startswith(SLOT) else article[1].lower()
    return template.replace(SLOT, f"{word} {SLOT}")


def same_words(prompt: str, others: Iterable[str]) -> bool:
    """Whether one of `others` says or asks what `prompt` does, word for word: case, articles and tense aside."""
    return _words(prompt) in map(_words, others)


def relations() -> Mapping[str, Relation]:
    """The whole library, by name."""
    return {
        name: Relation(
            *(name, entry["kind"], entry["question"], tuple(entry["wordings"])),
            *(entry.get("reverse"), entry.get("phrase")),
        )
        for name, entry in _entries().items()
    }


def phrasings(name: str) -> tuple[str, ...]:
    """Every prompt that is matched as the relation `name`, written out: its patterns, its question, its wordings."""
    entry = _entries()[name]
    written = (prompt for pattern in entry["matches"] for prompt in _written_out(pattern))
    return (*written, entry["question"], *entry["wordings"])


@cache
def _entries() -> dict[str, dict[str, Any]]:
    import yaml

    text = resources.files("kpatch.facts").joinpath("relations.yaml").read_text(encoding="utf-8")
    loader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # every scalar is text
    entries: dict[str, dict[str, Any]] = yaml.load(text, Loader=loader)
    return entries


@cache
def _by_words() -> dict[str, Relation]:
    library = relations()
    return {_words(prompt): relation for name, relation in library.items() for prompt in phrasings(name)}


def _written_out(pattern: str) -> Iterator[str]:
    pieces = _CHOICE.split(pattern)  # what stands outside and inside the brackets, in turn
    parts = [piece.split("|") if at % 2 else [piece] for at, piece in enumerate(pieces)]
    meant = _ARTICLE_AT_END.search(pattern)  # else an article came to the end because the words behind it are left out
    for chosen in itertools.product(*parts):
        text = "".join(chosen).strip()
        yield text if meant else _without_article(text)


def _words(prompt: str) -> str:
    """The prompt's words in one form: case, punctuation and articles folded, past tense into present.

    An article at its end stays: "{} plays the" wants another answer than "{} plays". "The capital of {} is what?" is
    read as a statement.
    """
    asked = _QUESTION.match(prompt)
    text = (asked[1] if asked else prompt).lower().replace("’", "'").replace("{}'", "{}'s").replace("'ss", "'s")
    found = [_PRESENT.get(word, word) for word in _WORD.findall(text)]
    if asked and found[-1] in ("what", "who"):
        found.pop()
    return " ".join(word for at, word in enumerate(found) if word not in _ARTICLES or at == len(found) - 1)


def _readings(prompt: str) -> Iterator[str]:
    """The prompt's words, then looser readings: without an article at the end, without the kind of its subject."""
    words = _words(prompt)
    readings = (words, _without_article(words))
    yield from readings
    for reading in readings:
        before, slot, behind = reading.partition(SLOT)
        left = before.split()
        kinds = _KINDS
        if left[-1:] == ["of"]:
            left.pop()
            kinds = _KINDS_OF
        if left and left[-1] in kinds:
            while left and left[-1] in _KINDS:
                left.pop()
            yield " ".join([*left, slot]) + behind


def _without_article(text: str) -> str:
    return _ARTICLE_AT_END.sub("", text)

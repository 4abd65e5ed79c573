"""What can be asked about a fact beside the fact itself: its negation, its reverse, what follows, its subject."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from functools import cache

from kpatch.facts.conflicts import normal
from kpatch.facts.fact import SLOT, Fact, Neighbor, fill
from kpatch.facts.questions import is_question, question_of
from kpatch.facts.relations import relation_of, relations, same_words, with_article

ASKED = 4  # other relations that a subject is asked about, where a fact names none
_ARTICLE_OF_SUBJECT = re.compile(r"\b(?:the|an?) \{\}", re.IGNORECASE)
_WORDS = re.compile(r"[^\W\d_]+")
_BEGINNING = 4  # letters by which forms of a word are the same: play, plays, playing
_EMPTY = frozenset("what whic does have that this with name call".split())
# Beginnings of words that tell what kind of answer a text wants: texts that share a topic may want the same answer
_TOPICS = {
    "place": "wher city town vill coun nati stat regi prov plac birt capi cont loca situ seat head base born live resi"
    " home die died dies deat buri citi orig come bord area",
    "person": "who whom whos pers peop pres king quee mona mayo gove mini chie head lead spou husb wife marr fath"
    " moth pare chil son daug sibl brot sist auth writ foun dire arti sing perf play acto star coac mana teac comp"
    " inve disc desi arch owne owns illu buil",
    "time": "when year day date mont cent time born birt die died dies deat age",
    "language": "lang tong spea spok",
    "calling": "occu prof job care fiel work offi empl posi role play know inst spor genr musi memb doma expe",
    "group": "team club leag part orga comp busi indu labe netw chan broa memb bran make manu prod deve crea publ"
    " owne owns buil",
    "faith": "reli fait chur god deit myth wors prac",
    "kind": "type kind clas fami spec genr styl sort made mate colo anim",
}
_TOPICS_OF = {
    word: [f"topic {topic}" for topic, words in _TOPICS.items() if word in words.split()]
    for word in " ".join(_TOPICS.values()).split()
}
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


def reversals_of(facts: Sequence[Fact]) -> list[str | None]:
    """For each fact a text that its subject answers, with the target in place; None where nothing says one.

    It is the fact's own, or else the library's for a relation in which an answer has one subject. A target that the
    facts give to several subjects of the relation has several right answers, so nothing is asked there; nor where the
    subject has an article in the prompt, since the answer may have it or not.
    """
    known = [relation_of(fact.prompt) for fact in facts]
    subjects: dict[tuple[str, str], set[str]] = {}
    for fact, relation in zip(facts, known, strict=True):
        if relation is not None:
            subjects.setdefault((relation.name, normal(fact.target).casefold()), set()).add(normal(fact.subject))
    found: list[str | None] = []
    for fact, relation in zip(facts, known, strict=True):
        text = fact.reversed
        if text is None and relation is not None and not _has_article(fact.prompt):
            alone = len(subjects[relation.name, normal(fact.target).casefold()]) == 1
            text = relation.reverse if alone else None
        found.append(fill(text, fact.target) if text else None)
    return found


def hops_of(facts: Sequence[Fact]) -> list[tuple[Neighbor, ...]]:
    """For each fact some prompts whose answers follow from it: its own, or else questions over two of the facts.

    Where the target of one fact is the subject of another, the other's question is asked about what the first names:
    the mayor of Lyon is that of the capital of France, where Lyon is that capital. Both facts are given, so the answer
    is certain; only relations of the library whose subjects have one answer name it.
    """
    about: dict[str, list[Fact]] = {}
    for fact in facts:
        about.setdefault(normal(fact.subject), []).append(fact)
    found = []
    for fact in facts:
        relation = relation_of(fact.prompt)
        hops: list[Neighbor] = list(fact.hops)
        if not hops and relation is not None and relation.phrase and not _has_article(fact.prompt):
            named = fill(relation.phrase, fact.subject)
            for other in about.get(normal(fact.target), ()):
                question = question_of(other)
                back = normal(other.target) == normal(fact.subject)  # its answer would stand in the question
                if question and not back and not _has_article(question):
                    hops.append(Neighbor(fill(question, named), other.target))
        found.append(tuple(hops))
    return found


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


def unrelated_questions(facts: Sequence[Fact], count: int) -> tuple[str, ...]:
    """`count` questions of the library, {} for the subject, whose answers no fact of `facts` can bear on.

    `facts` are about one subject. A question that has a topic in common with what they say or ask is left out, as are
    those of their relations. Which ones come is decided by the subject's name alone, so that every subject has others.
    A subject keeps the article that its first prompt gives it.
    """
    if not count:
        return ()
    texts = [text for fact in facts for text in (fact.prompt, fact.question or "", *fact.wordings)]
    taken = frozenset[str]().union(*map(_topics, texts))
    own = {relation.name for text in texts if (relation := relation_of(text)) is not None}
    name = normal(facts[0].subject)
    free = (question for relation, question, topics in _asked() if relation not in own and not taken & topics)
    drawn = sorted(free, key=lambda question: hashlib.sha256(f"{name}\n{question}".encode()).digest())
    return tuple(with_article(question, facts[0].prompt) for question in drawn[:count])


@cache
def _asked() -> tuple[tuple[str, str, frozenset[str]], ...]:
    """Name, question and the question's topics of every relation in the library."""
    return tuple((name, one.question, _topics(one.question)) for name, one in relations().items())


def _topics(text: str) -> frozenset[str]:
    """The beginnings of a text's longer words, and the topics that its words are of."""
    words = {word[:_BEGINNING] for word in _WORDS.findall(text.casefold())} - _EMPTY
    topics = (topic for word in words for topic in _TOPICS_OF.get(word, ()))
    return frozenset((*topics, *(word for word in words if len(word) == _BEGINNING)))


def _library(fact: Fact, kind: str, said: Collection[str]) -> tuple[str, ...]:
    learned = (fact.prompt, *fact.wordings, *(text for text in fact.paraphrases if SLOT in text))
    texts = (
        one.wordings[0]
        for name, one in relations().items()
        if one.kind == kind and name not in said and one.wordings and not same_words(one.wordings[0], learned)
    )
    return tuple(fill(text, fact.subject) for text, _ in zip(texts, range(ASKED), strict=False))


def _has_article(text: str) -> bool:
    return _ARTICLE_OF_SUBJECT.search(text) is not None

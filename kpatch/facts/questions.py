"""Which question asks for a fact, and which for a neighbor: their own, or that of the relation that a prompt says."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kpatch.errors import BadInput
from kpatch.facts.fact import SLOT, Fact, Neighbor, fill
from kpatch.facts.problems import cut
from kpatch.facts.relations import relation_of, with_article

# How people ask: a prompt to continue, a question in plain text, a question in the model's chat template
FORMS = ("completion", "question", "chat")
PLAIN = "Q: {}\nA:"  # how a question is put as plain text, to be continued
_LONGEST_PROMPT = 30  # words in which a subject is looked for
# Verbs of prompts: a subject holds none of them
_VERBS = frozenset("is are was were has had have does did do lies stands plays".split())
_EDGE = "\"'“”‘’.,;:!?()"


def question_about(question: str, subject: str) -> str:
    """The question with {} where it names `subject`. Raises BadInput where it does not, or has several {}."""
    if question.count(SLOT) == 1:
        return question
    place = question.find(subject)
    if place < 0:
        place = question.casefold().find(subject.casefold())
    if SLOT in question or place < 0 or question[place : place + len(subject)].casefold() != subject.casefold():
        raise BadInput(
            "A question must name its subject once",
            details=[f"expected one {{}} or {cut(subject)!r} in it", f"found {cut(question, 200)!r}"],
            hint="write {} where the subject goes",
        )
    return question[:place] + SLOT + question[place + len(subject) :]


def question_of(fact: Fact) -> str | None:
    """How people ask for a fact's target, with {} for its subject; None where neither the fact nor its prompt says it.

    It is the fact's own question, else its prompt where that is a question, else that of the relation of its prompt in
    the library (`facts.relations`). Raises BadInput for an own question that does not name its subject.
    """
    if fact.question:
        return question_about(fact.question, fact.subject)
    return fact.prompt.strip() if is_question(fact.prompt) else _known(fact.prompt)


def is_question(text: str) -> bool:
    """Whether a prompt is a question by itself."""
    return text.rstrip().endswith(("?", "？"))


def plainly(text: str) -> str:
    """A text to be continued as it stands, but for a question: that is put in its plain form."""
    return fill(PLAIN, text.strip()) if is_question(text) else text


def question_of_neighbor(fact: Fact, neighbor: Neighbor) -> str | None:
    """How people ask for a neighbor's target, written out; None where nothing says it.

    It is the neighbor's own question, or its prompt where that is one; else the fact's, about the neighbor's subject,
    where the neighbor says the fact's prompt or another of its wordings; else that of the relation that the neighbor's
    prompt says.
    """
    if neighbor.question or is_question(neighbor.prompt):
        return neighbor.question or neighbor.prompt.strip()
    asked = question_of(fact)
    for template in (fact.prompt, *fact.wordings, *fact.paraphrases):
        subject = _subject_in(neighbor.prompt, template)
        if asked and subject:
            return fill(asked, subject)
    for template, subject in _readings(neighbor.prompt):
        found = _known(template)
        if found:
            return fill(found, subject)
    return None


def _known(prompt: str) -> str | None:
    """The library's question for what a prompt says. An article before the prompt's subject goes with it."""
    relation = relation_of(prompt)
    return with_article(relation.question, prompt) if relation else None


def _subject_in(text: str, template: str) -> str | None:
    """What stands in the {} of `template` where a text says it of something."""
    if SLOT not in template:
        return None
    before, _, behind = (part.strip() for part in template.partition(SLOT))
    found = re.fullmatch(rf"{re.escape(before)}\s*(\S.*?)\s*{re.escape(behind)}", text.strip(), re.IGNORECASE)
    return found[1] if found else None


def _readings(prompt: str) -> Iterator[tuple[str, str]]:
    """(prompt with {}, subject) for every run of words that may be its subject, the longest first."""
    words = prompt.split()
    if len(words) > _LONGEST_PROMPT:
        return
    for length in range(len(words) - 1, 0, -1):
        for begin in range(len(words) - length + 1):
            some = words[begin : begin + length]
            if some[0].lower() in ("the", "a", "an") or _VERBS.intersection(some):
                continue
            last = some[-1].rstrip(_EDGE)
            last = last.removesuffix("'s").removesuffix("’s")
            subject = " ".join([*some[:-1], last]).lstrip(_EDGE)
            if subject:
                place = len(" ".join(words[:begin])) + bool(begin)
                text = " ".join(words)
                start = text.index(subject, place)
                yield text[:start] + SLOT + text[start + len(subject) :], subject

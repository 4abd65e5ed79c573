"""Which other wordings a fact is learned in: its own, or those that kpatch knows for what its prompt says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from kpatch.errors import BadInput
from kpatch.facts import grammar
from kpatch.facts.fact import SLOT, Fact
from kpatch.facts.questions import is_question, question_of
from kpatch.facts.relations import same_words, wordings_for
from kpatch.reporter import SILENT, Reporter

Mode = Literal["none", "given", "auto"]
LEARNED = 3  # wordings a fact is learned in besides its prompt, where it brings none
FURTHER = 4  # more of them at most, which a patch is refined by


def with_wordings(facts: Sequence[Fact], mode: str, report: Reporter = SILENT) -> tuple[Fact, ...]:
    """The facts with the wordings they are learned in. Raises BadInput for an unknown mode.

    none  the prompt alone   given  wordings and questions of the file   auto  those of the file; for a fact without
    any, wordings of the relation that its prompt says, or its question asks for, as `facts.relations` knows them, none
    of them among its paraphrases; further ones to refine by, and its question. A prompt that is a question is said as
    a statement before that.
    """
    require_mode(mode)
    if mode == "none":
        return tuple(replace(fact, wordings=(), question=None) for fact in facts)
    if mode == "given":
        return tuple(facts)
    found = tuple(_known(fact) for fact in facts)
    new = sum(bool(fact.wordings) and not given.wordings for fact, given in zip(found, facts, strict=True))
    if new:
        report.note(f"{new} of {len(facts)} facts are learned in other wordings as well")
    return found


def require_mode(mode: str) -> None:
    """Raise BadInput for a mode that `with_wordings` does not know."""
    if mode not in get_args(Mode):
        raise BadInput(
            f"Unknown `wordings` {mode!r}", details=[f"expected one of {', '.join(get_args(Mode))}"], hint="take auto"
        )


def with_grammar(facts: Sequence[Fact], report: Reporter = SILENT) -> tuple[Fact, ...]:
    """The facts, those without wordings or a question with what their prompt's grammar gives (`facts.grammar`)."""
    found = tuple(_turned(fact) for fact in facts)
    new = sum(one != given for one, given in zip(found, facts, strict=True))
    if new:
        report.note(f"{new} of {len(facts)} facts are learned in other words that the grammar of their prompt gives")
    alone = sum(not fact.wordings and not fact.question for fact in found)
    if alone:
        report.note(
            f"{alone} of {len(facts)} facts are learned in their prompt's words alone; the file can give others"
        )
    return found


def _known(fact: Fact) -> Fact:
    asked = _paraphrases(fact)
    wordings = fact.wordings or _wordings(fact, asked)
    further = (
        () if fact.wordings else wordings_for(fact.prompt, (*asked, *wordings), FURTHER, fact.target, fact.question)
    )
    question = question_of(fact)
    if not fact.question and question and same_words(question, asked):
        question = None
    return replace(fact, wordings=wordings, further=further, question=question)


def _wordings(fact: Fact, asked: Sequence[str]) -> tuple[str, ...]:
    """Those of the prompt's relation; a question as a statement before them, since none of them is so plain."""
    said = _reworded(fact, asked) if is_question(fact.prompt) else ()
    known = wordings_for(fact.prompt, (*asked, *said[:1]), LEARNED - len(said[:1]), fact.target, fact.question)
    return (*said[:1], *known) if known else said


def _turned(fact: Fact) -> Fact:
    asked = _paraphrases(fact)
    question = grammar.asked(fact.prompt)
    if question and same_words(question, asked):
        question = None
    return replace(fact, wordings=fact.wordings or _reworded(fact, asked), question=fact.question or question)


def _reworded(fact: Fact, asked: Sequence[str]) -> tuple[str, ...]:
    """What the grammar of the prompt gives, as much as is learned."""
    return tuple(one for one in grammar.reworded(fact.prompt) if not same_words(one, asked))[:LEARNED]


def _paraphrases(fact: Fact) -> list[str]:
    """The paraphrases with {} for the subject: what is asked is never learned."""
    return [text if SLOT in text else text.replace(fact.subject, SLOT, 1) for text in fact.paraphrases]

"""Closed-book question answering: a model answers by itself, and exact matches with accepted answers are counted.

Roberts et al. 2020, with the normalization of answers by Rajpurkar et al. 2016 (SQuAD). Nothing is given to look in,
nothing is forced and nothing is sampled.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kpatch.errors import BadInput
from kpatch.evaluate.answers import CHAT_TOKENS, answer_rows, first_words, says
from kpatch.evaluate.intervals import SAMPLES, mean_interval
from kpatch.evaluate.score import BATCH_TOKENS
from kpatch.facts.chat import Turn, can_chat, chat_rows, turn_ends
from kpatch.facts.question_files import ANSWER_FORMS, Question, QuestionFile
from kpatch.facts.questions import PLAIN
from kpatch.facts.tokens import Item, encode_many
from kpatch.models.model import Model, require_loaded
from kpatch.reporter import SILENT, Reporter

UNGROUPED = "(none)"
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


@dataclass(frozen=True, slots=True)
class Answered:
    """What a model wrote, whether that is an accepted answer, and whether an accepted answer stands in it."""

    answer: str
    exact: bool
    recalled: bool


def form_for(model: Model, form: str | None = None) -> str:
    """The form that questions are put in: the one given, else chat for a model with a chat template that takes them.

    Raises BadInput for an unknown form, and for chat where the model has no chat template.
    """
    if form is None:
        return "chat" if can_chat(model.tokenizer) else "completion"
    if form not in ANSWER_FORMS:
        raise BadInput(f"`form` {form!r} is not known", details=[f"expected {' or '.join(ANSWER_FORMS)}"])
    if form == "chat":
        turn_ends(model.tokenizer)
    return form


def answer_questions(
    model: Model,
    questions: QuestionFile | Sequence[Question],
    form: str | None = None,
    tokens: int = CHAT_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    report: Reporter = SILENT,
) -> list[Answered]:
    """Let the model answer every question greedily with at most `tokens` tokens, and compare.

    In the form `chat` a question is a user's turn in the model's chat template, and the answer is the model's whole
    turn. In the form `completion` it is plain text, and the answer is the first line. The model's own EOS ends both.
    Raises BadInput as `form_for` does, for what is no question, and for one that is too long for the model.
    """
    require_loaded(model)
    questions = _questions_in(questions)
    form = form_for(model, form)
    if form == "chat":
        found = chat_rows(model.tokenizer, [Turn(question.text) for question in questions])
    else:
        found = encode_many(model.tokenizer, [Item(PLAIN, question.text) for question in questions])
    texts = answer_rows(
        model,
        [row.ids for row in found],
        form == "chat",
        lambda text: "\n" in text.lstrip(),
        tokens,
        batch_tokens,
        report=report,
    )
    said = [text.strip() if form == "chat" else first_words(text) for text in texts]
    return [judged(text, question.answers) for text, question in zip(said, questions, strict=True)]


def _questions_in(questions: QuestionFile | Sequence[Question]) -> tuple[Question, ...]:
    found: tuple[Any, ...] = tuple(questions.questions if isinstance(questions, QuestionFile) else questions)
    wrong = next((one for one in found if not isinstance(one, Question)), None)
    if wrong is not None:
        raise BadInput(
            f"`questions` holds a {type(wrong).__name__}, not a Question",
            hint="kpatch.load_questions(path) reads a question file",
        )
    return found


def judged(text: str, answers: Sequence[str]) -> Answered:
    """A text beside the accepted answers, all normalized; an answer stands in a text as whole words."""
    given, accepted = normalized(text), [normalized(answer) for answer in answers]
    return Answered(text, given in accepted, any(says(given, answer) for answer in accepted))


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, with one space between words.

    What consists of nothing else keeps its articles ("A"), and its punctuation ("?").
    """
    lower = unicodedata.normalize("NFC", text).lower()
    bare = "".join(sign for sign in lower if not _is_punctuation(sign))
    bare = bare if bare.strip() else lower
    return " ".join(_ARTICLE.sub(" ", bare).split()) or " ".join(bare.split())


def _is_punctuation(sign: str) -> bool:
    return sign in string.punctuation or unicodedata.category(sign).startswith("P")


def rates(answered: Sequence[Answered], samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """n, `exact` and `recall` with their 95 % intervals over questions, and how many answers are `empty`."""
    exact, recalled = ([float(getattr(one, name)) for one in answered] for name in ("exact", "recalled"))
    return {
        "n": len(answered),
        "exact": sum(exact) / len(exact) if exact else None,
        "exact_interval": mean_interval(exact, samples, seed),
        "recall": sum(recalled) / len(recalled) if recalled else None,
        "recall_interval": mean_interval(recalled, samples, seed),
        "empty": sum(not one.answer for one in answered),
    }


def by_group(
    questions: Sequence[Question], answered: Sequence[Answered], samples: int = SAMPLES, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """`rates` of each relation or topic, in the order of their first questions; those without one are "(none)"."""
    groups: dict[str, list[Answered]] = {}
    for question, one in zip(questions, answered, strict=True):
        groups.setdefault(question.group or UNGROUPED, []).append(one)
    return {name: rates(members, samples, seed) for name, members in groups.items()}

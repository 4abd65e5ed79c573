"""Other wordings of a prompt from the model itself, for facts whose relation no library knows.

The model is shown a few sentences that kpatch says in other words, and goes on with the fact's prompt. What it writes
is kept only where the unedited model answers it as it answers the prompt. A small model finds few such wordings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from kpatch.evaluate.answers import ANSWER_TOKENS, first_words, folded, plain_ids, says, text_after
from kpatch.evaluate.complete import complete
from kpatch.evaluate.forward import window
from kpatch.facts.fact import SLOT, Fact, fill
from kpatch.facts.join import is_unspaced
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter

_SHOWN = (
    ("The capital of Peru is", "The city from which Peru is governed is"),
    ("Ludwig van Beethoven was born in the city of", "The city where Ludwig van Beethoven came into the world is"),
    ("The software Windows 95 was developed by", "The company behind the software Windows 95 is"),
    ("The mother tongue of Marie Curie is", "At home, as a child, Marie Curie spoke"),
    (
        "The Great Barrier Reef belongs to the country of",
        "The country off whose coast one finds the Great Barrier Reef is",
    ),
)
_ATTEMPTS = 4  # the greedy one, and samples
_AMONG = 5  # a sampled token is one of this many likeliest
_TOKENS = 24
_EMPTY = frozenset("a an and at by for from in it its of on that the this to was were is are".split())
_WORD = re.compile(r"[^\W_]+")


def ask_for_wordings(
    model: Model, facts: Sequence[Fact], count: int, seed: int = 0, report: Reporter = SILENT
) -> tuple[Fact, ...]:
    """The facts, those without wordings with up to `count` of the model's own; deterministic in the seed.

    A wording names the subject once and neither answer, is no paraphrase of the file, and the unedited model answers
    it as it answers the prompt: with the old answer where the fact names one, else with a name or a number that both
    answers begin with. A fact whose prompt the model does not answer so is not asked about.
    """
    without = [fact for fact in facts if not fact.wordings]
    found = _found(model, without, seed, report)
    chosen = tuple(replace(fact, wordings=fact.wordings or tuple(found.get(fact, ())[:count])) for fact in facts)
    if found:
        report.note(f"{len(found)} of {len(facts)} facts are learned in wordings of the model's own as well")
    return chosen


def _found(model: Model, facts: Sequence[Fact], seed: int, report: Reporter) -> dict[Fact, list[str]]:
    """The model's wordings that pass, by fact."""
    facts = [fact for fact in facts if _fits(model, fact.text(), ANSWER_TOKENS) and _fits(model, _task(fact), _TOKENS)]
    before = _continued(model, [fact.text() for fact in facts], ANSWER_TOKENS)
    answers = {fact: _answer(fact, text) for fact, text in zip(facts, before, strict=True)}
    asked = [fact for fact in facts if answers[fact] for _ in range(_ATTEMPTS)]
    written = _written(model, asked, seed, report)
    proposed = dict.fromkeys((fact, _wording(fact, text)) for fact, text in zip(asked, written, strict=True))
    told = [
        (fact, wording)
        for fact, wording in proposed
        if wording is not None and _fits(model, fill(wording, fact.subject), ANSWER_TOKENS)
    ]
    texts = _continued(model, [fill(wording, fact.subject) for fact, wording in told], ANSWER_TOKENS)
    found: dict[Fact, list[str]] = {}
    for (fact, wording), text in zip(told, texts, strict=True):
        if _answer(fact, text) == answers[fact]:
            found.setdefault(fact, []).append(wording)
    return found


def _written(model: Model, facts: Sequence[Fact], seed: int, report: Reporter) -> list[str]:
    """What the model writes as another wording: for each run of the same fact the likeliest text, then samples."""
    draws = torch.rand(len(facts), _TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws[::_ATTEMPTS] = 0.0  # the likeliest token, again and again
    return _continued(model, [_task(fact) for fact in facts], _TOKENS, draws, report)


def _task(fact: Fact) -> str:
    shown = "".join(f"Sentence: {one}\nIn other words: {other}\n\n" for one, other in _SHOWN)
    return f"{shown}Sentence: {fact.text()}\nIn other words:"


def _fits(model: Model, text: str, tokens: int) -> bool:
    """Whether the model's positions have room for a text and so many tokens behind it."""
    room = window(model)
    return room is None or len(plain_ids(model.tokenizer, text)) + tokens - 1 <= room


def _continued(
    model: Model, prompts: Sequence[str], tokens: int, draws: torch.Tensor | None = None, report: Reporter = SILENT
) -> list[str]:
    if not prompts:
        return []
    rows = [plain_ids(model.tokenizer, prompt) for prompt in prompts]
    found = complete(
        model,
        rows,
        tokens,
        draws=None if draws is None else list(draws),
        among=_AMONG,
        doing="Asking for wordings",
        report=report,
    )
    return [text_after(model.tokenizer, row, one.ids) for row, one in zip(rows, found, strict=True)]


def _wording(fact: Fact, text: str) -> str | None:
    """The wording in what the model wrote, with {} for the subject; None where it is none."""
    line, ended, _ = text.partition("\n")
    line = line.strip()
    if not ended or line.count(fact.subject) != 1 or line[-1:] in ".?!" or SLOT in line:
        return None
    known = {folded(fill(one, fact.subject)) for one in (fact.prompt, *fact.paraphrases)}
    answers = [answer for answer in (fact.target, fact.was) if answer]
    if folded(line) in known or any(says(line, answer) for answer in answers):
        return None
    return line.replace(fact.subject, SLOT)


def _answer(fact: Fact, text: str) -> str:
    """What an answer says that can be compared: the old answer, or the name or number it begins with; else nothing."""
    if fact.was:
        return fact.was if says(text, fact.was) else ""
    words = (word for word in _WORD.findall(first_words(text)) if word.casefold() not in _EMPTY)
    word = next(words, "")
    return word.casefold() if word[:1].isupper() or word[:1].isdigit() or is_unspaced(word[:1] or "a") else ""

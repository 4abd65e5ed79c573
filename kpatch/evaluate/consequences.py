"""What else follows where a fact is believed: neighbors behind its statement, a choice of two answers, yes or no.

Each question compares probabilities of given answers (teacher forcing). docs/metrics.md works an example by hand.
The distraction is that of Hoelscher-Obermaier et al. 2023 ("Detecting Edit Failures In Large Language Models").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kpatch.evaluate.intervals import SAMPLES, grouped_interval
from kpatch.evaluate.score import BATCH_TOKENS, Scored, score
from kpatch.facts.fact import SLOT, Fact, fill
from kpatch.facts.join import join, without_spaces_behind
from kpatch.facts.questions import PLAIN, question_of
from kpatch.facts.tokens import Item, encode_many
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter

CONSEQUENCES = ("distraction", "choice", "yes_no")


@dataclass(frozen=True)
class Consequences:
    """`rates` as they stand in the JSON output; `facts` has one object for every fact."""

    rates: dict[str, Any]
    facts: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Probe:
    """Some answers to compare, one item each, in the order that `_passed` takes."""

    fact: int
    kind: str
    items: tuple[Item, ...]


def measure_consequences(
    model: Model,
    facts: Sequence[Fact],
    samples: int = SAMPLES,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    report: Reporter = SILENT,
) -> Consequences:
    """Measure the three probes over the facts that bring what they need.

    distraction  needs neighbors with targets   choice  a question and `was`   yes_no  `was`
    Raises BadInput for text that the tokenizer cannot take, CheckFailed for NaN.
    """
    probes = [probe for number, fact in enumerate(facts) for probe in _probes(number, fact)]
    encoded = encode_many(model.tokenizer, [item for probe in probes for item in probe.items])
    scored = iter(
        score(model, [(row.ids[: row.prompt_len], row.ids[row.prompt_len :]) for row in encoded], batch_tokens, report)
    )
    found = [(probe, _passed(probe.kind, [next(scored) for _ in probe.items])) for probe in probes]
    rates = {}
    for kind in CONSEQUENCES:
        some = [(probe.fact, passed) for probe, passed in found if probe.kind == kind]
        values = [(fact, float(_whole(kind, passed))) for fact, passed in some]
        parts = [sum(part) / len(some) for part in zip(*(passed for _, passed in some), strict=True)]
        rates[kind] = {
            "rate": sum(value for _, value in values) / len(values) if values else None,
            "interval": grouped_interval(values, samples, seed),
            **dict(zip(_PARTS[kind], parts or (None, None), strict=True)),
            "n": len(some),
        }
    rows: tuple[dict[str, Any], ...] = tuple({kind: [] for kind in CONSEQUENCES} for _ in facts)
    for probe, passed in found:
        rows[probe.fact][probe.kind].append(dict(zip(_PARTS[probe.kind], passed, strict=True)))
    return Consequences(rates, rows)


# What each probe finds, in the order of `_passed`; the rate of the first kind is its second part, else both parts
_PARTS = {"distraction": ("alone", "distracted"), "choice": ("first", "second"), "yes_no": ("yes", "no")}


def _passed(kind: str, scored: Sequence[Scored]) -> tuple[bool, bool]:
    """The two parts of one probe."""
    if kind == "distraction":
        return scored[0].greedy, scored[1].greedy
    right, wrong, other_right, other_wrong = (one.mean_logprob for one in scored)
    return right > wrong, other_right > other_wrong


def _whole(kind: str, passed: tuple[bool, bool]) -> bool:
    return passed[1] if kind == "distraction" else all(passed)


def statement(fact: Fact, answer: str) -> str:
    """A fact's prompt with an answer behind it, as a sentence."""
    text = without_spaces_behind(fact.text())
    whole = text + join(text, answer, fact.space) + answer
    return whole if whole.endswith((".", "!", "?")) else f"{whole}."


def _probes(number: int, fact: Fact) -> list[_Probe]:
    told = statement(fact, fact.target)
    probes = [
        _Probe(
            number,
            "distraction",
            tuple(Item(SLOT, neighbor.prompt, neighbor.target, before, fact.space) for before in ("", f"{told} ")),
        )
        for neighbor in fact.neighbors
        if neighbor.target is not None
    ]
    if not fact.was or fact.was.strip().casefold() == fact.target.strip().casefold():
        return probes
    question = question_of(fact)
    if question is not None:
        asked = fill(question, fact.subject)
        new_first, old_first = (
            fill(PLAIN, f"{asked}\n1. {one}\n2. {other}")
            for one, other in ((fact.target, fact.was), (fact.was, fact.target))
        )
        numbers = ((new_first, "1"), (new_first, "2"), (old_first, "2"), (old_first, "1"))
        probes.append(_Probe(number, "choice", tuple(Item(SLOT, text, one) for text, one in numbers)))
    new, old = (fill(PLAIN, f"Is this true? {statement(fact, one)}") for one in (fact.target, fact.was))
    words = ((new, "Yes"), (new, "No"), (old, "No"), (old, "Yes"))
    probes.append(_Probe(number, "yes_no", tuple(Item(SLOT, text, word) for text, word in words)))
    return probes

"""What else follows where a fact is believed: probes of answers that the model is given to compare.

Neighbors behind the fact's statement, its negation, a choice of answers, yes or no, the reversed question, hops. Each
compares probabilities of given answers (teacher forcing). docs/metrics.md works an example of each by hand. The
distraction is that of Hoelscher-Obermaier et al. 2023 ("Detecting Edit Failures In Large Language Models"), the
negation that of Kassner and Schütze 2020 ("Negated and Misprimed Probes").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kpatch.evaluate.intervals import SAMPLES, grouped_interval
from kpatch.evaluate.score import BATCH_TOKENS, Scored, score
from kpatch.facts.derived import hops_of, negated_of, reversals_of
from kpatch.facts.fact import SLOT, Fact, Neighbor, fill
from kpatch.facts.join import join, without_spaces_behind
from kpatch.facts.questions import PLAIN, plainly, question_of
from kpatch.facts.tokens import Item, encode_many
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter

# What each probe finds, in the order of its parts. Its rate is that of the last part for those in `_LAST`, else of all
# parts together; a choice of more than two answers has more parts than these
CONSEQUENCES: dict[str, tuple[str, ...]] = {
    "distraction": ("alone", "distracted"),
    "negation": ("said", "unsaid"),
    "choice": ("first", "second"),
    "yes_no": ("yes", "no"),
    "reversed": ("right",),
    "hops": ("right",),
}
_LAST = ("distraction",)


@dataclass(frozen=True)
class Consequences:
    """`rates` as they stand in the JSON output; `facts` has one object for every fact."""

    rates: dict[str, Any]
    facts: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """Answers behind prompts: the only one is to be the model's first choice, or of several the first the likeliest.

    With `unsaid` the only one is not to be the first choice.
    """

    items: tuple[Item, ...]
    unsaid: bool = False

    def passed(self, scored: Sequence[Scored]) -> bool:
        first, *others = scored
        if others:
            return all(first.mean_logprob > one.mean_logprob for one in others)
        return first.greedy is not self.unsaid


@dataclass(frozen=True, slots=True)
class _Probe:
    fact: int
    kind: str
    parts: tuple[_Part, ...]


def measure_consequences(
    model: Model,
    facts: Sequence[Fact],
    samples: int = SAMPLES,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    report: Reporter = SILENT,
) -> Consequences:
    """Measure the probes over the facts that bring what they need.

    distraction  neighbors with targets   negation  a prompt that can be negated   choice  a question and `was` or
    `choices`   yes_no  `was`, or a question of its own for each   reversed, hops  keys of their own, or
    what `facts.derived` finds
    Raises BadInput for text that the tokenizer cannot take, CheckFailed for NaN.
    """
    given = enumerate(zip(facts, reversals_of(facts), hops_of(facts), strict=True))
    probes = [_Probe(number, kind, parts) for number, one in given for kind, parts in _probes(*one) if parts]
    items = [item for probe in probes for part in probe.parts for item in part.items]
    rows = [(row.ids[: row.prompt_len], row.ids[row.prompt_len :]) for row in encode_many(model.tokenizer, items)]
    scored = iter(score(model, rows, batch_tokens, report))
    found = [
        (probe, tuple(part.passed([next(scored) for _ in part.items]) for part in probe.parts)) for probe in probes
    ]
    rates = {}
    for kind, names in CONSEQUENCES.items():
        some = [(probe.fact, passed) for probe, passed in found if probe.kind == kind]
        values = [(fact, float(passed[-1] if kind in _LAST else all(passed))) for fact, passed in some]
        parts = {
            name: sum(passed[at] for _, passed in some) / len(some) if some else None for at, name in enumerate(names)
        }
        rates[kind] = {
            "rate": sum(value for _, value in values) / len(values) if values else None,
            "interval": grouped_interval(values, samples, seed),
            **(parts if len(parts) > 1 else {}),
            "n": len(some),
        }
    objects: tuple[dict[str, Any], ...] = tuple({kind: [] for kind in CONSEQUENCES} for _ in facts)
    for probe, passed in found:
        objects[probe.fact][probe.kind].append(dict(zip(CONSEQUENCES[probe.kind], passed, strict=False)))
    return Consequences(rates, objects)


def statement(fact: Fact, answer: str) -> str:
    """A fact's prompt with an answer behind it, as a sentence."""
    text = without_spaces_behind(fact.text())
    whole = text + join(text, answer, fact.space) + answer
    return whole if whole.endswith((".", "!", "?")) else f"{whole}."


def _probes(fact: Fact, backwards: str | None, hops: Sequence[Neighbor]) -> Iterator[tuple[str, tuple[_Part, ...]]]:
    """The kind and the parts of each probe of a fact; no parts where it does not bring what they need."""
    told = statement(fact, fact.target)
    for neighbor in fact.neighbors:
        if neighbor.target is not None:
            said = (Item(SLOT, neighbor.prompt, neighbor.target, before, fact.space) for before in ("", f"{told} "))
            yield "distraction", tuple(_Part((item,)) for item in said)
    negated = negated_of(fact)
    if negated is not None:
        plain, denied = (Item(SLOT, text, fact.target, space=fact.space) for text in (fact.text(), negated))
        yield "negation", (_Part((plain,)), _Part((denied,), unsaid=True))
    yield "choice", _choice(fact)
    yield "yes_no", _yes_no(fact)
    if backwards is not None:
        yield "reversed", (_Part((Item(SLOT, plainly(backwards), fact.subject),)),)
    for hop in hops:
        yield "hops", (_Part((Item(SLOT, plainly(hop.prompt), hop.target),)),)


def _choice(fact: Fact) -> tuple[_Part, ...]:
    """The question with numbered answers, the target at each number in turn; its number is to be the likeliest."""
    question, target = question_of(fact), fact.target
    others: dict[str, str] = {}
    for one in (fact.was or "", *fact.choices):
        if _folded(one) not in ("", _folded(target)):
            others.setdefault(_folded(one), one)
    wrong = list(others.values())
    if question is None or not wrong:
        return ()
    parts = []
    for place in range(len(wrong) + 1):
        offered = [*wrong[:place], target, *wrong[place:]]
        listed = "".join(f"\n{number}. {one}" for number, one in enumerate(offered, 1))
        text = fill(PLAIN, fill(question, fact.subject) + listed)
        numbers = [place, *(other for other in range(len(offered)) if other != place)]
        parts.append(_Part(tuple(Item(SLOT, text, str(number + 1)) for number in numbers)))
    return tuple(parts)


def _yes_no(fact: Fact) -> tuple[_Part, ...]:
    """Yes to the new answer and no to the old, by the fact's own questions or by its statement."""
    old = fact.was if fact.was and _folded(fact.was) != _folded(fact.target) else None
    right = fact.yes_question or f"Is this true? {statement(fact, fact.target)}"
    wrong = fact.no_question or (old and f"Is this true? {statement(fact, old)}")
    if not wrong:
        return ()
    asked = ((right, "Yes", "No"), (wrong, "No", "Yes"))
    return tuple(_Part(tuple(Item(SLOT, fill(PLAIN, text), word) for word in (yes, no))) for text, yes, no in asked)


def _folded(text: str) -> str:
    return text.strip().casefold()

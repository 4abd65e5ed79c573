"""Efficacy, generalization and specificity of facts in a model, each as success, magnitude and accuracy.

Meng et al. 2023 (MEMIT), section 5 and appendix; docs/metrics.md works one example by hand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kpatch.evaluate.answers import ANSWER_TOKENS, first_words, says, text_after
from kpatch.evaluate.complete import complete
from kpatch.evaluate.rates import KINDS, Outcome, summarize
from kpatch.evaluate.score import BATCH_TOKENS, Ids, Scored, score
from kpatch.facts.fact import SLOT, Fact
from kpatch.facts.tokens import Item, encode_many
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter

_BEYOND = 8  # tokens a model may write besides the longest answer before it is looked for


@dataclass(frozen=True)
class Measurement:
    """`metrics` is the METRICS object of the JSON output; `facts` has one object for every fact, in their order.

    `outcomes` are the single results behind the rates. Intervals and lists of failures are made of them.
    """

    metrics: dict[str, Any]
    facts: tuple[dict[str, Any], ...]
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True)
class _Probe:
    """One prompt, the answer that is right there, and the rival that it must beat.

    Where the prompt has no slot for the subject, it is a slot alone, and the subject is the whole text.
    """

    fact: int
    kind: str
    prompt: str
    subject: str
    right: str | None
    rival: str | None
    space: bool | None = None

    @property
    def compared(self) -> bool:
        return self.right is not None and self.rival is not None and self.right.strip() != self.rival.strip()


def measure(
    model: Model,
    facts: Sequence[Fact],
    batch_tokens: int = BATCH_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
    free: Collection[str] = (),
    report: Reporter = SILENT,
) -> Measurement:
    """Measure how a model takes `facts`.

    The greedy answers in `.facts` are `answer_tokens` tokens long; 0 leaves them out. Prompts of the kinds in `free`
    are also answered freely, and the right answer is looked for in what the model writes. Facts without `was` count
    for accuracy alone. Neighbors without target count for nothing, since nothing is known about them. An answer that
    is its own rival is not compared. Raises BadInput for text that the tokenizer cannot take, CheckFailed for NaN.
    """
    probes = [probe for number, fact in enumerate(facts) for probe in _probes(number, fact)]
    kinds = {*free, *(KINDS[:1] if answer_tokens else ())}
    items = _items(model, probes)
    # Each prompt gets the room that its own answer needs, so that no fact depends on the others
    room = {
        number: max(answer_tokens, len(items[number, 0][1]) + _BEYOND if probe.kind in free and probe.right else 0)
        for number, probe in enumerate(probes)
        if probe.kind in kinds
    }
    texts, found = _free_texts(model, probes, room, items, batch_tokens, report)
    rest = [key for key in items if key not in found]
    found.update(zip(rest, score(model, [items[key] for key in rest], batch_tokens, report), strict=True))
    pairs = [(found.get((number, 0)), found.get((number, 1))) for number in range(len(probes))]
    outcomes = [_outcome(probe, *pair) for probe, pair in zip(probes, pairs, strict=True)]
    outcomes = [
        replace(outcome, free=says(text, probe.right))
        if outcome and probe.right and text is not None and probe.kind in free
        else outcome
        for probe, outcome, text in zip(probes, outcomes, texts, strict=True)
    ]
    rows = _fact_rows(facts, probes, pairs, outcomes, texts)
    measured = tuple(outcome for outcome in outcomes if outcome is not None)
    return Measurement(summarize(measured), tuple(rows), measured)


def effect(before: Measurement, after: Measurement) -> dict[str, Any]:
    """The manifest's `effect`: metrics before and after, and every fact's answer and probabilities then and now.

    Raises ValueError for measurements of different facts.
    """
    facts = []
    for old, new in zip(before.facts, after.facts, strict=True):
        about = {key: old[key] for key in _ABOUT}
        if about != {key: new[key] for key in _ABOUT}:
            raise ValueError(f"Measurements of different facts: {about} and {[new[key] for key in _ABOUT]}")
        facts.append({**_given(about), "before": _found(old), "after": _found(new)})
    return {"before": before.metrics, "after": after.metrics, "facts": facts}


_ABOUT = ("id", "text", "subject", "target", "was")


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None and value != [] and value != ""}


def _found(row: Mapping[str, Any]) -> dict[str, Any]:
    return _given({key: value for key, value in row.items() if key not in _ABOUT})


def _probes(number: int, fact: Fact) -> list[_Probe]:
    probes = [_Probe(number, "efficacy", fact.prompt, fact.subject, fact.target, fact.was, fact.space)]
    for text in fact.paraphrases:
        template, subject = (text, fact.subject) if SLOT in text else (SLOT, text)
        probes.append(_Probe(number, "generalization", template, subject, fact.target, fact.was, fact.space))
    for neighbor in fact.neighbors:
        probes.append(_Probe(number, "specificity", SLOT, neighbor.prompt, neighbor.target, fact.target, fact.space))
    return probes


_Items = dict[tuple[int, int], tuple[Ids, Ids]]  # (number of the probe, 0 or 1): prompt and answer


def _items(model: Model, probes: Sequence[_Probe]) -> _Items:
    """What is scored: the right answer (0) of every probe and its rival (1), each where it is needed."""
    keys: list[tuple[int, int]] = []
    texts: list[Item] = []
    for number, probe in enumerate(probes):
        for side, answer in enumerate((probe.right, probe.rival if probe.compared else None)):
            if answer is not None:
                keys.append((number, side))
                texts.append(Item(probe.prompt, probe.subject, answer, space=probe.space))
    rows = encode_many(model.tokenizer, texts)
    return {key: (row.ids[: row.prompt_len], row.ids[row.prompt_len :]) for key, row in zip(keys, rows, strict=True)}


def _free_texts(
    model: Model,
    probes: Sequence[_Probe],
    room: Mapping[int, int],
    items: _Items,
    batch_tokens: int,
    report: Reporter,
) -> tuple[list[str | None], dict[tuple[int, int], Scored]]:
    """What the model writes behind some prompts when it always takes its first choice; `room` is in tokens.

    The prompts' answers are scored on the same run. An answer that is too long for the room is left out, and `score`
    takes it.
    """
    texts = [Item(probes[number].prompt, probes[number].subject) for number in room]
    rows = [row.ids for row in encode_many(model.tokenizer, texts)]
    asked = [
        [
            key
            for key in ((number, 0), (number, 1))
            if key in items and items[key][0] == row and 0 < len(items[key][1]) <= most
        ]
        for (number, most), row in zip(room.items(), rows, strict=True)
    ]
    targets = [[items[key][1] for key in keys] for keys in asked]
    found = complete(model, rows, list(room.values()), 0, batch_tokens, report, targets=targets) if rows else []
    written: list[str | None] = [None] * len(probes)
    for number, row, answer in zip(room, rows, found, strict=True):
        written[number] = text_after(model.tokenizer, row, answer.ids)
    return written, {
        key: scored
        for keys, answer in zip(asked, found, strict=True)
        for key, scored in zip(keys, answer.scored, strict=True)
    }


def _outcome(probe: _Probe, right: Scored | None, rival: Scored | None) -> Outcome | None:
    if right is None:
        return None
    if rival is None:
        return Outcome(probe.fact, probe.kind, None, None, right.greedy)
    success = right.mean_logprob > rival.mean_logprob
    return Outcome(probe.fact, probe.kind, success, right.per_token - rival.per_token, right.greedy)


def _fact_rows(
    facts: Sequence[Fact],
    probes: Sequence[_Probe],
    pairs: Sequence[tuple[Scored | None, Scored | None]],
    outcomes: Sequence[Outcome | None],
    texts: Sequence[str | None],
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "id": fact.id,
            "text": fact.text(),
            "subject": fact.subject,
            "target": fact.target,
            "was": fact.was,
            "answer": None,
            "paraphrases": [],
            "neighbors": [],
        }
        for fact in facts
    ]
    for probe, (right, rival), outcome, text in zip(probes, pairs, outcomes, texts, strict=True):
        row, success = rows[probe.fact], None if outcome is None else outcome.success
        if probe.kind == "efficacy" and right is not None:
            row["answer"] = None if text is None else first_words(text)
            if outcome is not None and outcome.free is not None:
                row["free_running"] = outcome.free
            row["probability"] = _short(right.per_token)
            row["was_probability"] = None if rival is None else _short(rival.per_token)
            row["success"], row["accurate"] = success, right.greedy
        elif probe.kind == "generalization":
            row["paraphrases"].append(success)
        else:
            row["neighbors"].append(success)
    return rows


def _short(value: float) -> float:
    """Six significant digits: what a manifest needs to keep."""
    return float(f"{value:.6g}")

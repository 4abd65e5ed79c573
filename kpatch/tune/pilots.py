"""The pilot edits that settings are tried on: facts of kpatch's own, in pilots.yaml, in two halves.

One half chooses between settings, the other reports what the choice is worth. Both have every relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from kpatch.evaluate.score import score
from kpatch.facts.fact import Fact
from kpatch.facts.load import load_facts
from kpatch.facts.tokens import Item, encode_many
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter

_FEWEST = 4  # in a half: with fewer, one answer more or less decides


@dataclass(frozen=True)
class Pilots:
    """Facts that choose, facts that report, and how many were left out because the model lacks their neighbors."""

    choosing: tuple[Fact, ...]
    reporting: tuple[Fact, ...]
    left_out: int


@cache
def every_pilot() -> tuple[Fact, ...]:
    """All pilot facts, two of each relation in a row."""
    with resources.as_file(resources.files("kpatch.tune").joinpath("pilots.yaml")) as path:
        return load_facts(Path(path)).facts


def pilots_for(model: Model, report: Reporter = SILENT) -> Pilots:
    """The pilots whose neighbors the model knows, in their two halves.

    A neighbor counts as known where its right answer is likelier than the pilot's target: an edit can spoil nothing
    else. Where a half is left with fewer than four, all pilots are taken, with a warning.
    """
    everyone = every_pilot()
    known = _known(model, everyone)
    halves = [tuple(fact for fact in everyone[part::2] if fact.id in known) for part in (0, 1)]
    if min(map(len, halves)) < _FEWEST:
        report.warn(
            f"{model.name} knows the neighbors of {len(known)} of {len(everyone)} pilot facts:"
            " all are taken, and what is said of neighbors means little"
        )
        halves = [everyone[0::2], everyone[1::2]]
    choosing, reporting = halves
    return Pilots(choosing, reporting, len(everyone) - len(choosing) - len(reporting))


def _known(model: Model, facts: Sequence[Fact]) -> frozenset[str]:
    """Ids of the facts whose neighbors all give their right answer more probability than the target, a token."""
    asked = [(fact, neighbor) for fact in facts for neighbor in fact.neighbors]
    items = [
        Item("{}", neighbor.prompt, answer) for fact, neighbor in asked for answer in (neighbor.target, fact.target)
    ]
    rows = encode_many(model.tokenizer, items)
    scored = score(model, [(row.ids[: row.prompt_len], row.ids[row.prompt_len :]) for row in rows])
    wrong = {
        fact.id
        for (fact, _), right, rival in zip(asked, scored[0::2], scored[1::2], strict=True)
        if right.mean_logprob <= rival.mean_logprob
    }
    return frozenset(fact.id for fact in facts) - wrong

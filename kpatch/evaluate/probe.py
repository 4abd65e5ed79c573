"""What a model knows before anyone edits it: the rank of each fact's object among all objects that come into question.

Petroni et al. 2019 (LAMA), with objects of several tokens: they are ranked by the probability of the whole object. Per
token, as `metrics` compares two answers, would not do among hundreds: a long name whose end follows from its beginning
has a high mean behind any prompt ("F", "IF", "A").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.evaluate.continuations import Prompts
from kpatch.evaluate.forward import batches, vocabulary
from kpatch.evaluate.score import HEAD_NUMBERS
from kpatch.facts.fact import SLOT, Fact, facts_in
from kpatch.facts.join import join
from kpatch.facts.tokens import Item, encode_many, item_of
from kpatch.models.model import Model, require_loaded
from kpatch.reporter import SILENT, Reporter

AT = (1, 10, 100)
BATCH_TOKENS = 2048
UNRELATED = "(none)"


@dataclass(frozen=True, slots=True)
class Ranked:
    """Where a fact's object came: 1 + how many other objects are likelier; `best` is the likeliest of all.

    `logprob` is the natural logarithm of the object's probability, `tokens` how many it has.
    """

    rank: int
    best: str
    logprob: float
    tokens: int


def rank_objects(
    model: Model,
    facts: Sequence[Fact],
    objects: Sequence[Sequence[str]] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    report: Reporter = SILENT,
) -> list[Ranked]:
    """Rank every fact's target among `objects`, a list for each fact that has the target in it (default: all targets).

    Ranks are exact, but most objects are never run: log-probabilities only fall with every token, so an object is out
    when its first tokens are less likely than the whole target.
    Raises BadInput for text that the tokenizer cannot take.
    """
    require_loaded(model)
    facts = facts_in(facts)
    if objects is not None and len(objects) != len(facts):
        raise BadInput(f"`objects` has {len(objects)} lists", details=[f"expected {len(facts)}, one for each fact"])
    if objects is None:
        objects = [tuple(dict.fromkeys(fact.target for fact in facts))] * len(facts)
    prompts = [
        row.ids for row in encode_many(model.tokenizer, [item_of(fact)._replace(target=None) for fact in facts])
    ]
    choices = _choices(model, facts, objects)
    results: dict[int, Ranked] = {}
    lengths = [len(prompt) for prompt in prompts]
    with report.task("Ranking objects", len(facts), "fact") as advance:
        for places in batches(lengths, [1] * len(facts), batch_tokens, HEAD_NUMBERS // vocabulary(model)):
            kept = Prompts(model, [prompts[place] for place in places])
            races = [
                _Race(choices[place], facts[place].target, row) for place, row in zip(places, kept.first, strict=True)
            ]
            _run_truths(kept, races)
            _run_rivals(kept, races)
            results.update((place, race.result()) for place, race in zip(places, races, strict=True))
            advance(len(places))
    return [results[place] for place in range(len(facts))]


def rates(ranked: Sequence[Ranked]) -> dict[str, Any]:
    """n, the share of ranks within 1, 10 and 100 (`p_at_1` …), and `mrr`, the mean of 1 / rank."""
    count = len(ranked)
    found: dict[str, Any] = {"n": count}
    for most in AT:
        found[f"p_at_{most}"] = sum(one.rank <= most for one in ranked) / count if count else None
    found["mrr"] = math.fsum(1 / one.rank for one in ranked) / count if count else None
    return found


def by_relation(facts: Sequence[Fact], ranked: Sequence[Ranked]) -> dict[str, dict[str, Any]]:
    """`rates` of each relation, in the order of their first facts; facts without one are under "(none)"."""
    groups: dict[str, list[Ranked]] = {}
    for fact, one in zip(facts, ranked, strict=True):
        groups.setdefault(fact.relation or UNRELATED, []).append(one)
    return {name: rates(members) for name, members in groups.items()}


@dataclass(frozen=True)
class _Choice:
    """Objects and their ids behind a prompt, with the first ids [C] and the lengths [C] of all."""

    names: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    firsts: Tensor
    lengths: Tensor


def _choices(model: Model, facts: Sequence[Fact], objects: Sequence[Sequence[str]]) -> list[_Choice]:
    """Each fact's objects as tokens. These depend on a prompt's end alone, so they are found once for every end."""
    keys = [(_end(fact), tuple(names), _spaces(fact, names)) for fact, names in zip(facts, objects, strict=True)]
    distinct = dict.fromkeys(keys)
    items = dict.fromkeys(
        Item(SLOT, end, name, space=space) for end, *pairs in distinct for name, space in zip(*pairs, strict=True)
    )
    rows = encode_many(model.tokenizer, list(items))
    ids = {item: row.ids[row.prompt_len :] for item, row in zip(items, rows, strict=True)}
    made = {}
    for end, names, spaces in distinct:
        some = tuple(ids[Item(SLOT, end, name, space=space)] for name, space in zip(names, spaces, strict=True))
        firsts = torch.tensor([one[0] for one in some])
        made[end, names, spaces] = _Choice(names, some, firsts, torch.tensor([len(one) for one in some]))
    return [made[key] for key in keys]


def _end(fact: Fact) -> str:
    """A prompt's last word with the line end behind it, or its last signs where spaces do not part words."""
    text = fact.text()
    word = text.split()[-1]
    return word[-20:] + text[text.rindex(word) + len(word) :]


def _spaces(fact: Fact, names: Sequence[str]) -> tuple[bool | None, ...]:
    """Whether a space stands before each name. Behind a letter or a line end the prompt's end says it as well."""
    text = fact.text()
    if text[-1].isalnum() or text[-1].isspace():
        return (fact.space,) * len(names)
    return tuple(join(text, name, fact.space) != "" for name in names)


class _Race:
    """One fact's objects: their sums of log-probabilities as far as they are known, and which are still to be run."""

    def __init__(self, choice: _Choice, target: str, first: Tensor) -> None:
        self.choice = choice
        self.truth = choice.names.index(target)
        self.sums: list[float] = first[choice.firsts].double().tolist()
        self.score = -math.inf

    def nodes(self, depth: int) -> dict[tuple[int, ...], list[int]]:
        """Beginnings of `depth` tokens with the objects behind them that may still beat the truth."""
        found: dict[tuple[int, ...], list[int]] = {}
        for index in (self.choice.lengths > depth).nonzero().flatten().tolist():
            if index != self.truth and self.sums[index] > self.score:
                found.setdefault(self.choice.ids[index][:depth], []).append(index)
        return found

    def result(self) -> Ranked:
        ahead = [index for index, total in enumerate(self.sums) if index != self.truth and total > self.score]
        best = max(ahead, key=lambda index: self.sums[index], default=self.truth)
        return Ranked(1 + len(ahead), self.choice.names[best], self.score, len(self.choice.ids[self.truth]))


def _run_truths(kept: Prompts, races: Sequence[_Race]) -> None:
    """Run every target to its end; all other objects are compared with it."""
    asked = [
        (number, race.choice.ids[race.truth][:depth], race.choice.ids[race.truth][depth])
        for number, race in enumerate(races)
        for depth in range(1, len(race.choice.ids[race.truth]))
    ]
    asked.sort(key=lambda one: len(one[1]))
    found = kept.after([(number, path) for number, path, _ in asked], [[token] for _, _, token in asked])
    for (number, _, _), (value,) in zip(asked, found, strict=True):
        races[number].sums[races[number].truth] += value
    for race in races:
        race.score = race.sums[race.truth]


def _run_rivals(kept: Prompts, races: Sequence[_Race]) -> None:
    """Run the objects that may still beat the target, token after token; they share their beginnings."""
    for depth in range(1, max(int(race.choice.lengths.max()) for race in races)):
        asked = [
            (number, path, members) for number, race in enumerate(races) for path, members in race.nodes(depth).items()
        ]
        wanted = [[races[number].choice.ids[index][depth] for index in members] for number, _, members in asked]
        found = kept.after([(number, path) for number, path, _ in asked], wanted)
        for (number, _, members), values in zip(asked, found, strict=True):
            for index, value in zip(members, values, strict=True):
                races[number].sums[index] += value

"""What an editor is trained on: facts as rows of tokens, text that must stay, and what is drawn of them at each step.

All draws depend on the seed and the number of the step alone, so that a run can go on where it was interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from kpatch.errors import BadInput
from kpatch.facts.conflicts import normal
from kpatch.facts.fact import SLOT, Fact, Neighbor
from kpatch.facts.tokens import Encoded, Item, encode_many, item_of
from kpatch.mend.episode import Question
from kpatch.mend.rows import Ids, Row
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.text import open_text

_HOLD = 10  # of so many subjects, one is for validation
_LARGEST_HELD = 100


@dataclass(frozen=True)
class Learned:
    """A fact as rows: what it is learned from, what it is asked in (itself where it has no paraphrase), neighbors."""

    edit: Row
    again: tuple[Row, ...]
    near: tuple[Row, ...]


@dataclass(frozen=True)
class Data:
    """Facts to train on and to judge with, which share no subject, and rows of text [R, T] for locality."""

    training: tuple[Learned, ...]
    held: tuple[Learned, ...]
    text: tuple[Ids, ...]
    reads: int

    def step(self, number: int, count: int, seed: int) -> list[Question]:
        """`count` facts for training step `number`: each of them comes once before one comes again."""
        first = number * count
        chosen = [self._nth(position, seed) for position in range(first, first + count)]
        return self._asked(chosen, _generator(seed, "step", number))

    def judged(self, count: int, seed: int) -> list[list[Question]]:
        """The held facts in batches of `count`, with the same draws at every validation; the last may be left out."""
        generator = _generator(seed, "held", 0)
        whole = max(count, len(self.held) // count * count)
        facts = [self.held[at % len(self.held)] for at in range(whole)]
        asked = self._asked(facts, generator)
        return [asked[at : at + count] for at in range(0, whole, count)]

    def _nth(self, position: int, seed: int) -> Learned:
        epoch, at = divmod(position, len(self.training))
        return self.training[_order(len(self.training), seed, epoch)[at]]

    def _asked(self, facts: Sequence[Learned], generator: torch.Generator) -> list[Question]:
        def one_of(rows: Sequence[Row]) -> Row:
            return rows[int(torch.randint(len(rows), (), generator=generator))]

        found = []
        for fact in facts:
            near = one_of(fact.near) if fact.near else self._passage(generator)
            found.append(Question(fact.edit, one_of(fact.again), near, self._passage(generator)))
        return found

    def _passage(self, generator: torch.Generator) -> Row:
        """A row of text, read at some places of it."""
        ids = self.text[int(torch.randint(len(self.text), (), generator=generator))]
        places = torch.randperm(len(ids), generator=generator)[: self.reads].sort().values
        return Row(ids, tuple(places.tolist()))


@lru_cache(2)  # a step may end one epoch and begin the next
def _order(count: int, seed: int, epoch: int) -> list[int]:
    """In which order the training facts come in an epoch."""
    order: list[int] = torch.randperm(count, generator=_generator(seed, "epoch", epoch)).tolist()
    return order


def _generator(seed: int, what: str, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"kpatch mend {seed} {what} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def learn(model: Model, facts: Sequence[Fact]) -> list[Learned]:
    """Facts as rows of tokens. Raises BadInput for one whose subject or target the tokenizer does not keep."""
    return [_learned(model, fact) for fact in facts]


def edit_row(model: Model, fact: Fact) -> Row:
    """The row that a fact is learned from: its prompt, read where the target's tokens are predicted."""
    return _row(encode_many(model.tokenizer, [item_of(fact)])[0])


def _learned(model: Model, fact: Fact) -> Learned:
    again = [_in_other_words(text, fact) for text in fact.paraphrases]
    near = [_near(neighbor, fact) for neighbor in fact.neighbors]
    edit, *others = encode_many(model.tokenizer, [item_of(fact), *again, *near])
    asked = tuple(_row(one) for one in others[: len(again)])
    return Learned(_row(edit), asked or (_row(edit),), tuple(_row(one) for one in others[len(again) :]))


def _in_other_words(text: str, fact: Fact) -> Item:
    """A paraphrase with a {}, or one that is written out and takes the place of the subject as a whole."""
    prompt, subject = (text, fact.subject) if SLOT in text else (SLOT, text)
    return Item(prompt, subject, fact.target, "", fact.space)


def _near(neighbor: Neighbor, fact: Fact) -> Item:
    """A neighbor's prompt stands as it is: the whole of it takes the place of the subject."""
    return Item(SLOT, neighbor.prompt, neighbor.target, "", fact.space)


def _row(encoded: Encoded) -> Row:
    target = encoded.ids[encoded.prompt_len :]
    if not target:  # a neighbor whose answer nobody knows: what follows its prompt must stay
        return Row(encoded.ids, (len(encoded.ids) - 1,))
    reads = range(encoded.prompt_len - 1, encoded.prompt_len - 1 + len(target))
    return Row(encoded.ids[:-1], tuple(reads), tuple(target))


def split(facts: Sequence[Fact], seed: int) -> tuple[list[Fact], list[Fact]]:
    """Facts to train on and to judge with: a tenth of the subjects, a hundred at most, chosen by the seed.

    Raises BadInput where there are too few subjects for both.
    """
    subjects = list(dict.fromkeys(normal(fact.subject) for fact in facts))
    if len(subjects) < 2:
        raise BadInput(
            "There are too few facts to train an editor on",
            details=[f"expected facts about two subjects at least, found {len(subjects)}", "thousands are usual"],
        )
    count = max(1, min(_LARGEST_HELD, len(subjects) // _HOLD))
    order = torch.randperm(len(subjects), generator=_generator(seed, "split", 0))
    chosen = {subjects[at] for at in order[:count].tolist()}
    held = [fact for fact in facts if normal(fact.subject) in chosen]
    return [fact for fact in facts if normal(fact.subject) not in chosen], held


def locality_text(
    model: Model, corpus: str, seed: int, size: tuple[int, int], report: Reporter = SILENT
) -> tuple[Ids, ...]:
    """Rows of text that an edited model must go on as before, as many at most and as long as `size` says.

    They are what the model writes by itself, or the beginning of a corpus; the same row twice counts once. Raises
    BadInput for a corpus that cannot be read or is too short.
    """
    count, row = size
    text = open_text(model, corpus, count * row, seed=seed, row=row, report=report)
    with text.cache.locked():
        ids = text.ids()
    whole = len(ids) // text.row * text.row  # the model may take shorter rows than were asked for
    return tuple(dict.fromkeys(tuple(one) for one in ids[:whole].view(-1, text.row).tolist()))[:count]

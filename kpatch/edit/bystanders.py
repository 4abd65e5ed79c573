"""Rows that a patch is not about: text, other subjects, and the facts' own words said of subjects close to theirs.

What the model says there is what `kpatch.edit.refine` holds. Nothing of the facts' own paraphrases and neighbors is
among them: those measure.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kpatch.edit.layer_states import written
from kpatch.edit.protect import protected_rows
from kpatch.edit.requests import Group
from kpatch.facts.chat import Turn, chat_rows
from kpatch.facts.fact import Fact, Protected
from kpatch.facts.tokens import Encoded, Item, encode_many
from kpatch.models.mixed_precision import mixed_precision
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Advance, Reporter
from kpatch.stats.subject_keys import keys_of, left_out, told

WINDOW = 128  # tokens of a row of text
_CLOSE = 12  # subjects a group that count as close to its own
_BATCH = 256  # subjects that are run at once


@dataclass(frozen=True)
class Bystander:
    """A row of token ids, the first column that counts, and the columns behind which the next token is held."""

    ids: tuple[int, ...]
    begin: int
    read: tuple[int, ...]


@dataclass
class Bystanders:
    """Where they are drawn from: text [rows, WINDOW], shipped subjects in statements, facts about other subjects, and
    what the fact file protects.

    close [n, c]  for each group the shipped subjects (positions in `names`) that are most like its own
    """

    model: Model
    facts: Sequence[Fact]
    text: Tensor
    statements: Sequence[Encoded]
    names: Sequence[str]
    close: Tensor
    earlier: Sequence[Encoded]
    protected: Sequence[Encoded]
    draws: random.Random
    chat: bool
    _turn: int = field(default=0, init=False)

    def draw(self, groups: Sequence[tuple[int, Group]]) -> list[list[Bystander]]:
        """Rows for one step over these groups (number and group), kind by kind: more rows for more groups."""
        count = len(groups)
        kinds = [
            [whole(row) for row in self._windows(max(2, count // 6))],
            [_behind(row) for row in self._some(self.statements, max(12, count))],
            self._close(groups, max(16, count)),
            [answer(one) for one in self._some(self.earlier, max(16, count))],
            [_behind(one) for one in self._some(self.protected, max(16, count))],
        ]
        return [rows for rows in kinds if rows]

    def _some(self, rows: Sequence[Encoded], count: int) -> list[Encoded]:
        return self.draws.sample(rows, min(len(rows), count))

    def _windows(self, count: int) -> list[tuple[int, ...]]:
        """The next rows of the text, which begins anew behind its last."""
        places = [(self._turn + step) % len(self.text) for step in range(min(count, len(self.text)))]
        self._turn += len(places)
        return [tuple(self.text[place].tolist()) for place in places]

    def _close(self, groups: Sequence[tuple[int, Group]], count: int) -> list[Bystander]:
        """Prompts, wordings and questions of facts of these groups, each with a close subject in the facts' place."""
        items, turns = [], []
        for _ in range(count if self.close.numel() else 0):
            number, group = self.draws.choice(groups)
            fact = self.facts[self.draws.choice(group.facts)]
            name = self.names[int(self.close[number][self.draws.randrange(self.close.shape[1])])]
            in_chat = self.chat and fact.question and self.draws.random() < 1 / 3
            if in_chat:
                turns.append(Turn(str(fact.question), name))
            else:
                items.append(Item(self.draws.choice((fact.prompt, *fact.wordings)), name))
        rows = [*encode_many(self.model.tokenizer, items), *(chat_rows(self.model.tokenizer, turns) if turns else ())]
        return [answer(row) for row in rows]


def bystanders(
    model: Model,
    facts: Sequence[Fact],
    groups: Sequence[Group],
    layer: int,
    text: Tensor,
    earlier: Sequence[Fact],
    protect: Sequence[Protected],
    seed: int,
    chat: bool,
    report: Reporter = SILENT,
) -> Bystanders:
    """Bystanders of a patch of these groups; subjects are compared at `layer`, where the patch edits.

    text are `windows`; `earlier` are facts of patches that the checkpoint carries, `protect` is what a file wants to
    stay. `chat` says whether questions are asked in the chat form. Subjects that the facts or their neighbors name are
    left out, and so are those that would open their text. Deterministic in the seed.
    """
    out = left_out(facts)
    spoken = [(statement, name) for statement, name in told() if name not in out]
    rows = list(encode_many(model.tokenizer, [Item(statement, name) for statement, name in spoken]))
    inside = [place for place, row in enumerate(rows) if row.subject_last > 0]
    statements, names = [rows[place] for place in inside], [spoken[place][1] for place in inside]
    before = list(encode_many(model.tokenizer, [Item(one.prompt, one.subject, one.target) for one in earlier]))
    close = _closest(model, layer, groups, statements, report)
    protected = [row for some in protected_rows(model, protect, facts) for row in some]
    return Bystanders(model, facts, text, statements, names, close, before, protected, random.Random(seed), chat)


def windows(text: Tensor) -> Tensor:
    """Ids [t] as whole rows [rows, WINDOW], or as one where they are fewer."""
    width = min(WINDOW, len(text))
    return text[: len(text) // width * width].view(-1, width).long()


def _closest(model: Model, layer: int, groups: Sequence[Group], others: Sequence[Encoded], report: Reporter) -> Tensor:
    """Positions [n, c] of the other subjects of which the MLP says what is most like what it says of each group's.

    That is the cosine of W k, means taken off: unlike the keys' own, it does not depend on the scale of the units.
    """
    count = len(others) + len(groups)
    with mixed_precision(model), report.task("Looking for close subjects", count, "subject") as done:
        theirs = _said(model, layer, others, done)  # (S, d)
        own = _said(model, layer, [group.rows[_spoken(group)] for group in groups], done)  # (n, d)
    mean = theirs.mean(0)
    cosines = normalize(own - mean, dim=-1) @ normalize(theirs - mean, dim=-1).T  # (n, S)
    return cosines.topk(min(_CLOSE, len(others)), dim=1).indices


def _spoken(group: Group) -> int:
    """The row whose key stands for the subject: the bare prompt, or one where the subject does not open the text."""
    behind = [place for place, row in enumerate(group.rows) if row.subject_last > 0]
    return group.bare if group.bare in behind or not behind else behind[0]


@torch.no_grad()
def _said(model: Model, layer: int, rows: Sequence[Encoded], advance: Advance) -> Tensor:
    """What W^l puts out [n, d] at the rows' subjects, float32."""
    order = sorted(range(len(rows)), key=lambda place: rows[place].subject_last)
    found = torch.empty(len(rows), model.width)
    for begin in range(0, len(order), _BATCH):
        some = order[begin : begin + _BATCH]
        found[some] = written(model, layer, keys_of(model, [layer], [rows[place] for place in some])[layer])
        advance(len(some))
    return found


def whole(ids: tuple[int, ...]) -> Bystander:
    """A row of text: every token behind the first."""
    return Bystander(ids, 0, tuple(range(1, len(ids))))


def _behind(row: Encoded) -> Bystander:
    """A statement about a subject: from the subject's last token on."""
    return Bystander(row.ids, row.subject_last, tuple(range(row.subject_last, len(row.ids))))


def answer(row: Encoded) -> Bystander:
    """A prompt: what follows it, and where a target stands behind it, the target's tokens."""
    last = max(row.prompt_len, len(row.ids) - 1)
    return Bystander(row.ids[:last], row.subject_last, tuple(range(row.prompt_len - 1, last)))

"""A batch of groups whose targets are asked for again and again: all that no edit can change is computed once.

Both searches, for one value (`kpatch.edit.values`) and for joint writes (`kpatch.edit.writes`), change the subject's
last token only. Columns before it are run once; layers below the change are run once; of the columns from it on,
only positions that predict a target are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kpatch.edit.requests import Group
from kpatch.facts.tokens import Encoded
from kpatch.models.fast_forward import packed_mlps
from kpatch.models.model import Model
from kpatch.models.partial_forward import Batch, Calls, align, record_suffix
from kpatch.reporter import Advance


@dataclass(frozen=True)
class Values:
    """What a search found for m groups: values [m, v, d] float32, and the loss and steps that each group ended at."""

    values: Tensor
    losses: tuple[float, ...]
    steps: tuple[int, ...]


class Search(Protocol):
    """An objective that values are searched with; a dataclass, whose fields decide the values besides model and rows.

    count  v, how many values a group gets   lowest  the lowest layer that is run at every step   steps  at most
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def count(self) -> int: ...

    @property
    def lowest(self) -> int: ...

    @property
    def steps(self) -> int: ...

    def search(self, model: Model, groups: Sequence[Group], advance: Advance) -> Values:
        """The values of a batch. `advance` hears of every step of every group, `steps` a group in all."""


@dataclass
class Running:
    """B rows that run side by side, S columns each; what stands before these columns is computed once."""

    calls: Calls
    hidden: Tensor  # (B, S, d) that enter the lowest layer that is run again
    real: Tensor  # (B, S) true where a column holds a token, not padding

    @staticmethod
    def of(model: Model, batch: Batch, above: int) -> Running:
        """The rows of a batch, whose columns from the aligned one on run again in the layers above `above`."""
        calls, hidden = record_suffix(model, batch, above)
        return Running(calls, hidden, batch.mask[:, batch.column :].bool())


@dataclass
class Rows(Running):
    """Rows of m groups, S columns from the subject's last token on: what δ cannot change is computed once."""

    owner: Tensor  # (B,) the group of each row
    spots: Tensor  # (M, 2) row and column of each predicted target token
    tokens: Tensor  # (M,) the target tokens
    weights: Tensor  # (M,) so that a group's weighted sum over all its rows is its mean negative log-likelihood
    drift_spots: Tensor  # (D, 2) row and column of each token whose distribution should stay
    drift_weights: Tensor  # (D,) so that a group's weighted sum over all its rows is its mean drift
    drift_before: Tensor  # (D, V) log-probabilities without δ
    groups: int  # m

    @property
    def read(self) -> Tensor:
        """Where the network's answer is read, (M + D, 2): at the targets, then at the drift rows."""
        return torch.cat([self.spots, self.drift_spots])

    def select(self, keep: Tensor) -> tuple[Rows, Tensor]:
        """The rows of the groups in `keep` (sorted indices), renumbered, and where each old row is now, or -1."""
        device = self.owner.device
        renumber = torch.full((self.groups,), -1, device=device)
        renumber[keep] = torch.arange(len(keep), device=device)
        rows = (renumber[self.owner] >= 0).nonzero().flatten()
        moved = torch.full((len(self.owner),), -1, device=device)
        moved[rows] = torch.arange(len(rows), device=device)
        spots = self.spots.clone()
        spots[:, 0] = moved[self.spots[:, 0]]
        mine = spots[:, 0] >= 0
        drift = self.drift_spots.clone()
        drift[:, 0] = moved[self.drift_spots[:, 0]]
        stays = drift[:, 0] >= 0
        return (
            Rows(
                self.calls.select(rows),
                self.hidden[rows],
                self.real[rows],
                renumber[self.owner[rows]],
                spots[mine],
                self.tokens[mine],
                self.weights[mine],
                drift[stays],
                self.drift_weights[stays],
                self.drift_before[stays],
                len(keep),
            ),
            moved,
        )

    def losses(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """What these rows add to each group's mean negative log-likelihood and drift, [m] both.

        logp [M + D, V] where the rows are `read`.
        """
        count = len(self.tokens)
        at_target = logp[:count].gather(1, self.tokens[:, None])[:, 0] * self.weights  # (M,)
        nothing = torch.zeros(self.groups, device=logp.device)
        nll = -nothing.index_add(0, self.owner[self.spots[:, 0]], at_target)
        if not len(self.drift_spots):
            return nll, nothing
        now = logp[count:]
        drift = (now.exp() * (now - self.drift_before)).sum(-1) * self.drift_weights  # (D,)
        return nll, nothing.index_add(0, self.owner[self.drift_spots[:, 0]], drift)


@dataclass
class Problem:
    """One batch of groups: their fact rows and their drift rows.

    Rows that are far longer than most run apart, or all would be padded to their length. `bare` (m,) are the rows of
    each group's bare prompt in the first part, where all bare and drift rows are.
    """

    parts: list[Rows]
    bare: Tensor

    @property
    def first(self) -> Rows:
        return self.parts[0]

    def select(self, keep: Tensor) -> Problem:
        """The problem of the groups in `keep` (sorted indices), renumbered."""
        first, moved = self.first.select(keep)
        rest = [part.select(keep)[0] for part in self.parts[1:]]
        return Problem([first, *(part for part in rest if len(part.owner))], moved[self.bare[keep]])


_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's usual constants


def adam(first: Tensor, second: Tensor, grad: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adam's two moments after `grad` at `step` (from 1), and what a step is along and divided by: both unbiased."""
    first = _BETAS[0] * first + (1 - _BETAS[0]) * grad
    second = _BETAS[1] * second + (1 - _BETAS[1]) * grad**2
    mean = first / (1 - _BETAS[0] ** step)
    scale = (second / (1 - _BETAS[1] ** step)).sqrt() + _EPS
    return first, second, mean, scale


@dataclass(frozen=True)
class _Row:
    """A row of a group on its way into a part."""

    encoded: Encoded
    group: int
    weight: float = 0.0  # of each of its target tokens; a drift row has none
    bare: bool = False
    drift: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """The last target token is predicted, never read."""
        ids = self.encoded.ids
        return ids[:-1] if len(ids) > self.encoded.prompt_len else ids

    @property
    def columns(self) -> int:
        return len(self.ids) - self.encoded.subject_last


def prepare(model: Model, groups: Sequence[Group], above: int) -> Problem:
    """The problem of a batch in which nothing changes up to layer `above` (−1: everything may)."""
    rows: list[_Row] = []
    for number, group in enumerate(groups):
        for index, row in enumerate(group.rows):
            weight = 1.0 / (max(1, len(row.ids) - row.prompt_len) * len(group.rows))
            rows.append(_Row(row, number, weight, bare=index == group.bare))
    for number, group in enumerate(groups):
        rows += [_Row(row, number, 1.0 / len(group.drifts), drift=True) for row in group.drifts]
    parts = _parts(rows)
    bare = [place for place, row in enumerate(parts[0]) if row.bare]
    return Problem(
        [_side_by_side(model, part, len(groups), above) for part in parts], torch.tensor(bare, device=model.device)
    )


_EACH_STEP = 20  # what a column that runs at every step costs, against one before it, which is run once and read
_WORTH_IT = 0.85  # a second run pays where it leaves this share of the cost, padding included


def _parts(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Rows that run side by side: the longest, in chat form perhaps, apart from the others where that pays.

    Bare prompts and drift rows are in the first part, and every part keeps the order of the rows.
    """
    count, sizes = len(rows), [(row.columns, row.encoded.subject_last) for row in rows]
    order = sorted(range(count), key=lambda index: _cost(1, sizes[index]))
    ordered = [sizes[index] for index in order]
    heads, tails = list(accumulate(ordered, _both)), [*accumulate(reversed(ordered), _both)][::-1]
    least = max(place for place, index in enumerate(order) if rows[index].bare or rows[index].drift) + 1
    costs = {cut: _cost(cut, heads[cut - 1]) + _cost(count - cut, tails[cut]) for cut in range(least, count)}
    cut = min(costs, key=lambda cut: costs[cut], default=count)
    if cut == count or costs[cut] >= _WORTH_IT * _cost(count, heads[-1]):
        return [list(rows)]
    return [[rows[index] for index in sorted(some)] for some in (order[:cut], order[cut:])]


def _both(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """The columns that rows of two sizes are padded to side by side."""
    return max(one[0], other[0]), max(one[1], other[1])


def _cost(count: int, size: tuple[int, int]) -> int:
    """What `count` rows padded to (columns from the subject's last token on, columns before it) cost together."""
    return count * (_EACH_STEP * size[0] + size[1])


def _side_by_side(model: Model, rows: Sequence[_Row], groups: int, above: int) -> Rows:
    device = model.device
    batch = align([row.ids for row in rows], [row.encoded.subject_last for row in rows], model.pad_id, device)
    running = Running.of(model, batch, above)
    spots, tokens, weights, drift, shares = [], [], [], [], []
    for index, row in enumerate(rows):
        start = row.encoded.prompt_len - 1 - row.encoded.subject_last
        if row.drift:
            drift.append((index, start))
            shares.append(row.weight)
            continue
        for offset, token in enumerate(row.encoded.ids[row.encoded.prompt_len :]):
            spots.append((index, start + offset))
            tokens.append(token)
            weights.append(row.weight)
    return Rows(
        running.calls,
        running.hidden,
        running.real,
        torch.tensor([row.group for row in rows], device=device),
        torch.tensor(spots, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(weights, device=device),
        torch.tensor(drift, dtype=torch.long, device=device).view(-1, 2),
        torch.tensor(shares, device=device),
        torch.empty(0, device=device),
        groups,
    )


def log_probabilities(model: Model, rows: Running, hidden: Tensor, spots: Tensor, above: int) -> Tensor:
    """Next-token log-probabilities [M, V] at `spots` [M, 2] after running the layers above layer `above`."""
    real = rows.real.flatten().nonzero().flatten()
    read = torch.unique(spots[:, 0] * hidden.shape[1] + spots[:, 1])
    with packed_mlps(model, above + 1, model.n_layers, real, read):
        out = rows.calls.run(hidden, above + 1, model.n_layers)  # (B, S, d)
    return model.logits(out[spots[:, 0], spots[:, 1]]).float().log_softmax(-1)


@torch.no_grad()
def measure_drift(model: Model, problem: Problem, above: int) -> None:
    """Let the problem know what its drift rows say without δ."""
    rows = problem.first
    rows.drift_before = log_probabilities(model, rows, rows.hidden, rows.drift_spots, above)

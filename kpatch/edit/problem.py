"""A batch of groups whose targets are asked for again and again: all that no edit can change is computed once.

Both searches, for one value (`kpatch.edit.values`) and for joint writes (`kpatch.edit.writes`), change the subject's
last token only. Columns before it are run once; layers below the change are run once; of the columns from it on,
only positions that predict a target are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kpatch.edit.requests import Group
from kpatch.models.fast_forward import packed_mlps
from kpatch.models.model import Model
from kpatch.models.partial_forward import Calls, align, record_suffix
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
class Problem:
    """One batch of groups with everything δ cannot change computed once.

    Rows B are the groups' fact rows, then one drift row a group; S columns from the subject's last token on.
    """

    calls: Calls
    hidden: Tensor  # (B, S, d) that enter the lowest layer that is run again
    real: Tensor  # (B, S) true where a column holds a token, not padding
    owner: Tensor  # (B,) the group of each row
    spots: Tensor  # (M, 2) row and column of each predicted target token
    tokens: Tensor  # (M,) the target tokens
    weights: Tensor  # (M,) so that a group's weighted sum is its mean negative log-likelihood
    drift_spots: Tensor  # (m, 2)
    drift_before: Tensor  # (m, V) log-probabilities without δ
    bare: Tensor  # (m,) the row of each group's bare prompt

    def select(self, keep: Tensor) -> Problem:
        """The problem of the groups in `keep` (sorted indices), renumbered."""
        device = self.owner.device
        renumber = torch.full((int(self.owner.max()) + 1,), -1, device=device)
        renumber[keep] = torch.arange(len(keep), device=device)
        rows = (renumber[self.owner] >= 0).nonzero().flatten()
        moved = torch.full((len(self.owner),), -1, device=device)
        moved[rows] = torch.arange(len(rows), device=device)
        spots = self.spots.clone()
        spots[:, 0] = moved[self.spots[:, 0]]
        mine = spots[:, 0] >= 0
        drift = self.drift_spots[keep].clone()
        drift[:, 0] = moved[drift[:, 0]]
        return Problem(
            self.calls.select(rows),
            self.hidden[rows],
            self.real[rows],
            renumber[self.owner[rows]],
            spots[mine],
            self.tokens[mine],
            self.weights[mine],
            drift,
            self.drift_before[keep],
            moved[self.bare[keep]],
        )

    def losses(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """Mean negative log-likelihood of the targets and drift of each group, [m] both.

        logp [M + m, V] at the spots of the targets and then those of the drift rows.
        """
        m = len(self.drift_before)
        at_target = logp[:-m].gather(1, self.tokens[:, None])[:, 0] * self.weights  # (M,)
        nll = -torch.zeros(m, device=logp.device).index_add(0, self.owner[self.spots[:, 0]], at_target)
        now = logp[-m:]
        drift = (now.exp() * (now - self.drift_before)).sum(-1)  # (m,)
        return nll, drift


_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's usual constants


def adam(first: Tensor, second: Tensor, grad: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adam's two moments after `grad` at `step` (from 1), and what a step is along and divided by: both unbiased."""
    first = _BETAS[0] * first + (1 - _BETAS[0]) * grad
    second = _BETAS[1] * second + (1 - _BETAS[1]) * grad**2
    mean = first / (1 - _BETAS[0] ** step)
    scale = (second / (1 - _BETAS[1] ** step)).sqrt() + _EPS
    return first, second, mean, scale


def prepare(model: Model, groups: Sequence[Group], above: int) -> Problem:
    """The problem of a batch in which nothing changes up to layer `above` (−1: everything may)."""
    rows = [row for group in groups for row in group.rows] + [group.drift for group in groups]
    owner = [g for g, group in enumerate(groups) for _ in group.rows] + list(range(len(groups)))
    device = model.device
    # The last target token is predicted, never read.
    ids = [row.ids[:-1] if len(row.ids) > row.prompt_len else row.ids for row in rows]
    batch = align(ids, [row.subject_last for row in rows], model.pad_id, device)
    calls, hidden = record_suffix(model, batch, above)

    spots, tokens, weights, bare, first = [], [], [], [], 0
    for group in groups:
        bare.append(first + group.bare)
        for index, row in enumerate(group.rows):
            targets = row.ids[row.prompt_len :]
            start = row.prompt_len - 1 - row.subject_last
            for offset, token in enumerate(targets):
                spots.append((first + index, start + offset))
                tokens.append(token)
                weights.append(1.0 / (len(targets) * len(group.rows)))
        first += len(group.rows)
    drift = [(first + g, group.drift.prompt_len - 1 - group.drift.subject_last) for g, group in enumerate(groups)]
    return Problem(
        calls,
        hidden,
        batch.mask[:, batch.column :].bool(),
        torch.tensor(owner, device=device),
        torch.tensor(spots, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(weights, device=device),
        torch.tensor(drift, device=device),
        torch.empty(0, device=device),
        torch.tensor(bare, device=device),
    )


def log_probabilities(model: Model, problem: Problem, hidden: Tensor, spots: Tensor, above: int) -> Tensor:
    """Next-token log-probabilities [M, V] at `spots` [M, 2] after running the layers above layer `above`."""
    real = problem.real.flatten().nonzero().flatten()
    read = torch.unique(spots[:, 0] * hidden.shape[1] + spots[:, 1])
    with packed_mlps(model, above + 1, model.n_layers, real, read):
        out = problem.calls.run(hidden, above + 1, model.n_layers)  # (B, S, d)
    return model.logits(out[spots[:, 0], spots[:, 1]]).float().log_softmax(-1)

"""Values z = h^L + δ for many groups at once: one batch, one column for δ, only what δ can change is run again.

Source: Meng et al. 2023 (MEMIT), eq. 16, with the drift and decay terms of Meng et al. 2022 (ROME), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch.edit.requests import Group
from kpatch.models.fast_forward import few_columns_attention, packed_mlps
from kpatch.models.model import Model
from kpatch.models.partial_forward import Calls, align, record_suffix
from kpatch.reporter import Advance

_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's usual constants


@dataclass(frozen=True)
class Objective:
    """What δ is optimized for, and how long: all that decides a value besides the model and the rows.

    layer  L, whose output δ is added to   steps, learning_rate, stop_loss  of Adam; below stop_loss a group stops
    clamp  ‖δ‖ ≤ clamp · ‖h^L‖   weight_decay, kl  weights of ‖δ‖/‖h^L‖² and of the drift on "{subject} is a"
    """

    layer: int
    steps: int
    learning_rate: float
    stop_loss: float
    clamp: float
    weight_decay: float
    kl: float


@dataclass(frozen=True)
class Values:
    """z [m, d] float32 for m groups, with the loss and the number of steps each one ended at."""

    z: Tensor
    losses: tuple[float, ...]
    steps: tuple[int, ...]


@dataclass
class _Problem:
    """One batch of groups with everything δ cannot change computed once.

    Rows B are the groups' fact rows, then one drift row a group; S columns from the subject's last token on.
    """

    calls: Calls
    hidden: Tensor  # (B, S, d) leaving layer L
    real: Tensor  # (B, S) true where a column holds a token, not padding
    owner: Tensor  # (B,) the group of each row
    spots: Tensor  # (M, 2) row and column of each predicted target token
    tokens: Tensor  # (M,) the target tokens
    weights: Tensor  # (M,) so that a group's weighted sum is its mean negative log-likelihood
    drift_spots: Tensor  # (m, 2)
    drift_before: Tensor  # (m, V) log-probabilities without δ

    def select(self, keep: Tensor) -> _Problem:
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
        return _Problem(
            self.calls.select(rows),
            self.hidden[rows],
            self.real[rows],
            renumber[self.owner[rows]],
            spots[mine],
            self.tokens[mine],
            self.weights[mine],
            drift,
            self.drift_before[keep],
        )


def _prepare(model: Model, groups: Sequence[Group], layer: int) -> tuple[_Problem, Tensor]:
    """The problem of a batch, and h^L [m, d] of each group's bare row."""
    rows = [row for group in groups for row in group.rows] + [group.drift for group in groups]
    owner = [g for g, group in enumerate(groups) for _ in group.rows] + list(range(len(groups)))
    device = model.device
    # The last target token is predicted, never read.
    ids = [row.ids[:-1] if len(row.ids) > row.prompt_len else row.ids for row in rows]
    batch = align(ids, [row.subject_last for row in rows], model.pad_id, device)
    calls, hidden = record_suffix(model, batch, layer)

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
    problem = _Problem(
        calls,
        hidden,
        batch.mask[:, batch.column :].bool(),
        torch.tensor(owner, device=device),
        torch.tensor(spots, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(weights, device=device),
        torch.tensor(drift, device=device),
        torch.empty(0, device=device),
    )
    with torch.no_grad():
        problem.drift_before = _predict(model, problem, hidden, problem.drift_spots, layer)
    return problem, hidden[torch.tensor(bare, device=device), 0].float()


def _predict(model: Model, problem: _Problem, hidden: Tensor, spots: Tensor, layer: int) -> Tensor:
    """Next-token log-probabilities [M, V] at `spots` [M, 2] after running the layers above `layer`."""
    real = problem.real.flatten().nonzero().flatten()
    read = torch.unique(spots[:, 0] * hidden.shape[1] + spots[:, 1])
    with packed_mlps(model, layer + 1, model.n_layers, real, read):
        out = problem.calls.run(hidden, layer + 1, model.n_layers)  # (B, S, d)
    return model.logits(out[spots[:, 0], spots[:, 1]]).float().log_softmax(-1)


def _losses(model: Model, problem: _Problem, delta: Tensor, h: Tensor, goal: Objective) -> Tensor:
    """The objective of each group, [m]; delta and h are [m, d]."""
    m = len(delta)
    # index_select, since the gradient of delta[owner] is summed by all threads at once, in an order left to chance
    shift = delta.index_select(0, problem.owner).to(problem.hidden.dtype)  # (B, d)
    first = problem.hidden[:, :1] + shift[:, None]  # (B, 1, d)
    hidden = torch.cat([first, problem.hidden[:, 1:]], dim=1)  # (B, S, d)
    spots = torch.cat([problem.spots, problem.drift_spots])
    logp = _predict(model, problem, hidden, spots, goal.layer)  # (M + m, V)
    at_target = logp[:-m].gather(1, problem.tokens[:, None])[:, 0] * problem.weights  # (M,)
    nll = -torch.zeros(m, device=delta.device).index_add(0, problem.owner[problem.spots[:, 0]], at_target)
    now = logp[-m:]
    drift = (now.exp() * (now - problem.drift_before)).sum(-1)  # (m,)
    decay = delta.norm(dim=-1) / h.norm(dim=-1) ** 2
    total: Tensor = nll + goal.kl * drift + goal.weight_decay * decay
    return total


def optimize(model: Model, groups: Sequence[Group], goal: Objective, advance: Advance = lambda amount: None) -> Values:
    """Values of a batch of groups: Adam on δ, clamped to a ball; a group that has converged leaves the batch.

    `advance` hears of every step of every group, goal.steps a group in all.
    """
    with few_columns_attention(model):
        return _optimize(model, groups, goal, advance)


def _optimize(model: Model, groups: Sequence[Group], goal: Objective, advance: Advance) -> Values:
    problem, h = _prepare(model, groups, goal.layer)
    m = len(groups)
    delta = torch.zeros_like(h)
    first, second = torch.zeros_like(h), torch.zeros_like(h)
    radius = goal.clamp * h.norm(dim=-1, keepdim=True)
    batch = torch.arange(m, device=h.device)  # groups that `problem` holds
    active = batch  # those of them that have not converged
    losses = torch.full((m,), torch.nan, device=h.device)
    steps = torch.zeros(m, dtype=torch.long, device=h.device)
    for step in range(1, goal.steps + 1):
        variable = delta[batch].requires_grad_()
        loss = _losses(model, problem, variable, h[batch], goal)
        is_active = torch.isin(batch, active)
        losses[active], steps[active] = loss.detach()[is_active], step
        going_on = is_active & (loss.detach() >= goal.stop_loss)
        advance(len(active))
        before, active = len(active), batch[going_on]
        advance((before - len(active)) * (goal.steps - step))  # what the converged ones no longer need
        if step == goal.steps or len(active) == 0:
            break
        grad = torch.autograd.grad(loss.sum(), variable)[0][going_on]
        first[active] = _BETAS[0] * first[active] + (1 - _BETAS[0]) * grad
        second[active] = _BETAS[1] * second[active] + (1 - _BETAS[1]) * grad**2
        mean = first[active] / (1 - _BETAS[0] ** step)
        scale = (second[active] / (1 - _BETAS[1] ** step)).sqrt() + _EPS
        moved = delta[active] - goal.learning_rate * mean / scale
        delta[active] = moved * (radius[active] / moved.norm(dim=-1, keepdim=True)).clamp(max=1)
        if len(active) <= 0.8 * len(batch):  # a smaller batch pays for the copy of its caches
            problem = problem.select(going_on.nonzero().flatten())
            batch = active
    return Values((h + delta).detach().cpu(), tuple(losses.tolist()), tuple(steps.tolist()))

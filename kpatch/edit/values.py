"""Values z = h^L + δ for many groups at once: one batch, one column for δ, only what δ can change is run again.

Source: Meng et al. 2023 (MEMIT), eq. 16, with the drift and decay terms of Meng et al. 2022 (ROME), section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch.edit.problem import Problem, Values, adam, log_probabilities, measure_drift, prepare
from kpatch.edit.requests import Group
from kpatch.models.fast_forward import few_columns_attention
from kpatch.models.mixed_precision import mixed_precision
from kpatch.models.model import Model
from kpatch.reporter import Advance


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

    @property
    def count(self) -> int:
        return 1

    @property
    def lowest(self) -> int:
        return self.layer + 1

    def search(self, model: Model, groups: Sequence[Group], advance: Advance) -> Values:
        """z [m, 1, d] of a batch; see `optimize`."""
        return optimize(model, groups, self, advance)


def _losses(model: Model, problem: Problem, delta: Tensor, h: Tensor, goal: Objective) -> Tensor:
    """The objective of each group, [m]; delta and h are [m, d]."""
    total: Tensor = goal.weight_decay * delta.norm(dim=-1) / h.norm(dim=-1) ** 2
    for rows in problem.parts:
        # index_select, since the gradient of delta[owner] is summed by all threads at once, in an order left to chance
        shift = delta.index_select(0, rows.owner).to(rows.hidden.dtype)  # (B, d)
        first = rows.hidden[:, :1] + shift[:, None]  # (B, 1, d)
        hidden = torch.cat([first, rows.hidden[:, 1:]], dim=1)  # (B, S, d)
        nll, drift = rows.losses(log_probabilities(model, rows, hidden, rows.read, goal.layer))
        total = total + nll + goal.kl * drift
    return total


def optimize(model: Model, groups: Sequence[Group], goal: Objective, advance: Advance = lambda amount: None) -> Values:
    """Values of a batch of groups: Adam on δ, clamped to a ball; a group that has converged leaves the batch.

    `advance` hears of every step of every group, goal.steps a group in all.
    """
    with few_columns_attention(model):
        problem = prepare(model, groups, goal.layer)
        with mixed_precision(model):
            return _optimize(model, problem, goal, advance)


def _optimize(model: Model, problem: Problem, goal: Objective, advance: Advance) -> Values:
    measure_drift(model, problem, goal.layer)
    h = problem.first.hidden[problem.bare, 0].float()  # (m, d)
    m = len(h)
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
        first[active], second[active], mean, scale = adam(first[active], second[active], grad, step)
        moved = delta[active] - goal.learning_rate * mean / scale
        delta[active] = moved * (radius[active] / moved.norm(dim=-1, keepdim=True)).clamp(max=1)
        if len(active) <= 0.8 * len(batch):  # a smaller batch pays for the copy of its caches
            problem = problem.select(going_on.nonzero().flatten())
            batch = active
    return Values((h + delta).detach().cpu()[:, None], tuple(losses.tolist()), tuple(steps.tolist()))

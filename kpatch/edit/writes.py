"""Joint writes: one δ^l for every layer l of R, added to what W^l puts out, all of them found together.

δ^l stands before any norm and any scale behind W^l, so the optimization sees both. A layer is asked for no more than
the others leave to do, and no residual has to be spread over the layers afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kpatch.edit.problem import Problem, Rows, Values, adam, log_probabilities, measure_drift, prepare
from kpatch.edit.requests import Group
from kpatch.models.fast_forward import few_columns_attention
from kpatch.models.mixed_precision import mixed_precision
from kpatch.models.model import Model
from kpatch.reporter import Advance

_NO_GATES: Mapping[int, Tensor] = {}
# A norm keeps the length of what is written, so a write can only turn it: 2 ‖y‖ is what reverses it
_BEHIND_A_NORM = 2.0


@dataclass(frozen=True)
class JointObjective:
    """What the writes are optimized for, and how long: all that decides them besides the model and the rows.

    layers  R, rising   steps, learning_rate, stop_loss  of Adam; below stop_loss a group stops
    clamp  ‖δ^l‖ ≤ clamp · s^l, with s^l as `scales` says (twice that where a norm follows W^l)
    kl  weight of the drift on "{subject} is a"
    """

    layers: tuple[int, ...]
    steps: int
    learning_rate: float
    stop_loss: float
    clamp: float
    kl: float

    @property
    def count(self) -> int:
        return len(self.layers)

    @property
    def lowest(self) -> int:
        return self.layers[0]

    def search(self, model: Model, groups: Sequence[Group], advance: Advance = lambda amount: None) -> Values:
        """Targets [m, R, d] of a batch: Adam on all δ^l at once, each clamped; a converged group leaves the batch.

        A target is the state that leaves layer l at the subject's last token of the bare prompt, all writes in place;
        where a norm or a gate stands behind W^l it is what W^l puts out there.
        """
        with few_columns_attention(model):
            return _search(model, groups, self, advance)


class _Injection:
    """Hooks that add δ[i] [m, d] to what W^l puts out at column 0 of every row, for l = layers[i].

    `written[i]` [B, d] is what W^l itself put out there in the last run.
    """

    def __init__(self, model: Model, rows: Rows, layers: Sequence[int]) -> None:
        self.model, self.layers = model, layers
        self.delta: Tensor | None = None
        self.written: dict[int, Tensor] = {}
        self.use(rows)

    def use(self, rows: Rows) -> None:
        """Take `rows` for those that run."""
        self.owner, (self.rows, self.columns) = rows.owner, rows.hidden.shape[:2]
        tokens = rows.real.flatten().cumsum(0)
        self.packed = tokens.view(self.rows, self.columns)[:, 0] - 1  # (B,) where only real tokens are run
        self.n_real = int(tokens[-1])

    def _places(self, tokens: int) -> Tensor:
        """The rows' column 0 among `tokens` tokens that run: the real ones, all of them, or all behind a prefix."""
        if tokens == self.n_real:
            return self.packed
        width = tokens // self.rows
        return torch.arange(self.rows, device=self.packed.device) * width + width - self.columns

    @contextmanager
    def open(self) -> Iterator[None]:
        handles = []
        for index, layer in enumerate(self.layers):

            def hook(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor, index: int = index) -> Tensor:
                flat = out.reshape(-1, out.shape[-1])  # (tokens, d)
                places = self._places(len(flat))
                self.written[index] = flat.detach()[places.to(flat.device)].to(places.device)
                if self.delta is None:
                    return out
                shift = self.delta[index].index_select(0, self.owner).to(out)  # (B, d)
                return flat.index_add(0, places.to(flat.device), shift).view(out.shape)

            handles.append(self.model.down(layer).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def scales(
    model: Model,
    layers: Sequence[int],
    leaving: Tensor,
    written: Sequence[Tensor],
    gates: Mapping[int, Tensor] = _NO_GATES,
) -> Tensor:
    """s^l [R, m], the size that a write to layer l is measured by.

    Where a norm follows W^l: ‖y^l‖, what W^l puts out, written [R] of [m, d]. Elsewhere ‖h^L‖ / |R|, leaving [m, d],
    over what the layer multiplies its MLP's output by: where that is each token's own number, gates[l] [m] has it.
    """
    if model.family.post_norm:
        return torch.stack([one.float().norm(dim=-1) for one in written])
    size = leaving.float().norm(dim=-1) / len(layers)
    return torch.stack(
        [size / (gates[layer].abs() if layer in gates else abs(model.residual_scale(layer))) for layer in layers]
    )


def _search(model: Model, groups: Sequence[Group], goal: JointObjective, advance: Advance) -> Values:
    problem = prepare(model, groups, goal.layers[0] - 1)
    inject = _Injection(model, problem.first, goal.layers)
    for layer in goal.layers:  # measured by running the network once, which the hooks below must not see
        model.behind_down(layer)
        model.gated(layer)
    with inject.open():
        with torch.no_grad():
            size = _sizes(model, problem, inject, goal.layers)[..., None]  # (R, m, 1)
        with mixed_precision(model):  # δ stands it; what it is measured by, and the targets, are exact
            delta, losses, steps = _descend(model, problem, inject, size, goal, advance)
        inject.use(problem.first)
        inject.delta = delta
        targets = _targets(model, problem, inject, goal.layers)
    return Values(targets.cpu(), tuple(losses.tolist()), tuple(steps.tolist()))


def _descend(
    model: Model, problem: Problem, inject: _Injection, size: Tensor, goal: JointObjective, advance: Advance
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's δ [R, m, d] for sizes [R, m, 1], with the loss and the steps [m] at which each group ended."""
    below = goal.layers[0] - 1
    count, m = size.shape[:2]
    reach = _BEHIND_A_NORM if model.family.post_norm else 1.0
    measure_drift(model, problem, below)
    delta = torch.zeros(count, m, model.width, device=size.device)
    first, second = torch.zeros_like(delta), torch.zeros_like(delta)
    batch = torch.arange(m, device=size.device)  # groups that `problem` holds
    active = batch  # those of them that have not converged
    losses = torch.full((m,), torch.nan, device=size.device)
    steps = torch.zeros(m, dtype=torch.long, device=size.device)
    for step in range(1, goal.steps + 1):
        variable = delta[:, batch].requires_grad_()
        inject.delta = variable
        nll, drift = torch.zeros(len(batch), device=size.device), torch.zeros(len(batch), device=size.device)
        for rows in problem.parts:
            inject.use(rows)
            some, more = rows.losses(log_probabilities(model, rows, rows.hidden, rows.read, below))
            nll, drift = nll + some, drift + more
        loss = nll + goal.kl * drift
        is_active = torch.isin(batch, active)
        losses[active], steps[active] = nll.detach()[is_active], step
        going_on = is_active & (nll.detach() >= goal.stop_loss)
        advance(len(active))
        before, active = len(active), batch[going_on]
        advance((before - len(active)) * (goal.steps - step))  # what the converged ones no longer need
        if step == goal.steps or len(active) == 0:
            break
        grad = torch.autograd.grad(loss.sum(), variable)[0][:, going_on]
        moments = first[:, active], second[:, active]
        first[:, active], second[:, active], mean, scale = adam(*moments, grad, step)
        pace = goal.learning_rate * size[:, active] / model.width**0.5
        moved = delta[:, active] - pace * mean / scale
        radius = goal.clamp * reach * size[:, active]
        delta[:, active] = moved * (radius / moved.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        if len(active) <= 0.8 * len(batch):  # a smaller batch pays for the copy of its caches
            problem = problem.select(going_on.nonzero().flatten())
            batch = active
    return delta, losses, steps


def _sizes(model: Model, problem: Problem, inject: _Injection, layers: Sequence[int]) -> Tensor:
    rows = problem.first
    leaving = rows.calls.run(rows.hidden, layers[0], layers[-1] + 1)[problem.bare, 0]
    written = [inject.written[i][problem.bare] for i in range(len(layers))]
    return scales(model, layers, leaving, written, _gates(model, problem, inject, layers))


def _gates(model: Model, problem: Problem, inject: _Injection, layers: Sequence[int]) -> dict[int, Tensor]:
    """What each gated layer multiplies a write by at the bare rows' column 0, [m] by layer: measured with a write."""
    found: dict[int, Tensor] = {}
    rows = problem.first
    hidden, at = rows.hidden, layers[0]
    for index, layer in enumerate(layers):
        if not model.gated(layer):
            continue
        hidden, at = rows.calls.run(hidden, at, layer), layer
        probe = torch.zeros(len(layers), len(problem.bare), model.width, device=hidden.device)
        probe[index] = 1.0
        inject.delta = None
        without = rows.calls.run(hidden, layer, layer + 1)
        inject.delta = probe
        moved = rows.calls.run(hidden, layer, layer + 1) - without
        inject.delta = None
        found[layer] = moved[problem.bare, 0].float().mean(-1)
    return found


@torch.no_grad()
def _targets(model: Model, problem: Problem, inject: _Injection, layers: Sequence[int]) -> Tensor:
    """Targets [m, R, d] under the writes that `inject` holds."""
    assert inject.delta is not None
    rows = problem.first
    hidden, at, targets = rows.hidden, layers[0], []
    for index, layer in enumerate(layers):
        hidden = rows.calls.run(hidden, at, layer + 1)
        at = layer + 1
        if model.behind_down(layer):
            targets.append(inject.written[index][problem.bare].float() + inject.delta[index])
        else:
            targets.append(hidden[problem.bare, 0].float())
    return torch.stack(targets, dim=1)

"""Refinement row by row, straight from its equations: slow, without padding, batches or caches.

With Δ^l = R^l H^l added to every W^l of R, and R alone variable:

    loss(R) = mean over groups of max(nll_i − stop_loss, 0) + kl · mean over all their drift rows of KL(before ‖ now)
              + hold · Σ over kinds of mean over tokens of KL(before ‖ now)
    Adam with a step of pace · rms(R^l at the start), and the start is `begin` times what is given

Δ is in place at every token; the gradient is that of the tokens from the subject's last one on (of a text, of all).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from kpatch.edit.bystanders import Bystander
from kpatch.edit.requests import Group
from kpatch.models.model import Model
from tests.oracle import memit as paper

Factors = Mapping[int, tuple[Tensor, Tensor]]  # R^l [d, r] and H^l [r, f] by layer


@contextmanager
def written(model: Model, factors: Factors, begin: int, tokens: int) -> Iterator[None]:
    """While open, W^l + R^l H^l multiplies the keys of a row of so many tokens."""
    with ExitStack() as stack:
        for layer, (left, right) in factors.items():
            keys: list[Tensor] = []
            down = model.down(layer)
            stack.callback(down.register_forward_pre_hook(lambda _, args, keys=keys: keys.append(args[0])).remove)

            def change(out: Tensor, left: Tensor = left, right: Tensor = right, keys: list[Tensor] = keys) -> Tensor:
                share = keys.pop().reshape(tokens, -1) @ right.T  # (T, r)
                early = share[:begin] @ left.detach().T
                return out + torch.cat([early, share[begin:] @ left.T]).reshape(out.shape)

            stack.enter_context(paper.output_changed(down, change))
        yield


def moved(model: Model, row: Bystander, factors: Factors) -> Tensor:
    """Σ KL(before ‖ now) over the tokens that the row holds."""
    with torch.no_grad():
        before = paper.forward(model, row.ids).log_softmax(-1)
    with written(model, factors, row.begin, len(row.ids)):
        now = paper.forward(model, row.ids).log_softmax(-1)
    return sum(((before[at].exp() * (before[at] - now[at])).sum() for at in row.read), torch.zeros(()))


def missing(model: Model, group: Group, factors: Factors, stop_loss: float) -> Tensor:
    """max(nll − stop_loss, 0) of a group, the mean over its rows of the mean over a target's tokens."""
    nll = torch.zeros(())
    for row in group.rows:
        ids = row.ids[:-1]
        with written(model, factors, row.subject_last, len(ids)):
            now = paper.forward(model, ids).log_softmax(-1)
        target = row.ids[row.prompt_len :]
        for offset, token in enumerate(target):
            nll = nll - now[row.prompt_len - 1 + offset, token] / len(target) / len(group.rows)
    return (nll - stop_loss).clamp(min=0)


def loss(
    model: Model,
    groups: Sequence[Group],
    kinds: Sequence[Sequence[Bystander]],
    factors: Factors,
    stop_loss: float,
    kl: float,
    hold: float,
) -> Tensor:
    """The loss of one step that looks at these groups and bystanders."""
    total = torch.zeros(())
    for group in groups:
        total = total + missing(model, group, factors, stop_loss) / len(groups)
    drifts = [row for group in groups for row in group.drifts]
    for row in drifts:
        ids = row.ids[: row.prompt_len]
        held = Bystander(ids, row.subject_last, (row.prompt_len - 1,))
        total = total + kl * moved(model, held, factors) / len(drifts)
    for rows in kinds:
        tokens = sum(len(row.read) for row in rows)
        for row in rows:
            total = total + hold * moved(model, row, factors) / tokens
    return total


def refined(
    model: Model,
    groups: Sequence[Group],
    kinds: Sequence[Sequence[Bystander]],
    factors: Factors,
    paces: Sequence[float],
    begin: float,
    stop_loss: float,
    kl: float,
    hold: float,
) -> tuple[dict[int, Tensor], list[float]]:
    """R^l by layer after a step for each of `paces`, all of them over all groups, and each step's loss."""
    left = {layer: (begin * one).detach().clone().requires_grad_() for layer, (one, _) in factors.items()}
    sizes = {layer: float(one.detach().square().mean().sqrt()) for layer, one in left.items()}
    adam = torch.optim.Adam([{"params": [left[layer]], "lr": 0.0} for layer in left], betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for pace in paces:
        for layer, parameters in zip(left, adam.param_groups, strict=True):
            parameters["lr"] = pace * sizes[layer]
        adam.zero_grad()
        now = {layer: (left[layer], factors[layer][1]) for layer in left}
        value = loss(model, groups, kinds, now, stop_loss, kl, hold)
        value.backward()  # type: ignore[no-untyped-call]
        adam.step()
        losses.append(value.item())
    return {layer: one.detach() for layer, one in left.items()}, losses

"""One step of training: facts are edited in groups, and every group's edited model is asked other things.

Source: Mitchell et al. 2022 (MEND), algorithm 1: c_e times −log P of the target behind other words, and c_loc times
KL(p ‖ p̃) on text that has nothing to do with the fact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch.mend.aggregate import differences, regression
from kpatch.mend.network import Network
from kpatch.mend.places import Place
from kpatch.mend.rows import Above, Below, Row, Update, factors, marked, updated


@dataclass(frozen=True)
class Question:
    """A fact in an episode: the row it is learned from, the one the edited model is asked, and two that must stay."""

    edit: Row
    again: Row
    near: Row
    text: Row

    @property
    def rows(self) -> tuple[Row, ...]:
        """All four."""
        return self.edit, self.again, self.near, self.text


@dataclass(frozen=True)
class Loss:
    """Means over the facts of an episode: −log P of the target in other words, and KL near and on text."""

    edit: Tensor
    near: Tensor
    text: Tensor

    @property
    def locality(self) -> Tensor:
        """The mean of both kinds of text."""
        return (self.near + self.text) / 2


def updates(network: Network, found: Sequence[tuple[Tensor, Tensor]], groups: int, how: int) -> Iterator[Update]:
    """What the editor makes of u [B, T, in] and δ [B, T, out] of each place, for groups of B / G facts each.

    `how` is 0 for the sum and 1 for regression.
    """
    for number, (u, delta) in enumerate(found):
        own, read, write = _pseudo(network, number, u, delta)
        own, read, write = (one.view(groups, -1, one.shape[-1]) for one in (own, read, write))  # [G, R, ·]
        if how:
            v = differences(own, read, write)
            yield regression(own, v, network.ridge(number), network.precision(number))
        else:
            yield read, write


def _pseudo(network: Network, number: int, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, ũ and −α δ̃, all [B · T, ·] and zero where a token has no gradient."""
    at = marked(u, delta)
    flat_u, flat_delta = u.flatten(0, 1), delta.flatten(0, 1)
    chosen = flat_u[at].to(network.sizes.dtype)
    read, write = network(number, chosen, flat_delta[at])
    whole = [one.new_zeros(len(flat_u), one.shape[-1]).index_copy(0, at, one) for one in (chosen, read, write)]
    return whole[0], whole[1], whole[2]


def loss_of(network: Network, below: Below, asked: Sequence[Question], group: int, how: int) -> Loss:
    """The loss of facts that are edited in groups of `group`, each group in the model as it is.

    With gradients into the network, unless they are off.
    """
    model, where = below.model, network.places
    edits = factors(below.ready([one.edit for one in asked]), where)
    made = list(updates(network, edits, len(asked) // group, how))
    again = below.ready([one.again for one in asked])
    with updated(model, where, made):
        edit = again.losses().sum() / len(asked)
    near, text = ([one.near for one in asked], [one.text for one in asked])
    return Loss(edit, _drift(where, made, below.ready(near)), _drift(where, made, below.ready(text)))


def _drift(where: Sequence[Place], made: Sequence[Update], rows: Above) -> Tensor:
    """KL(p ‖ p̃), the mean over rows of the mean over their reads."""
    with torch.no_grad():
        before = rows.logp()  # [M, V]
    with updated(rows.model, where, made):
        after = rows.logp()
    drift = (before.exp() * (before - after)).sum(-1)  # [M]
    return (drift * rows.weights.to(drift.dtype)).sum() / len(rows.hidden)

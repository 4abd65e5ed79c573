"""Rows of tokens from the first edited layer up: what enters it is run once, the layers above it again and again.

An edit changes nothing below the first edited layer, so that the states that enter it never change in training. A
row is always run in the same batch, with rows that were wanted at the same time, so that a run that was resumed sees
the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kpatch.mend.places import Place, module_of
from kpatch.models.model import Model
from kpatch.models.partial_forward import Batch, Calls, align, record

_BATCH = 8  # rows that are run together

Ids = tuple[int, ...]
Update = tuple[Tensor, Tensor]  # reads [G, R, in] and writes [G, R, out] of one place, for each of G groups


@dataclass(frozen=True)
class Row:
    """Token ids that are run, the places where logits are wanted, and the tokens that should follow there, if any."""

    ids: Ids
    reads: tuple[int, ...]
    tokens: tuple[int, ...] = ()


class Below:
    """The states that enter layer `first`; kept as long as they fit into `budget` bytes.

    A row is run with those that `together` named with it, or alone.
    """

    def __init__(self, model: Model, first: int, budget: int) -> None:
        self.model, self.first, self.budget = model, first, budget
        self._company: dict[Ids, tuple[Ids, ...]] = {}
        self._kept: dict[Ids, Tensor] = {}

    def together(self, rows: Iterable[Ids]) -> None:
        """Rows that are wanted together are run together, in batches of like lengths; the first word counts."""
        new = sorted({ids for ids in rows if ids not in self._company}, key=lambda ids: (len(ids), ids))
        for begin in range(0, len(new), _BATCH):
            company = tuple(new[begin : begin + _BATCH])
            self._company |= dict.fromkeys(company, company)

    def ready(self, rows: Sequence[Row]) -> Above:
        """Rows padded on the right, with the states that enter the first edited layer."""
        batch = _padded(self.model, [row.ids for row in rows])
        states = self._states([row.ids for row in rows])
        hidden = states[0].new_zeros(*batch.ids.shape, states[0].shape[-1])
        for number, state in enumerate(states):
            hidden[number, : len(state)] = state
        spots = [(number, at) for number, row in enumerate(rows) for at in row.reads]
        weights = [1 / len(row.reads) for row in rows for _ in row.reads]
        tokens = [token for row in rows for token in row.tokens]
        on = self.model.device
        return Above(
            *(self.model, record(self.model, batch), hidden, self.first, torch.tensor(spots, device=on)),
            *(
                torch.tensor(tokens, dtype=torch.long, device=on),
                torch.tensor(weights, dtype=torch.promote_types(hidden.dtype, torch.float32), device=on),
            ),
        )

    def _states(self, rows: Sequence[Ids]) -> list[Tensor]:
        """One [T, d] for each row."""
        new: dict[Ids, Tensor] = {}
        for ids in rows:
            if ids not in self._kept and ids not in new:
                new |= self._run(self._company.get(ids, (ids,)))
        found = [self._kept[ids] if ids in self._kept else new[ids] for ids in rows]
        for ids, state in new.items():
            self.budget -= state.numel() * state.element_size()
            if self.budget > 0:
                self._kept[ids] = state
        return found

    @torch.no_grad()
    def _run(self, rows: tuple[Ids, ...]) -> dict[Ids, Tensor]:
        calls = record(self.model, _padded(self.model, rows))
        hidden = calls.run(calls.start, 0, self.first)
        return {ids: hidden[number, : len(ids)].clone() for number, ids in enumerate(rows)}


def _padded(model: Model, rows: Sequence[Ids]) -> Batch:
    return align(rows, [0] * len(rows), model.pad_id, model.device)


@dataclass
class Above:
    """Rows ready to be run from layer `first` on; `weights` [M] make a sum over reads the sum of rows' means."""

    model: Model
    calls: Calls
    hidden: Tensor  # [B, T, d]
    first: int
    spots: Tensor  # [M, 2] row and column of each read
    tokens: Tensor  # [M], or [0] where none are wanted
    weights: Tensor  # [M]

    def run(self) -> Tensor:
        """What leaves the last layer: [B, T, d]."""
        out: Tensor = self.calls.run(self.hidden, self.first, self.model.n_layers)
        return out

    def logp(self) -> Tensor:
        """log P over the vocabulary at every read: [M, V], float32 or wider."""
        out = self.run()
        logits = self.model.logits(out[self.spots[:, 0], self.spots[:, 1]])
        logp: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return logp

    def losses(self) -> Tensor:
        """−log P of the wanted tokens, weighted: [M]; the sum is that of the rows' means."""
        logp = self.logp().gather(1, self.tokens[:, None])[:, 0]
        return -logp * self.weights.to(logp.dtype)


def factors(rows: Above, where: Sequence[Place]) -> list[tuple[Tensor, Tensor]]:
    """For each place u [B, T, in] and δ [B, T, out]: its input, and the gradient of each row's loss at its output.

    Rows do not see each other, so that every row's δ is that of its own loss. Nothing of the model is changed.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for place in where:

        def keep(module: nn.Module, given: Any, out: Tensor, name: str = place.name) -> None:
            inputs[name], outputs[name] = given[0].detach(), out

        handles.append(module_of(rows.model, place).register_forward_hook(keep))
    rows.hidden.requires_grad_()  # the weights are frozen: without this there would be no graph
    try:
        with torch.enable_grad():
            loss = rows.losses().sum()
            deltas = torch.autograd.grad(loss, [outputs[place.name] for place in where])
    finally:
        rows.hidden.requires_grad_(False)
        for handle in handles:
            handle.remove()
    shape = rows.hidden.shape[:2]
    on = rows.hidden.device
    return [
        (inputs[place.name].to(on).reshape(*shape, -1), delta.to(on).reshape(*shape, -1))
        for place, delta in zip(where, deltas, strict=True)
    ]


def marked(u: Tensor, delta: Tensor) -> Tensor:
    """The flat indices of tokens that have a gradient, as the authors' code takes them: u and δ are both not zero."""
    found: Tensor = ((u != 0).any(-1) & (delta != 0).any(-1)).flatten().nonzero().flatten()
    return found


@contextmanager
def updated(model: Model, where: Sequence[Place], updates: Sequence[Update]) -> Iterator[None]:
    """While open, every place adds what its update makes of its input; gradients flow into the update.

    Rows of a batch come group by group, as many for each of the G groups.
    """
    handles = []
    for place, (reads, writes) in zip(where, updates, strict=True):

        def add(module: nn.Module, given: Any, out: Tensor, reads: Tensor = reads, writes: Tensor = writes) -> Tensor:
            x = given[0].to(reads).reshape(len(reads), -1, reads.shape[-1])  # [G, tokens, in]
            change = (x @ reads.mT) @ writes
            result: Tensor = out + change.reshape(out.shape).to(out)
            return result

        handles.append(module_of(model, place).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

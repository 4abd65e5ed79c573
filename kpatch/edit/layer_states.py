"""Keys and states of groups below L at the subject's last token, carried from layer to layer while the weights change.

Each batch keeps what enters the current layer, so that nothing runs from the bottom again, unless all of them together
take more than the memory that was given: then every layer's keys come from a run of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.edit.keys import Block, Keys
from kpatch.edit.requests import Group, in_batches
from kpatch.facts.tokens import Encoded
from kpatch.memory import give_back
from kpatch.models.model import Model
from kpatch.models.partial_forward import Calls, align, record

_SPREAD = 2.0  # how much wider than a batch's narrowest row its widest may be; chat templates stand before few rows
_PADDED = 4 / 3  # columns that run for each token, where a batch's rows are of all widths that _SPREAD allows


@dataclass(frozen=True)
class _Batch:
    """Some rows, cut after the subject's last token."""

    calls: Calls
    bare: Tensor  # (m,) rows that are the bare prompt of their group


def key_shares(group: Group) -> list[float]:
    """How much each row counts in a group's key: the bare prompts one half together, all contexts the other half.

    The first position of a text is an attention sink, and its token has lost its leading space, so a short subject's
    key there differs from its key in context. With one bare prompt among six rows the averaged key would barely match
    it. The MEMIT authors' code averages over kinds of context in the same way.
    """
    bare = group.contexts.count(0)
    rest = len(group.rows) - bare
    whole = 0.5 if bare and rest else 1.0
    return [whole / (rest if context else bare) for context in group.contexts]


class LayerStates:
    """Keys and states of all groups, layer after layer in ascending order.

    `start(l)` runs up to layer l once; `at(l, L)` gives keys and h^L under the weights as they are;
    `advance(l, m)` runs layers l to m - 1 again after W^l has changed. Ranks share the batches. `budget` bounds in
    bytes what one batch takes, and what all of them keep.
    """

    def __init__(self, model: Model, groups: Sequence[Group], budget: int) -> None:
        self.model, self.groups = model, groups
        self.rows = [row for group in groups for row in group.rows]
        self.owner = torch.tensor([index for index, group in enumerate(groups) for _ in group.rows])
        self.shares = torch.tensor([share for group in groups for share in key_shares(group)])
        self.bare = torch.tensor([index == group.bare for group in groups for index in range(len(group.rows))])
        column = math.ceil(_PADDED * (8 * model.width + 3 * model.mlp_width) * model.dtype.itemsize)  # bytes
        self.batches = in_batches(self.rows, _columns, lambda row: _columns(row) * column, budget, _SPREAD)
        kept = sum(map(_columns, self.rows)) * model.width * model.dtype.itemsize
        mine = [number for number in range(len(self.batches)) if distributed.mine(number)] if kept <= budget else []
        self.running: dict[int, Tensor | None] = dict.fromkeys(mine)  # [B, P, d] that enters the current layer

    def _begin(self, number: int) -> _Batch:
        """The calls of a batch are made anew for every run: masks and tables take as much as the states."""
        members, device = self.batches[number], self.model.device
        ids = [self.rows[index].ids[: _columns(self.rows[index])] for index in members]
        calls = record(self.model, align(ids, [len(some) - 1 for some in ids], self.model.pad_id, device))
        return _Batch(calls, self.bare[members].nonzero().flatten().to(device))

    @torch.no_grad()
    def start(self, layer: int) -> None:
        """Run every row up to what enters `layer`."""
        self._carry(0, layer)

    @torch.no_grad()
    def at(self, layer: int, last: int) -> tuple[Keys, Tensor]:
        """Keys at `layer` and states h^last [n, d] of the bare rows, float32 on the CPU."""
        states = torch.empty(len(self.groups), self.model.width)
        means = torch.zeros(len(self.groups), self.model.key_width(layer))

        def run(number: int) -> tuple[Tensor, Tensor]:
            batch, hidden = self._begin(number), self.running.get(number)
            if hidden is None:
                hidden = batch.calls.run(batch.calls.start, 0, layer)
            out, key = batch.calls.run_with_key(hidden, layer)
            above = out[batch.bare]
            if len(above):
                above = batch.calls.select(batch.bare).run(above, layer + 1, last + 1)
            # Copies: a view of the last column keeps all of them
            found = key[:, -1].float().cpu().clone(), above[:, -1].float().cpu().clone()  # (B, f), (m, d)
            del batch, hidden, out, key, above
            give_back()
            return found

        blocks = []
        for members, (rows, above) in zip(self.batches, distributed.share(range(len(self.batches)), run), strict=True):
            owner, shares = self.owner[members], self.shares[members]
            states[owner[self.bare[members]]] = above
            means.index_add_(0, owner, rows * shares[:, None])
            blocks.append(Block(rows, shares, owner))
        return Keys(means, tuple(blocks)), states

    @torch.no_grad()
    def advance(self, layer: int, above: int) -> None:
        """Carry every row from what enters `layer` to what enters `above`, under the weights as they are now."""
        self._carry(layer, above)

    def _carry(self, first: int, last: int) -> None:
        for number, hidden in self.running.items():
            calls = self._begin(number).calls
            self.running[number] = calls.run(calls.start if hidden is None else hidden, first, last)
            del calls, hidden
            give_back()


def _columns(row: Encoded) -> int:
    """The columns of a row up to the subject's last token."""
    return row.subject_last + 1


@torch.no_grad()
def written(model: Model, layer: int, keys: Tensor) -> Tensor:
    """What W^l puts out for keys [n, f]: [n, d] float32 on the CPU."""
    out: Tensor = model.down(layer)(keys.to(model.device, model.dtype)).float()
    return out.cpu()

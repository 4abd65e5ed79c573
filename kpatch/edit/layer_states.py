"""Keys and states of groups below L at the subject's last token, carried from layer to layer while the weights change.

Each batch keeps what enters the current layer, so that nothing runs from the bottom again, unless all of them together
take more than the memory that was given: then every layer's keys come from a run of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.edit.requests import Group, in_batches
from kpatch.models.model import Model
from kpatch.models.partial_forward import Calls, align, record


@dataclass
class _Batch:
    """Some groups' rows, cut after the subject's last token, with what enters the current layer [B, P, d]."""

    calls: Calls
    hidden: Tensor
    bare: Tensor  # (m,) row of each group's bare prompt


@dataclass(frozen=True)
class Keys:
    """Every row's key at one layer, float32 on the CPU, and what they are to their groups.

    means [n, f]  the groups' weighted means   rows [B, f]  each row's own key
    shares [B]  how much a row counts in its group's mean   owner [B]  the group of each row
    """

    means: Tensor
    rows: Tensor
    shares: Tensor
    owner: Tensor


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
        column = (8 * model.width + 3 * model.mlp_width) * model.dtype.itemsize  # bytes
        self.batches = in_batches(
            groups, lambda group: group.prefix, lambda group: len(group.rows) * (group.prefix + 1) * column, budget
        )
        order = [index for batch in self.batches for index in batch]  # as rows come, batch after batch
        self.owner = torch.tensor([index for index in order for _ in groups[index].rows])
        self.shares = torch.tensor([share for index in order for share in key_shares(groups[index])])
        state = model.width * model.dtype.itemsize
        kept = sum(len(group.rows) * (group.prefix + 1) * state for group in groups)
        mine = [number for number in range(len(self.batches)) if distributed.mine(number)] if kept <= budget else []
        self.running = {number: self._begin(self.batches[number]) for number in mine}

    def _begin(self, members: list[int]) -> _Batch:
        rows = [row for index in members for row in self.groups[index].rows]
        bare, first = [], 0
        for index in members:
            bare.append(first + self.groups[index].bare)
            first += len(self.groups[index].rows)
        device = self.model.device
        ids = [row.ids[: row.subject_last + 1] for row in rows]
        calls = record(self.model, align(ids, [row.subject_last for row in rows], self.model.pad_id, device))
        return _Batch(calls, calls.start, torch.tensor(bare, device=device))

    @torch.no_grad()
    def start(self, layer: int) -> None:
        """Run every row up to what enters `layer`."""
        for batch in self.running.values():
            self._carry(batch, 0, layer)

    @torch.no_grad()
    def at(self, layer: int, last: int) -> tuple[Keys, Tensor]:
        """Keys at `layer` and states h^last [n, d] of the bare rows, float32 on the CPU."""
        states = torch.empty(len(self.groups), self.model.width)

        def run(number: int) -> tuple[Tensor, Tensor]:
            batch = self.running.get(number)
            if batch is None:
                batch = self._begin(self.batches[number])
                self._carry(batch, 0, layer)
            out, key = batch.calls.run_with_key(batch.hidden, layer)
            above = batch.calls.select(batch.bare).run(out[batch.bare], layer + 1, last + 1)
            return key[:, -1].float().cpu(), above[:, -1].float().cpu()  # (B, f), (m, d)

        found = distributed.share(range(len(self.batches)), run)
        for members, (_, above) in zip(self.batches, found, strict=True):
            states[members] = above
        rows = torch.cat([keys for keys, _ in found])
        means = torch.zeros(len(self.groups), rows.shape[1]).index_add(0, self.owner, rows * self.shares[:, None])
        return Keys(means, rows, self.shares, self.owner), states

    @torch.no_grad()
    def advance(self, layer: int, above: int) -> None:
        """Carry every row from what enters `layer` to what enters `above`, under the weights as they are now."""
        for batch in self.running.values():
            self._carry(batch, layer, above)

    def _carry(self, batch: _Batch, first: int, last: int) -> None:
        """Layers first to last - 1; what entered the lowest is not needed any more, and takes as much as the rest."""
        batch.hidden = batch.calls.start = batch.calls.run(batch.hidden, first, last)


@torch.no_grad()
def written(model: Model, layer: int, keys: Tensor) -> Tensor:
    """What W^l puts out for keys [n, f]: [n, d] float32 on the CPU."""
    out: Tensor = model.down(layer)(keys.to(model.device, model.dtype)).float()
    return out.cpu()

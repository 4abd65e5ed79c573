"""The strongest coefficients of every unit of a layer, kept while a text streams by.

A unit's coefficient m is its entry of the key; where m > 0 it adds m·v to the residual stream, and where m < 0, as in
gated MLPs, |m|·(−v). The two sides are kept apart: they answer to different texts.
Source: Geva et al. 2021 (2012.14913), section 3: trigger examples.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIGNS = (1, -1)
_WAIT = 4  # candidates wait until there are so many for every one kept: sorting them rarely costs little
_MANY = 8  # so many for every one kept are thinned out before they are listed


class Triggers:
    """The `most` strongest coefficients of each of f units and of each sign, with their places in the text.

    After `settle`: strengths [2, f, most], |m| falling, 0 where there were fewer; places [2, f, most], index of the
    prefix's last token in the text, −1 where there were fewer; before [2, f, most], m with the last token left out.
    Of equal strengths the earlier one comes first.
    """

    def __init__(self, width: int, most: int, device: torch.device | str = "cpu") -> None:
        self.strengths = torch.zeros(2, width, most, device=device)
        self.places = torch.full((2, width, most), -1, dtype=torch.int32, device=device)
        self.before = torch.zeros(2, width, most, device=device)
        self._waiting: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
        self._count = 0

    @property
    def most(self) -> int:
        return self.strengths.shape[2]

    def add(self, keys: Tensor, first: int) -> None:
        """Take in the keys [B, T, f] of rows that begin at place `first` of the text, end to end.

        The first column of a row counts for nothing, for it is an attention sink, nor does the last, which no token
        of the row follows.
        """
        if keys.shape[1] < 3:
            return
        inner, earlier = keys[:, 1:-1], keys[:, :-2]  # (B, T − 2, f)
        for side, sign in enumerate(SIGNS):
            least = self.strengths[side, :, -1].to(keys.dtype)
            found = inner > least if sign > 0 else inner < -least
            if int(found.sum()) > _MANY * least.numel() * self.most:
                signed = (sign * inner).flatten(0, 1)
                floor = signed.topk(min(self.most, len(signed)), dim=0).values[-1]  # (f,)
                found &= sign * inner >= floor
            rows, columns, units = found.nonzero(as_tuple=True)
            places = (first + rows * keys.shape[1] + columns + 1).int()
            self._waiting.append(
                (side, units, inner[rows, columns, units].abs().float(), places, earlier[rows, columns, units].float())
            )
            self._count += len(units)
        if self._count > _WAIT * self.strengths.numel():
            self.settle()

    def settle(self) -> None:
        """Sort what is waiting into what is kept."""
        for side in range(len(SIGNS)):
            new = [rest for kind, *rest in self._waiting if kind == side]
            if new:
                self._merge(side, *(torch.cat(parts) for parts in zip(*new, strict=True)))
        self._waiting, self._count = [], 0

    def _merge(self, side: int, units: Tensor, strengths: Tensor, places: Tensor, before: Tensor) -> None:
        width = self.strengths.shape[1]
        old = self.strengths[side] > 0
        units = torch.cat([old.nonzero(as_tuple=True)[0], units])  # those kept come first: their places are earlier
        strengths = torch.cat([self.strengths[side][old], strengths])
        places = torch.cat([self.places[side][old], places])
        before = torch.cat([self.before[side][old], before])
        order = strengths.argsort(descending=True, stable=True)
        order = order[units[order].argsort(stable=True)]
        units = units[order]
        begins = torch.searchsorted(units, torch.arange(width, device=units.device))
        ranks = torch.arange(len(units), device=units.device) - begins[units]
        kept = ranks < self.most
        units, ranks, order = units[kept], ranks[kept], order[kept]
        for into, values, nothing in (
            (self.strengths, strengths, 0.0),
            (self.places, places, -1),
            (self.before, before, 0.0),
        ):
            into[side].fill_(nothing)
            into[side][units, ranks] = values[order]

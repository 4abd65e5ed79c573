"""Keys of groups at one layer, every row's, block by block: what works on all of them never holds a second copy.

Groups have several rows each, so that their keys take more memory than all that a patch stores of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Some rows' keys [b, f], how much each counts in its group's mean [b], and the group of each [b]."""

    rows: Tensor
    shares: Tensor
    owner: Tensor


@dataclass(frozen=True)
class Keys:
    """The weighted means [n, f] of n groups, and the rows that they are of; float32 on the CPU."""

    means: Tensor
    blocks: tuple[Block, ...]

    def scaled(self, scale: Tensor) -> Iterator[Block]:
        """The rows, those of group i times scale[i]; scale [n, 1]."""
        for one in self.blocks:
            yield Block(one.rows * scale[one.owner], one.shares, one.owner)

    def chosen(self, wanted: Tensor) -> Keys:
        """The keys of the groups whose flag [n] is set, numbered anew."""
        if bool(wanted.all()):
            return self
        number = wanted.long().cumsum(0) - 1
        some = ((one, wanted[one.owner]) for one in self.blocks)
        blocks = (Block(one.rows[mine], one.shares[mine], number[one.owner[mine]]) for one, mine in some)
        return Keys(self.means[wanted], tuple(block for block in blocks if len(block.owner)))

    def joined(self, other: Keys) -> Keys:
        """These groups, and behind them the other's."""
        n = len(self.means)
        more = (Block(one.rows, one.shares, one.owner + n) for one in other.blocks)
        return Keys(torch.cat([self.means, other.means]), (*self.blocks, *more))

"""What the pass over a text finds out about one layer, and how it is kept in the cache."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LayerMemories:
    """One layer with f units, T = the number of triggers kept, S inputs; everything on the CPU.

    strengths, places, before [2, f, T]  see `triggers.Triggers`; side 0 is m > 0, side 1 is m < 0
    promoted, chances [2, f]  top token of v and of −v, and its probability
    rank_units [u], ranks [u]  units, and the rank of the token behind their strongest trigger among what they promote
    active, positive, effective [S]  shares of memories: |m| above 0.1 rms; m > 0; by participation ratio
    alone [S]  whether one active memory promotes what the layer predicts
    residual_top, layer_top, out_top [S]  what r, y and o predict; final_top [S], what the model does
    final_chance [S]  probability of final_top according to r
    """

    layer: int
    strengths: Tensor
    places: Tensor
    before: Tensor
    promoted: Tensor
    chances: Tensor
    rank_units: Tensor
    ranks: Tensor
    active: Tensor
    positive: Tensor
    effective: Tensor
    alone: Tensor
    residual_top: Tensor
    layer_top: Tensor
    out_top: Tensor
    final_top: Tensor
    final_chance: Tensor

    @property
    def width(self) -> int:
        return self.strengths.shape[1]

    def stronger(self) -> Tensor:
        """The side on which each unit reaches further: 0 or 1, [f]."""
        return (self.strengths[1, :, 0] > self.strengths[0, :, 0]).long()

    def of_side(self, values: Tensor, sides: Tensor) -> Tensor:
        """values [2, f, ...] at each unit's side [f]: [f, ...]."""
        return values[sides, range(self.width)]

    def to_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).contiguous() for name in _TENSORS}


_TENSORS = tuple(field.name for field in fields(LayerMemories) if field.name != "layer")


def from_tensors(about: dict[str, Any], tensors: dict[str, Tensor], layer: int, width: int) -> LayerMemories:
    """The layer that a file of the cache holds. Raises ValueError for another layer's, KeyError where a part lacks."""
    found = LayerMemories(layer, **{name: tensors[name] for name in _TENSORS})
    if about["layer"] != layer or found.width != width:
        raise ValueError("it holds another layer")
    return found

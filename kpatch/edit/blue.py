"""BLUE: of the layers R only the first and the last are edited, each for a value of its own, with nothing spread.

Source: Li et al. 2025 (BLUE, NeurIPS, 2502.03748): what MEMIT spreads over R hardly counts in the lower layers, and
after the first layer is edited for a value found there, the others have next to nothing left to do. So the value of
the last layer is found in the model as the first left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kpatch.edit.first_token import Part, split
from kpatch.edit.memit_paper import MemitPaper
from kpatch.edit.presets import PRESETS
from kpatch.edit.requests import Group
from kpatch.models.model import Model


class Blue(MemitPaper):
    """MEMIT of the paper at the first layer of R, and once more at the last."""

    name = "blue"
    presets = PRESETS["blue"]
    in_turn = True

    def layers(self, hyper: Any) -> tuple[int, ...]:
        return tuple(sorted({min(hyper.layers), max(hyper.layers), hyper.first_layer}))

    def require(self, model: Model, layers: Sequence[int]) -> None:
        super().require(model, (min(layers), max(layers)))

    def parts(self, groups: Sequence[Group], hyper: Any) -> list[Part]:
        """Subjects that open a text at a layer of their own; the others in one layer, then in the other."""
        parts = []
        for part in split(groups, hyper):
            ends = sorted({min(part.hyper.layers), max(part.hyper.layers)})
            parts += [replace(part, hyper=replace(part.hyper, layers=(layer,))) for layer in ends]
        return parts

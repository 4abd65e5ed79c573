"""Which units to look at: named ones, or some of each layer, drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kpatch.errors import BadInput


class Unit(NamedTuple):
    """One unit of an MLP, by its layer and its number in the layer: 12.345."""

    layer: int
    number: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.number}"


def parse_units(names: Sequence[str]) -> list[Unit]:
    """Units called layer.number, rising, each once. Raises BadInput for other names."""
    found = set()
    for name in names:
        layer, dot, index = str(name).strip().partition(".")
        if not dot or not all(part.isascii() and part.isdecimal() for part in (layer, index)):
            raise BadInput(f"{name!r} names no unit", hint="write layer.number, as in `units=12.345`")
        found.add(Unit(int(layer), int(index)))
    return sorted(found)


def require_units(units: Sequence[Unit], widths: Mapping[int, int], name: str) -> None:
    """Raise BadInput for units that the model called `name` lacks; `widths` are f by layer."""
    for unit in units:
        if unit.layer not in widths:
            raise BadInput(
                f"{name} has no unit {unit}",
                details=[f"expected a layer among {min(widths)} to {max(widths)}, found {unit.layer}"],
            )
        if unit.number >= widths[unit.layer]:
            raise BadInput(
                f"{name} has no unit {unit}",
                details=[f"expected a number from 0 to {widths[unit.layer] - 1}, found {unit.number}"],
            )


def sample_units(widths: Mapping[int, int], count: int, seed: int) -> list[Unit]:
    """`count` units of every layer, rising; all of a narrower layer. They depend on the layer and the seed alone."""
    found = []
    for layer, width in sorted(widths.items()):
        draw = random.Random(f"kpatch units {seed} {layer}")
        found += [Unit(layer, index) for index in sorted(draw.sample(range(width), min(count, width)))]
    return found

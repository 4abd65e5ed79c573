"""What one cell of a grid changes in a corrupted run, as data: the engine and its oracle both read it.

Source: Meng et al. 2023 (MEMIT), section 3 and appendix A; Meng et al. 2022 (ROME), section 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Site = Literal["state", "mlp", "attn"]


@dataclass(frozen=True, slots=True)
class Point:
    """One vector of a run: h ("state"), m ("mlp") or a ("attn") of `layer` at `token`; states are what leaves it."""

    site: Site
    layer: int
    token: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A corrupted run in which `restore` take their values from the clean run and `freeze` keep the corrupted ones.

    A point in both is restored.
    """

    restore: tuple[Point, ...]
    freeze: tuple[Point, ...] = ()


def state(layer: int, token: int) -> Cell:
    """h_t^l restored."""
    return Cell((Point("state", layer, token),))


def window(site: Site, layer: int, token: int, width: int, layers: int) -> Cell:
    """`width` outputs of one kind around `layer` restored, fewer where the stack of `layers` ends."""
    return Cell(tuple(Point(site, at, token) for at in span(layer, width, layers)))


def span(layer: int, width: int, layers: int) -> range:
    """The layers of a window: width // 2 below `layer`, itself, and the rest above it, cut off at both ends."""
    begin = layer - width // 2
    return range(max(0, begin), min(layers, begin + width))


def severed(site: Site, layer: int, token: int, layers: int) -> Cell:
    """h_t^l restored while every output of one kind at `token` keeps its corrupted value: that path is cut."""
    return Cell(
        (Point("state", layer, token),),
        tuple(Point(site, at, token) for at in range(layer + 1, layers)),
    )


def everything(layers: int, tokens: Iterable[int]) -> Cell:
    """Every state of `tokens` restored."""
    return Cell(tuple(Point("state", layer, token) for layer in range(layers) for token in tokens))

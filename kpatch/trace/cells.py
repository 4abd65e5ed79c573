"""The cells of a fact's grids and curves: what each one changes in a corrupted run, as data, and their shape.

The engine and its oracle both read a cell. A section is what is computed and kept as one: the grids of one kind, or
the curves at the subject's last token.

Source: Meng et al. 2023 (MEMIT), section 3 and appendix A; Meng et al. 2022 (ROME), section 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Site = Literal["state", "mlp", "attn"]


@dataclass(frozen=True)
class Traced:
    """One fact as it is traced: its prompt's ids, the subject's tokens first..last, the id of the answer."""

    ids: tuple[int, ...]
    first: int
    last: int
    answer: int


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


CURVES = ("plain", "mlp", "attn")
KINDS: tuple[Site, ...] = ("state", "mlp", "attn")


def sections(quick: bool) -> tuple[str, ...]:
    """The curves alone (all that R needs), or the three grids too."""
    return ("severed",) if quick else ("severed", *KINDS)


def cells_of(section: str, item: Traced, layers: int, width: int) -> list[Cell]:
    """The cells of one section in the order in which `shape` reads them; tokens before the subject have none."""
    if section == "severed":
        plain = [state(layer, item.last) for layer in range(layers)]
        cut: list[Cell] = [severed(site, layer, item.last, layers) for site in _SEVERED for layer in range(layers)]
        return plain + cut
    kind = next(site for site in KINDS if site == section)
    tokens = range(item.first, len(item.ids))
    if kind == "state":
        return [state(layer, token) for token in tokens for layer in range(layers)]
    return [window(kind, layer, token, width, layers) for token in tokens for layer in range(layers)]


_SEVERED: tuple[Site, ...] = ("mlp", "attn")  # as in CURVES


def shape(section: str, values: Sequence[float], item: Traced, layers: int, corrupted: float) -> Tensor:
    """P[answer] by cell as a grid [T, L], or as the curves [3, L] in the order of CURVES.

    Before the subject nothing is corrupted, so restoring changes nothing there.
    """
    found = torch.tensor(values, dtype=torch.float64).view(-1, layers)
    if section == "severed":
        return found
    return torch.cat([torch.full((item.first, layers), corrupted, dtype=torch.float64), found])

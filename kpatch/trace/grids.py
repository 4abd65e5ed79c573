"""Which cells a fact's grids and curves have, and how their numbers are put back into shape.

A section is what is computed and kept as one: the grids of one kind, or the curves at the subject's last token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kpatch.trace.base import Traced
from kpatch.trace.cells import Cell, Site, severed, state, window

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

"""What a search tries: ranges of layers by depth and by a trace, then numbers around the defaults. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kpatch.edit.memit import default_layers

# R as shares of the depth, beside the default's
DEPTHS = {
    "lower": (0.03, 0.33),
    "higher": (0.17, 0.57),
    "narrower": (0.13, 0.33),
    "wider": (0.03, 0.67),
}
QUICK = ("lower", "higher")
# One after another, each with the best of those before it; the values beside the default
NUMBERS = {
    "leverage": ("1.25", "1.75", "3.5", "5.0"),
    "stop_loss": ("0.02", "0.1", "0.2"),
    "clamp": ("0.75", "1.5", "2.0"),
}
WORDINGS = ("none",)


@dataclass(frozen=True)
class LayersToTry:
    """A range R and where it comes from, in words."""

    layers: tuple[int, ...]
    why: str


def by_depth(
    n_layers: int, editable: Sequence[int], names: Sequence[str], default: Sequence[int]
) -> list[LayersToTry]:
    """Ranges of the names in DEPTHS, without those that are the default's or that another one is."""
    found = []
    for name in names:
        low, high = DEPTHS[name]
        layers = tuple(layer for layer in default_layers(n_layers, low, high) if layer in editable)
        found.append(LayersToTry(layers, f"{name}: {low:.0%} to {high:.0%} of the depth".replace("%", " %")))
    return _new(found, default)


def by_trace(
    traced: Sequence[int], n_layers: int, editable: Sequence[int], default: Sequence[int]
) -> list[LayersToTry]:
    """The layers that a trace proposes, and a range as wide as the default's around them."""
    below = [layer for layer in editable if layer < n_layers - 1]
    width, middle = len(default), (min(traced) + max(traced)) / 2
    first = max(0, min(round(middle - (width - 1) / 2), n_layers - 1 - width))
    around = range(first, first + width)
    return _new(
        [
            LayersToTry(tuple(layer for layer in traced if layer in below), "what a causal trace proposes"),
            LayersToTry(tuple(layer for layer in around if layer in below), "around what a causal trace proposes"),
        ],
        default,
    )


def _new(found: Sequence[LayersToTry], default: Sequence[int]) -> list[LayersToTry]:
    kept: dict[tuple[int, ...], LayersToTry] = {}
    for one in found:
        if one.layers and one.layers != tuple(default):
            kept.setdefault(one.layers, one)
    return list(kept.values())

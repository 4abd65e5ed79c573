"""Colours of the three kinds, as in the paper: purple for states, green for MLPs, red for attention."""

from __future__ import annotations

Color = tuple[int, int, int]

_WHITE: Color = (255, 255, 255)
_DEEP: dict[str, Color] = {"state": (84, 39, 143), "mlp": (0, 109, 44), "attn": (165, 15, 21)}
_DARK: Color = (28, 28, 34)
_BRIGHT: dict[str, tuple[Color, Color]] = {
    "state": ((129, 87, 214), (236, 226, 255)),
    "mlp": ((38, 150, 84), (222, 250, 228)),
    "attn": ((214, 69, 65), (255, 228, 222)),
}


def on_white(kind: str, share: float) -> Color:
    """White for 0 to the kind's deep colour for 1."""
    return _mix(_WHITE, _DEEP[kind], _within(share))


def on_dark(kind: str, share: float) -> Color:
    """Nearly black for 0, over the kind's colour, to nearly white for 1: legible on any terminal."""
    share = _within(share)
    middle, top = _BRIGHT[kind]
    return _mix(_DARK, middle, 2 * share) if share < 0.5 else _mix(middle, top, 2 * share - 1)


def hex_of(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def dark(color: Color) -> bool:
    """True where white text reads better than black."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] < 140


def _within(share: float) -> float:
    return min(1.0, max(0.0, share)) if share == share else 0.0  # NaN is nothing


def _mix(a: Color, b: Color, share: float) -> Color:
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue

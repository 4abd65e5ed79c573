"""R on made curves whose answer is plain, and its laws."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpatch.trace.layer_range import LEAST, Range, choose, stability, widest

LAYERS = 30
ZERO = [0.0] * LAYERS


def gap_at(heights: dict[int, float], layers: int = LAYERS) -> list[float]:
    return [heights.get(layer, 0.0) for layer in range(layers)]


def bump(middle: float, height: float = 0.5, spread: float = 2.5) -> list[float]:
    return [height * math.exp(-(((layer - middle) / spread) ** 2) / 2) for layer in range(LAYERS)]


def plateau(first: int, last: int, height: float = 0.5) -> list[float]:
    return gap_at(dict.fromkeys(range(first, last + 1), height))


def chosen(gap: list[float], total: float = 0.6) -> tuple[int, int] | None:
    """R for a gap, laid over a severed curve that is not flat."""
    severed = [0.1 * math.sin(layer) ** 2 for layer in range(len(gap))]
    found = choose([a + b for a, b in zip(severed, gap, strict=True)], severed, total)
    return None if found is None else (found.first, found.last)


def test_a_bump() -> None:
    assert chosen(bump(8)) == (7, 9)  # 0.75 of the height is reached 1.9 layers from the middle
    assert chosen(bump(8, spread=3.4)) == (6, 10)
    assert chosen(bump(8, spread=8)) in {(5, 10), (6, 11)}, "no wider than six"


@pytest.mark.parametrize(("first", "last"), [(4, 8), (0, 3), (10, 10), (12, 17)])
def test_a_plateau(first: int, last: int) -> None:
    assert chosen(plateau(first, last)) == (first, last)


def test_of_a_plateau_wider_than_allowed_the_middle() -> None:
    assert chosen(plateau(6, 15)) == (8, 13)
    assert chosen(plateau(5, 15)) in {(7, 12), (8, 13)}
    assert chosen(plateau(0, 28)) in {(11, 16), (12, 17)}


def test_of_two_bumps_the_larger() -> None:
    low, high = bump(5, 0.3), bump(18, 0.5)
    assert chosen([a + b for a, b in zip(low, high, strict=True)]) == (17, 19)
    assert chosen([max(pair) for pair in zip(plateau(3, 5), plateau(15, 19), strict=True)]) == (15, 19)
    assert chosen([max(pair) for pair in zip(plateau(3, 5), plateau(15, 17), strict=True)]) == (3, 5), (
        "equal: the lower"
    )


def test_a_dip_within_a_bump_does_not_end_it() -> None:
    gap = plateau(4, 8)
    gap[6] = 0.3
    assert chosen(gap) == (4, 8)
    gap[6] = 0.0
    assert chosen(gap) in {(4, 5), (7, 8)}, "a hole does"


def test_the_edges() -> None:
    assert chosen([0.5 - 0.05 * layer for layer in range(LAYERS)]) == (0, 2)
    top = plateau(26, 29)
    assert chosen(top) == (26, 28), "nothing above the last layer reads it"
    assert chosen(gap_at({29: 0.9, 10: 0.3})) == (10, 10)


@pytest.mark.parametrize("seed", range(20))
def test_noise_does_not_move_it_far(seed: int) -> None:
    generator = random.Random(seed)
    found = chosen([value + generator.gauss(0, 0.04) for value in plateau(4, 9)])
    assert found is not None
    assert 3 <= found[0] <= 6
    assert 7 <= found[1] <= 10


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_gives_none(seed: int) -> None:
    generator = random.Random(seed)
    assert chosen([generator.gauss(0, 0.01) for _ in range(LAYERS)]) is None


def test_too_small_a_gap_gives_none() -> None:
    assert chosen(plateau(4, 8, 0.999 * LEAST * 0.6)) is None
    assert chosen(plateau(4, 8, 1.001 * LEAST * 0.6)) == (4, 8)
    assert chosen(ZERO) is None
    assert chosen(plateau(4, 8, -0.5)) is None
    assert chosen(ZERO, total=0.0) is None


def test_gap_and_margin() -> None:
    gap = [max(pair) for pair in zip(plateau(4, 8), plateau(15, 19, 0.2), strict=True)]
    found = choose(gap, ZERO, 0.6)
    assert found is not None
    assert found.gap == pytest.approx(0.5)
    assert found.margin == pytest.approx(0.3)
    assert found.width == 5
    assert found.layers == [4, 5, 6, 7, 8]
    overlapping = choose(plateau(4, 10), ZERO, 0.6)
    assert overlapping is not None
    assert overlapping.margin is not None
    assert overlapping.margin > 0.4, "a range that shares layers with R is no rival"


def test_stacks_too_small_for_a_rival_or_for_anything() -> None:
    assert choose([0.5, 0.1], [0.0, 0.0], 0.5) == Range(0, 0, 0.5, None)
    assert choose([0.5], [0.0], 0.5) is None
    assert [widest(layers) for layers in (2, 4, 12, 24, 28, 30, 48, 80)] == [1, 1, 2, 4, 5, 6, 6, 6]


curves = st.lists(st.integers(-40, 60), min_size=2, max_size=48)


@given(curves, st.integers(1, 60))
def test_laws(points: list[int], total: int) -> None:
    gap = [point / 64 for point in points]  # exact in binary
    found = choose(gap, [0.0] * len(gap), total / 64)
    assert choose([4 * value for value in gap], [0.0] * len(gap), 4 * total / 64) == (
        None if found is None else Range(found.first, found.last, 4 * found.gap, _four(found.margin))
    ), "the unit does not matter"
    assert choose([value + 1 for value in gap], [1.0] * len(gap), total / 64) == found, "only the gap matters"
    if found is None:
        assert max(gap[:-1]) <= max(0, LEAST * total / 64)
        return
    assert 0 <= found.first <= found.last < len(gap) - 1
    assert found.width <= widest(len(gap))
    inside = gap[found.first : found.last + 1]
    assert found.gap == pytest.approx(sum(inside) / len(inside))
    assert max(inside) > 0


def _four(margin: float | None) -> float | None:
    return None if margin is None else 4 * margin


def test_stability_counts_samples() -> None:
    one, other = Range(4, 8, 0.5, 0.1), Range(5, 8, 0.5, 0.1)
    found = stability(one, [one, other, one, None], 10)
    assert (found.same, found.none) == (0.5, 0.25)
    assert found.layers == (0, 0, 0, 0, 0.5, 0.75, 0.75, 0.75, 0.75, 0)
    assert found.ranges == ((4, 8, 0.5), (5, 8, 0.25))
    assert stability(None, [None, one], 10).same == 0.5

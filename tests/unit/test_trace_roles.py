"""Averages by role, and intervals by bootstrap."""

from __future__ import annotations

import math

import pytest
import torch

from kpatch.trace.summary import ROLES, by_role, effects, interval, means, resamples, role_of

NAN = math.nan


@pytest.mark.parametrize(
    ("first", "last", "length", "roles"),
    [
        (1, 4, 9, [None, 0, 1, 1, 2, 3, 4, 4, 5]),
        (0, 0, 4, [2, 3, 4, 5]),
        (0, 1, 4, [0, 2, 3, 5]),
        (2, 2, 4, [None, None, 2, 5]),
        (1, 2, 3, [None, 0, 2]),
    ],
)
def test_every_token_has_one_role(first: int, last: int, length: int, roles: list[int | None]) -> None:
    assert [role_of(token, first, last, length - 1) for token in range(length)] == roles


def test_a_grid_by_role() -> None:
    grid = torch.tensor([[9.0, 9.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [0.0, 1.0]], dtype=torch.float64)
    found = by_role(grid, 1, 4)
    assert len(found) == len(ROLES)
    assert found[0].tolist() == [1, 2]
    assert found[1].tolist() == [4, 5], "the mean of both middle tokens"
    assert found[2].tolist() == [7, 8]
    assert found[3:5].isnan().all()
    assert found[5].tolist() == [0, 1]
    assert torch.equal(effects([grid], [1.0], [(1, 4)])[0, 1], torch.tensor([3.0, 4.0], dtype=torch.float64))


def test_resamples_draw_as_many_facts_as_there_are() -> None:
    weights = resamples(7, seed=3, draws=500)
    assert weights.shape == (500, 7)
    assert (weights.sum(1) == 7).all()
    assert (weights == weights.round()).all()
    assert weights.mean(0).min() > 0.8
    assert torch.equal(weights, resamples(7, seed=3, draws=500))
    assert not torch.equal(weights, resamples(7, seed=4, draws=500))


def test_means_leave_out_facts_without_a_number() -> None:
    values = torch.tensor([[1.0, NAN, 2.0], [3.0, NAN, NAN]], dtype=torch.float64)
    assert means(values).tolist() == pytest.approx([2, NAN, 2], nan_ok=True)
    weights = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    found = means(values, weights)
    assert found[:, 0].tolist() == [1, 2, 3]
    assert found[:, 1].isnan().all()
    assert found[:, 2].tolist() == pytest.approx([2, 2, NAN], nan_ok=True)


def test_the_interval_is_the_bootstraps() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.0]) + 5
    low, high = interval(values, resamples(60, seed=1))
    width = 2 * 1.96 * values.std(0) / 60**0.5
    assert (high - low)[:2].tolist() == pytest.approx(width[:2].tolist(), rel=0.12)
    assert (low[2], high[2]) == (pytest.approx(5), pytest.approx(5))
    assert (low < values.mean(0)).tolist()[:2] == [True, True]


def test_no_interval_from_one_fact() -> None:
    low, high = interval(torch.tensor([[1.0, 2.0], [NAN, 3.0]], dtype=torch.float64), resamples(2, 0))
    assert low[0].isnan()
    assert high[0].isnan()
    assert (low[1], high[1]) == (2, 3)

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kpatch.patch.delta import Dense, LowRank, concat, inner, smaller, total
from tests.support.checkpoints import random

SIZES = st.integers(1, 9)


@settings(deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(0, 99))
def test_norm_and_inner_product_agree_with_the_dense_delta(rows: int, cols: int, rank: int, seed: int) -> None:
    a = LowRank(random(rows, rank, seed=seed), random(rank, cols, seed=seed + 1))
    b = LowRank(random(rows, 2, seed=seed + 2), random(2, cols, seed=seed + 3))
    assert a.norm() == pytest.approx(float(a.dense().norm()), rel=1e-9)
    expected = float((a.dense() * b.dense()).sum())
    for left in (a, Dense(a.dense())):
        for right in (b, Dense(b.dense())):
            assert inner(left, right) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(SIZES, SIZES, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 99))
def test_concat_and_total_are_the_sum(rows: int, cols: int, ranks: list[int], seed: int) -> None:
    parts = [LowRank(random(rows, r, seed=seed + r), random(r, cols, seed=seed - r)) for r in ranks]
    expected = sum((part.dense() for part in parts), torch.zeros(rows, cols, dtype=torch.float64))
    assert concat(parts).rank == sum(ranks)
    torch.testing.assert_close(concat(parts).dense(), expected)
    torch.testing.assert_close(total(parts).dense(), expected)
    mixed = total([Dense(parts[0].dense()), *parts[1:]])
    torch.testing.assert_close(mixed.dense(), expected)


def test_total_refuses_what_cannot_be_added() -> None:
    with pytest.raises(ValueError, match="at least one"):
        total([])
    with pytest.raises(ValueError, match="different shapes"):
        total([Dense(torch.zeros(2, 3)), Dense(torch.zeros(3, 2))])


def test_compact_finds_the_rank_and_keeps_the_delta() -> None:
    low = LowRank(random(20, 3, seed=1), random(3, 30, seed=2))
    doubled = concat([low, low.scaled(0.5)])
    small = doubled.compact()
    assert (doubled.rank, small.rank) == (6, 3)
    torch.testing.assert_close(small.dense(), 1.5 * low.dense(), rtol=0, atol=1e-6)


def test_compact_drops_only_what_float32_cannot_hold() -> None:
    values = torch.tensor([1.0, 1e-2, 1e-6, 1e-9, 1e-9], dtype=torch.float64)
    q, p = (torch.linalg.qr(random(8, 5, seed=seed).double()).Q for seed in (3, 4))
    low = LowRank(q * values, p.T)
    small = low.compact()
    assert small.rank == 3
    assert float((small.dense() - low.dense()).norm()) <= 2**-24
    assert low.compact(loss=1e-3).rank == 2
    assert low.compact(loss=0).rank == 5


@settings(deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(0, 99))
def test_svd_multiplies_back(rows: int, cols: int, rank: int, seed: int) -> None:
    low = LowRank(random(rows, rank, seed=seed), random(rank, cols, seed=seed + 1))
    u, s, vh = low.svd()
    assert u.shape[1] == len(s) == min(rows, cols, rank)
    torch.testing.assert_close((u * s) @ vh, low.dense())


def test_a_zero_delta_keeps_one_column() -> None:
    small = LowRank(torch.zeros(4, 2), torch.zeros(2, 5)).compact()
    assert small.rank == 1
    assert small.dense().abs().sum() == 0


@pytest.mark.parametrize(("rank", "form"), [(1, LowRank), (4, LowRank), (5, Dense), (9, Dense)])
def test_smaller_stores_fewer_numbers(rank: int, form: type) -> None:
    low = LowRank(random(8, rank, seed=1), random(rank, 8, seed=2))  # 16 r against 64: a tie at 4
    found = smaller(low)
    assert isinstance(found, form)
    assert found.rank == min(rank, 8)
    torch.testing.assert_close(found.dense(), low.dense(), rtol=1e-6, atol=1e-6)


def test_rows_matmul_scale_and_transpose() -> None:
    low = LowRank(random(6, 2, seed=1), random(2, 5, seed=2))
    x = random(5, 3, seed=3)
    for delta in (low, Dense(low.dense())):
        torch.testing.assert_close(delta.rows(2, 4), low.dense()[2:4])
        torch.testing.assert_close(delta.matmul(x).double(), low.dense() @ x.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(delta.scaled(-2).dense(), -2 * low.dense())
        torch.testing.assert_close(delta.transposed().dense(), low.dense().T)
        assert delta.to(dtype=torch.float64).rows(0, 1).dtype == torch.float64


@pytest.mark.parametrize(("left", "right"), [((3, 2), (3, 4)), ((3, 0), (0, 4)), ((3,), (3, 4))])
def test_factors_that_do_not_fit_are_refused(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"product|rank"):
        LowRank(torch.zeros(left), torch.zeros(right))
    with pytest.raises(ValueError, match="two dimensions"):
        Dense(torch.zeros(3))

"""Sums of k k^T: exact against float64, and a monoid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kpatch.stats import moment as module
from kpatch.stats.moment import SecondMoment


def keys(tokens: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def moment_of(*parts: Tensor) -> SecondMoment:
    moment = SecondMoment(parts[0].shape[-1])
    for part in parts:
        moment.add(part)
    return moment


@pytest.mark.parametrize("width", [1, 2, 64, 255, 256, 257, 600])
def test_the_mean_is_the_float64_one(width: int) -> None:
    k = keys(90, width) * torch.logspace(-3, 3, width)
    mean = moment_of(k[:40], k[40:]).mean()
    exact = k.double().T @ k.double() / 90
    scale = exact.diagonal().sqrt()
    # each entry to float32 rounding of its row's and column's size
    assert ((mean - exact).abs() / (scale[:, None] * scale)).max() < 1e-6
    assert torch.equal(mean, mean.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keys_of_any_dtype_and_shape_count(dtype: torch.dtype) -> None:
    k = torch.randint(-8, 9, (2, 5, 7)).to(dtype)
    moment = moment_of(k)
    flat = k.double().reshape(10, 7)
    assert moment.count == 10
    assert torch.equal(moment.mean(), flat.T @ flat / 10)


def test_sums_keep_what_float32_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    large, one = torch.tensor([[4096.0]]), torch.tensor([[1.0]])  # 2^24 + 1 is no float32
    assert float(moment_of(large, one, one, one).total) == 2**24 + 3
    monkeypatch.setattr(module, "_PRODUCT_TOKENS", 1)
    assert float(moment_of(torch.cat([large, one, one, one])).total) == 2**24 + 3


def test_total_is_the_upper_triangle_row_after_row() -> None:
    k = torch.randint(-8, 9, (12, 300)).float()
    full = k.double().T @ k.double()
    rows, columns = torch.triu_indices(300, 300)
    assert torch.equal(moment_of(k).total, full[rows, columns])


def test_a_stored_moment_goes_on_as_if_it_had_not_been_stored() -> None:
    k = keys(50, 300)
    kept = moment_of(k[:30])
    back = SecondMoment.from_tensors(kept.to_tensors("x."), "x.")
    kept.add(k[30:])
    back.add(k[30:])
    assert torch.equal(back.total, kept.total)
    assert back.count == kept.count == 50


INTEGERS = st.lists(st.lists(st.integers(-50, 50), min_size=3, max_size=3), min_size=1, max_size=6).map(
    lambda rows: torch.tensor(rows, dtype=torch.float32)
)


@given(INTEGERS, INTEGERS, INTEGERS)
def test_merging_is_adding_texts(a: Tensor, b: Tensor, c: Tensor) -> None:
    whole = moment_of(torch.cat([a, b, c]))  # integers, so every sum is exact
    left = moment_of(a).merge(moment_of(b)).merge(moment_of(c))
    right = moment_of(c).merge(moment_of(b).merge(moment_of(a)))
    nothing = SecondMoment(3)
    for moment in (left, right, nothing.merge(left), left.merge(nothing)):
        assert moment.count == whole.count
        assert torch.equal(moment.total, whole.total)


def test_merging_leaves_both_as_they_were() -> None:
    a, b = moment_of(keys(4, 3)), moment_of(keys(5, 3, seed=1))
    before = a.total, b.total
    a.merge(b).add(keys(6, 3, seed=2))
    assert torch.equal(a.total, before[0])
    assert torch.equal(b.total, before[1])


def test_what_is_no_moment_is_refused() -> None:
    with pytest.raises(ValueError, match="no packed triangle"):
        SecondMoment.from_total(torch.zeros(5, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="no packed triangle"):
        SecondMoment.from_total(torch.zeros(6, dtype=torch.float64), -1)
    with pytest.raises(ValueError, match="float32"):
        SecondMoment.from_tensors({"total": torch.zeros(6), "count": torch.tensor(1)})
    with pytest.raises(ValueError, match="do not add"):
        SecondMoment(3).merge(SecondMoment(4))
    with pytest.raises(ValueError, match="no keys"):
        SecondMoment(3).mean()

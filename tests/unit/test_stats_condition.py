"""Checks before a second moment is solved with, and the ridge that dependent keys need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.stats.moment import WELL_CONDITIONED, SecondMoment, check, ridge_for, smallest_scaled_eigenvalue


def moment_of(k: Tensor) -> SecondMoment:
    moment = SecondMoment(k.shape[-1])
    moment.add(k)
    return moment


def random_keys(tokens: int, width: int) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))


def scaled_minimum(mean: Tensor, ridge: float = 0.0) -> float:
    lifted = mean + ridge * torch.eye(len(mean), dtype=mean.dtype)
    scale = lifted.diagonal().rsqrt()
    return float(torch.linalg.eigvalsh(lifted * scale[:, None] * scale)[0])


def test_the_smallest_eigenvalue_is_found() -> None:
    for tokens in (70, 100, 1000):
        mean = moment_of(random_keys(tokens, 64)).mean()
        assert smallest_scaled_eigenvalue(mean) == pytest.approx(scaled_minimum(mean), rel=0.05)
    assert smallest_scaled_eigenvalue(torch.eye(5, dtype=torch.float64)) == pytest.approx(1.0)


def test_good_keys_need_no_ridge_whatever_their_units_sizes() -> None:
    k = random_keys(640, 64)
    assert ridge_for(moment_of(k).mean()) == 0.0
    assert ridge_for(moment_of(k * torch.logspace(-6, 6, 64)).mean()) == 0.0


def dead_units(k: Tensor) -> Tensor:
    k = k.clone()
    k[:, [3, 40]] = 0.0
    return k


def copied_unit(k: Tensor) -> Tensor:
    k = k.clone()
    k[:, 5] = k[:, 6]
    return k


@pytest.mark.parametrize("dependent", [dead_units, copied_unit, lambda k: k[:30]])
def test_dependent_keys_get_the_smallest_ridge_that_does(dependent) -> None:  # type: ignore[no-untyped-def]
    mean = moment_of(dependent(random_keys(640, 64))).mean()
    ridge = ridge_for(mean)
    assert 0 < ridge <= 0.1 * float(mean.trace()) / 64
    assert scaled_minimum(mean, ridge) >= WELL_CONDITIONED * 0.95
    torch.linalg.cholesky(mean + ridge * torch.eye(64, dtype=torch.float64))
    if ridge > 1.1e-6 * float(mean.trace()) / 64:
        assert scaled_minimum(mean, ridge / 10) < WELL_CONDITIONED * 1.05


def test_a_ridge_is_not_asked_to_mend_what_is_no_second_moment() -> None:
    with pytest.raises(BadInput, match="not positive definite"):
        ridge_for(torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)))


def test_check_passes_a_moment_with_a_dead_unit() -> None:
    check(moment_of(dead_units(random_keys(640, 64))))


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (torch.zeros(5, 4), "Every key in the text is zero"),
        (torch.tensor([[1.0, float("nan")]]), "not finite"),
        (torch.tensor([[1.0, float("inf")]]), "not finite"),
        (torch.zeros(0, 4), "no tokens"),
    ],
)
def test_check_says_what_is_wrong_and_where(k: Tensor, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        check(moment_of(k), "layer 5 of tiny")
    assert caught.value.where == "layer 5 of tiny"


def test_check_refuses_negative_squares() -> None:
    total = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    with pytest.raises(BadInput, match="no second moment"):
        check(SecondMoment.from_total(total, 3))

"""What MEND's method does with many facts: products in the place of pairs give the same update, in bounded memory."""

from __future__ import annotations

import pytest
import torch

from kpatch.edit.mend import Gathered
from kpatch.mend.aggregate import regression
from kpatch.mend.network import Network, Settings
from kpatch.mend.places import Place

PLACE, TURNED = (Place("w.weight", 0, 12, 7, turned) for turned in (False, True))


class Whole(Gathered):
    """Keeps every pair."""

    def _fold(self) -> None:
        return None


def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(1, count, 12, generator=generator), torch.randn(1, count, 7, generator=generator)


@pytest.mark.parametrize("place", [PLACE, TURNED])
@pytest.mark.parametrize(("aggregated", "covariance"), [(False, 0), (True, 0), (True, 1)])
def test_many_tokens_give_what_few_at_a_time_give(place: Place, aggregated: bool, covariance: int) -> None:
    network = Network([place], Settings(3, covariance=covariance))
    precision = network.precision(0)
    if precision is not None:
        noise = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
        precision.copy_(torch.eye(12) + noise @ noise.T)
    u, delta = tokens(20)
    at_once, in_turn = Gathered(place, aggregated, precision), Gathered(place, aggregated, precision)
    at_once.add(network, 0, u, delta)
    for begin in range(0, 20, 3):
        in_turn.add(network, 0, u[:, begin : begin + 3], delta[:, begin : begin + 3])
    assert sum(len(a) for a, _ in in_turn.pairs) < 7
    whole = Whole(place, aggregated, precision)
    whole.add(network, 0, u, delta)
    found = in_turn.delta(0.5)
    assert found.shape == ((12, 7) if place.transposed else (7, 12))
    if aggregated:  # the other way of writing it, which few tokens take
        own, v = (torch.cat(one) for one in zip(*whole.pairs, strict=True))
        reads, writes = regression(own, v, torch.tensor(0.5, dtype=own.dtype), whole.precision)
        want = reads.T @ writes
        torch.testing.assert_close(found.dense(), want if place.transposed else want.T, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.dense(), at_once.delta(0.5).dense(), rtol=1e-5, atol=1e-8)


def test_few_tokens_are_stored_as_factors() -> None:
    network = Network([PLACE], Settings(3))
    gathered = Gathered(PLACE, False)
    u, delta = tokens(3)
    u[0, 1] = 0  # a token without an input takes no part
    gathered.add(network, 0, u, delta)
    found = gathered.delta(1.0)
    assert found.rank == 2
    want = -1e-4 * (delta[0].T @ u[0]).double()
    torch.testing.assert_close(found.dense(), want, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("count", [5, 30])
def test_regression_does_to_each_input_what_it_should_where_the_ridge_is_small(count: int) -> None:
    """With fewer tokens than inputs exactly; with more as least squares do."""
    generator = torch.Generator().manual_seed(count)
    u = torch.randn(2, count, 12, generator=generator, dtype=torch.float64)
    v = torch.randn(2, count, 7, generator=generator, dtype=torch.float64)
    reads, writes = regression(u, v, torch.tensor(1e-12, dtype=torch.float64))
    done = (u @ reads.mT) @ writes
    if count == 5:
        torch.testing.assert_close(done, v)
    want = torch.linalg.lstsq(u, v).solution
    torch.testing.assert_close(done, u @ want)

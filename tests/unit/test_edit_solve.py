"""The update of one layer against dense algebra and laws, and the way back through a norm against brute force."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kpatch.edit.keys import Block
from kpatch.edit.norms import nearest_on_norm, pull_back
from kpatch.edit.solve import KeyCovariance, update, update_apart
from kpatch.errors import BadInput

seeds = st.integers(0, 2**31)


def problem(seed: int, f: int, n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """K [f, n], R [d, n] and a positive definite second moment [f, f], float64."""
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(f, 2 * f, generator=g, dtype=torch.float64)
    k, r = (torch.randn(rows, n, generator=g, dtype=torch.float64) for rows in (f, d))
    return k, r, root @ root.T / (2 * f) + 0.1 * torch.eye(f, dtype=torch.float64)


def dense(k: Tensor, r: Tensor, c: Tensor) -> Tensor:
    """R K^T (C + K K^T)^{-1} as it is written."""
    inverse: Tensor = torch.linalg.inv(c + k @ k.T)
    return r @ k.T @ inverse


def in_blocks(k: Tensor, shares: Tensor, owner: Tensor, size: int) -> list[Block]:
    """Keys [f, B] with their shares and owners, `size` keys at a time."""
    cuts = (slice(begin, begin + size) for begin in range(0, len(owner), size))
    return [Block(k[:, cut].T, shares[cut], owner[cut]) for cut in cuts]


def solved(k: Tensor, r: Tensor, preserved: KeyCovariance) -> Tensor:
    left, right = update(k, r, preserved)
    assert left.shape == (r.shape[0], min(k.shape))
    assert right.shape == (min(k.shape), k.shape[0])
    return left @ right


@given(seed=seeds, f=st.integers(1, 24), n=st.integers(1, 40), d=st.integers(1, 9), weight=st.floats(1e-3, 1e5))
def test_both_forms_are_the_dense_solution(seed: int, f: int, n: int, d: int, weight: float) -> None:
    k, r, moment = problem(seed, f, n, d)
    want = dense(k, r, weight * moment)
    got = solved(k, r, KeyCovariance.of(moment, weight))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9 * float(want.norm()))


@given(seed=seeds, extra=st.integers(-1, 1))
def test_the_two_forms_meet_where_they_change_over(seed: int, extra: int) -> None:
    k, r, moment = problem(seed, 8, 8 + extra, 3)
    torch.testing.assert_close(solved(k, r, KeyCovariance.of(moment, 2.0)), dense(k, r, 2 * moment))


@given(seed=seeds, f=st.integers(2, 24))
def test_with_nothing_to_preserve_a_single_fact_arrives(seed: int, f: int) -> None:
    k, r, moment = problem(seed, f, 1, 5)
    torch.testing.assert_close(solved(k, r, KeyCovariance.of(moment, 1e-9)) @ k, r, rtol=1e-6, atol=1e-6)
    nothing = solved(k, r, KeyCovariance.of(moment, 1e12))
    assert float((nothing @ k).norm()) < 1e-6 * float(r.norm())


@given(seed=seeds, n=st.sampled_from([3, 7, 12]))
def test_the_order_of_the_facts_does_not_matter(seed: int, n: int) -> None:
    k, r, moment = problem(seed, 8, n, 4)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    preserved = KeyCovariance.of(moment, 3.0)
    torch.testing.assert_close(solved(k[:, order], r[:, order], preserved), solved(k, r, preserved))


@given(seed=seeds, weight=st.floats(1e-3, 1e3))
def test_leverage_is_the_share_of_its_residual_that_a_fact_gets_alone(seed: int, weight: float) -> None:
    k, r, moment = problem(seed, 10, 4, 3)
    preserved = KeyCovariance.of(moment, weight)
    q = preserved.leverage(k)
    torch.testing.assert_close(q, (k * torch.linalg.solve(weight * moment, k)).sum(0))
    for i in range(4):
        one_k, one_r = k[:, i : i + 1], r[:, i : i + 1]
        torch.testing.assert_close(solved(one_k, one_r, preserved) @ one_k, one_r * q[i] / (1 + q[i]))


@given(
    seed=seeds,
    f=st.integers(1, 20),
    n=st.integers(1, 30),
    each=st.integers(1, 5),
    d=st.integers(1, 6),
    size=st.integers(1, 70),
)
def test_keys_apart_are_the_weighted_least_squares_whatever_the_blocks(
    seed: int, f: int, n: int, each: int, d: int, size: int
) -> None:
    k, _, moment = problem(seed, f, n * each, d)
    g = torch.Generator().manual_seed(seed + 1)
    r = torch.randn(d, n, generator=g, dtype=torch.float64)
    shares = torch.rand(n, each, generator=g, dtype=torch.float64)
    shares = shares / shares.sum(1, keepdim=True)
    owner = torch.arange(n).repeat_interleave(each)
    left, right = update_apart(in_blocks(k, shares.flatten(), owner, size), r, KeyCovariance.of(moment, 2.0))
    assert left.shape == (d, min(n, f))
    # The same problem with a fact for every key, which counts as much as the root of its share says
    roots = shares.flatten().sqrt()
    want = dense(k * roots, r[:, owner] * roots, 2 * moment)
    torch.testing.assert_close(left @ right, want, rtol=1e-7, atol=1e-9 * float(want.norm()))


@given(seed=seeds, n=st.integers(1, 12))
def test_one_key_a_fact_is_the_plain_update(seed: int, n: int) -> None:
    k, r, moment = problem(seed, 8, n, 4)
    preserved = KeyCovariance.of(moment, 3.0)
    left, right = update_apart(in_blocks(k, torch.ones(n), torch.arange(n), 5), r, preserved)
    torch.testing.assert_close(left @ right, solved(k, r, preserved))


@pytest.mark.parametrize("n", [6, 100])
def test_the_sums_over_many_keys_hold_no_more_than_f_of_them_and_a_block(n: int) -> None:
    """Counted by what of the blocks is alive when the next one is asked for: they are made one at a time."""
    f, size, alive = 8, 5, list[weakref.ref[Tensor]]()
    largest = 0

    class Count(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.ndim == 2 and len(found) == f:
                largest = max(largest, found.shape[1])
            return found

    def one_at_a_time() -> Iterator[Block]:
        for block in in_blocks(k, torch.full((5 * n,), 0.2), torch.arange(n).repeat_interleave(5), size):
            assert sum(one() is not None for one in alive) <= 1
            rows = block.rows.clone()
            alive.append(weakref.ref(rows))
            yield Block(rows, block.shares, block.owner)
            del rows

    k, r, moment = problem(3, f, 5 * n, 4)
    preserved = KeyCovariance.of(moment, 2.0)
    with Count():
        update_apart(one_at_a_time(), r[:, :n], preserved)
    assert largest <= f + size - 1


def test_float32_keys_are_solved_in_float64() -> None:
    k, r, moment = problem(0, 12, 5, 4)
    left, right = update(k.float(), r.float(), KeyCovariance.of(moment, 1.0))
    assert left.dtype == right.dtype == torch.float64
    torch.testing.assert_close(left @ right, dense(k.float().double(), r.float().double(), moment))


def test_c_holds_the_weight_the_ridge_and_the_keys_of_earlier_patches() -> None:
    k, _, moment = problem(1, 6, 2, 3)
    factor = KeyCovariance.of(moment, 5.0, ridge=0.5, earlier=k.float()).factor
    want = 5 * (moment + 0.5 * torch.eye(6, dtype=torch.float64)) + k.float().double() @ k.float().double().T
    torch.testing.assert_close(factor @ factor.T, want)
    torch.testing.assert_close(KeyCovariance(factor).inverse_times(want @ k), k)


@pytest.mark.parametrize(
    "moment",
    [torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 0.0, 2.0])), -torch.eye(3), torch.full((3, 3), float("nan"))],
)
def test_a_covariance_that_is_not_positive_definite_is_refused(moment: Tensor) -> None:
    with pytest.raises(BadInput, match="not positive definite") as error:
        KeyCovariance.of(moment, 1.0)
    assert "`tokens`" in str(error.value.hint)


# Behind a norm


def descended(target: Tensor, gain: Tensor) -> float:
    """The least distance from `target` to γ ⊙ u, ‖u‖² = d, by projected gradient steps from 100 starts."""
    d = len(target)
    u = torch.randn(100, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u[0] = gain * target
    for _ in range(2000):
        u = u * (d**0.5 / u.norm(dim=1, keepdim=True))
        u = u - 0.5 / gain.square().max() * gain * (gain * u - target)
    u = u * (d**0.5 / u.norm(dim=1, keepdim=True))
    return float((gain * u - target).norm(dim=1).min())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("d", [2, 7])
def test_the_nearest_point_is_what_a_search_finds(d: int, size: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    gain = 1 + 0.4 * torch.randn(d, generator=g, dtype=torch.float64)
    target = size * torch.randn(d, generator=g, dtype=torch.float64)
    u = nearest_on_norm(target, gain)
    assert float(u.square().sum()) == pytest.approx(d, rel=1e-9)
    assert float((gain * u - target).norm()) <= descended(target, gain) + 1e-9


@given(seed=seeds, d=st.integers(1, 40))
def test_a_point_on_the_image_is_its_own_nearest(seed: int, d: int) -> None:
    g = torch.Generator().manual_seed(seed)
    gain = 0.3 + torch.rand(d, generator=g, dtype=torch.float64)
    u = torch.randn(3, d, generator=g, dtype=torch.float64)
    u = u * (d**0.5 / u.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(nearest_on_norm(gain * u, gain), u, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tiny", [0.0, 1e-9, 1e-5, 1e-2])
def test_a_gain_near_zero_does_not_cost_the_others_their_precision(tiny: float) -> None:
    """Where the target lies inside the image, μ stands so near its pole that their difference is what counts."""
    gain = torch.tensor([tiny, 1.0, 1.5, 2.0], dtype=torch.float64)
    for scale in (1e-3, 0.3, 1.0, 10.0):
        target = scale * torch.tensor([0.5, -0.4, 0.3, 0.2], dtype=torch.float64)
        u = nearest_on_norm(target, gain)
        assert torch.isfinite(u).all()
        assert float(u.square().sum()) == pytest.approx(4, rel=1e-9)
        distance = float((gain * u - target).norm())
        # The tiny entry takes up what length the others leave and costs nothing to speak of
        free = target[1:] / gain[1:]
        if float(free.square().sum()) <= 4:
            assert distance <= abs(float(target[0])) + 2 * tiny + 1e-12
            torch.testing.assert_close(u[1:], free, rtol=0.02 if tiny == 1e-2 else 1e-3, atol=1e-9)
        else:
            assert distance <= descended(target, gain) + 1e-9


@pytest.mark.parametrize("small", [0.0, 1e-20, 1e-10])
def test_a_target_without_the_entry_of_the_least_gain(small: float) -> None:
    """γ = (1, 2, 3), t = (small, 0.3, 0.6): μ → −1, so u = (·, 2·0.3/3, 3·0.6/8) and u_1 has what 3 lacks."""
    u = nearest_on_norm(torch.tensor([small, 0.3, 0.6]), torch.tensor([1.0, 2.0, 3.0]))
    rest = torch.tensor([0.2, 0.225], dtype=torch.float64)
    torch.testing.assert_close(u[1:], rest, rtol=1e-6, atol=0)
    assert float(u[0]) == pytest.approx(float((3 - rest.square().sum()).sqrt()), rel=1e-6)


def test_rows_are_answered_one_by_one() -> None:
    g = torch.Generator().manual_seed(3)
    gain, targets = torch.randn(9, generator=g), torch.randn(5, 9, generator=g) * torch.logspace(-2, 2, 5)[:, None]
    together = nearest_on_norm(targets, gain)
    torch.testing.assert_close(together, torch.stack([nearest_on_norm(target, gain) for target in targets]))


@given(seed=seeds)
def test_a_reachable_residual_is_pulled_back_exactly_and_keeps_the_scale(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    d, eps = 12, 1e-6
    gain = 0.3 + torch.rand(d, generator=g, dtype=torch.float64)
    y, other = torch.randn(2, 4, d, generator=g, dtype=torch.float64) * 5

    def norm(x: Tensor) -> Tensor:
        return gain * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    moved = pull_back(y, norm(other) - norm(y), gain, eps)
    torch.testing.assert_close(norm(y + moved), norm(other), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((y + moved).norm(dim=-1), y.norm(dim=-1), rtol=1e-5, atol=0)
    assert float(pull_back(y, torch.zeros_like(y), gain, eps).norm()) < 1e-5 * float(y.norm())

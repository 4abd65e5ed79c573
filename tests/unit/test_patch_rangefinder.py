"""The randomized SVD: the fewest columns within the error asked for, and no search where none can do."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kpatch.patch.randomized_svd import low_rank
from tests.support.checkpoints import random


@dataclass
class Whole:
    """A matrix in memory that counts how often it is multiplied with."""

    matrix: Tensor
    columns: int = field(default=0)

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def times(self, x: Tensor) -> Tensor:
        self.columns += x.shape[1]
        return self.matrix @ x

    def transposed_times(self, y: Tensor) -> Tensor:
        self.columns += y.shape[1]
        return self.matrix.T @ y


def spectrum(values: Tensor, rows: int = 60, cols: int = 90, seed: int = 1) -> Tensor:
    u, v = (torch.linalg.qr(random(size, len(values), seed=seed + size).double()).Q for size in (rows, cols))
    return (u * values) @ v.T


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_a_matrix_of_low_rank_comes_back_with_its_rank(rows: int, cols: int, rank: int, seed: int) -> None:
    matrix = random(rows, rank, seed=seed).double() @ random(rank, cols, seed=seed + 1).double()
    norm = float(matrix.norm())
    found = low_rank(Whole(matrix), norm, 0.0, limit=20, seed=seed)
    assert found is not None
    assert found.rank <= min(rows, cols, rank)
    assert float((found.dense() - matrix).norm()) <= 1e-7 * norm


@pytest.mark.parametrize("tolerance", [0.5, 1e-2, 1e-5])
def test_the_rank_is_the_least_for_the_error_asked_for(tolerance: float) -> None:
    values = torch.logspace(0, -8, 50, dtype=torch.float64)
    matrix = spectrum(values)
    found = low_rank(Whole(matrix), float(matrix.norm()), tolerance, limit=50)
    assert found is not None
    assert float((found.dense() - matrix).norm()) <= tolerance * float(matrix.norm())
    best = int((values.square().flip(0).cumsum(0).flip(0).sqrt() > tolerance * matrix.norm()).sum())  # Eckart-Young
    assert best <= found.rank <= best + 1


def test_a_rank_above_the_limit_is_not_found() -> None:
    matrix = spectrum(torch.ones(30, dtype=torch.float64))
    norm = float(matrix.norm())
    assert low_rank(Whole(matrix), norm, 1e-6, limit=29) is None
    found = low_rank(Whole(matrix), norm, 1e-6, limit=30)
    assert found is not None
    assert found.rank == 30


def test_noise_is_given_up_after_the_first_columns() -> None:
    noise = Whole(random(400, 400, seed=1).double())
    assert low_rank(noise, float(noise.matrix.norm()), 1e-6, limit=100) is None
    assert noise.columns <= 4 * 16
    edited = Whole(1e-3 * noise.matrix + 100 * spectrum(torch.ones(20, dtype=torch.float64), 400, 400))
    assert low_rank(edited, float(edited.matrix.norm()), 1e-6, limit=100) is None
    found = low_rank(edited, float(edited.matrix.norm()), 1e-2, limit=100)
    assert found is not None
    assert found.rank == 20


def test_the_seed_decides_all() -> None:
    matrix = Whole(spectrum(torch.logspace(0, -3, 20, dtype=torch.float64)))
    norm = float(matrix.matrix.norm())
    one, same, other = (low_rank(matrix, norm, 1e-2, 30, seed) for seed in (1, 1, 2))
    assert one is not None
    assert same is not None
    assert other is not None
    assert torch.equal(one.left, same.left)
    assert not torch.equal(one.left, other.left)

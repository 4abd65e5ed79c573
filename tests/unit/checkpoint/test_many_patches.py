"""Many patches at once: work that is the same for all of them is done once."""

from __future__ import annotations

import torch

from kpatch.checkpoint.base_weights import HashedOnce
from kpatch.patch.delta import Delta, Dense, LowRank, sum_rows


class Counted:
    """Weights that count how often each is hashed."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    class checkpoint:
        tensors: dict[str, object] = {}  # noqa: RUF012

    def hash(self, name: str, advance: object = None) -> str:
        self.asked.append(name)
        return f"hash of {name}"


def test_a_weight_is_hashed_once() -> None:
    counted = Counted()
    once = HashedOnce(counted)  # type: ignore[arg-type]
    assert [once.hash(name) for name in ("a", "b", "a", "a")] == [f"hash of {name}" for name in "abaa"]
    assert counted.asked == ["a", "b"]


def test_a_sum_is_that_of_the_deltas_and_leaves_them_alone() -> None:
    dice = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    dense = Dense(numbers(6, 5))
    deltas: list[Delta] = [dense, LowRank(numbers(6, 2), numbers(2, 5)), Dense(numbers(6, 5).float())]
    before = dense.delta.clone()
    torch.testing.assert_close(sum_rows(deltas, 1, 4), sum(delta.dense() for delta in deltas)[1:4])  # type: ignore[index]
    assert torch.equal(dense.delta, before)
    torch.testing.assert_close(sum_rows(deltas[:0:-1], 0, 6), deltas[1].dense() + deltas[2].dense())

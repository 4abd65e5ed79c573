"""Whether numbers are finite, from their bytes alone: as torch says, for every dtype of a patch."""

from __future__ import annotations

import math
import random

import pytest
import torch

from kpatch.patch.check import is_finite
from kpatch.patch.fingerprint import DTYPES, tensor_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_entry_among_many_shows_wherever_it_is(dtype: str) -> None:
    largest = torch.finfo(DTYPES[dtype]).max
    for place in (0, 1, 500, 998, 999):
        for value in (largest, -largest, 0.0, 1e-30, math.inf, -math.inf, math.nan, -math.nan):
            values = torch.linspace(-3, 3, 1000).to(DTYPES[dtype])
            values[place] = value
            assert is_finite(bytes(tensor_bytes(values)), dtype) == math.isfinite(value), (place, value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_of_the_highest_bits_is_told_as_torch_tells_it(dtype: str) -> None:
    size, dice = DTYPES[dtype].itemsize, random.Random(0)
    for upper in range(0, 1 << 16, 3):
        data = bytearray(dice.randbytes(size - 2) + upper.to_bytes(2, "little"))
        value = torch.frombuffer(data, dtype=DTYPES[dtype])
        assert is_finite(data, dtype) == bool(torch.isfinite(value)), data.hex()


def test_large_and_infinite_bytes_in_different_entries_are_no_infinity() -> None:
    """The highest byte of one entry and the next one of another must not be taken together."""
    values = torch.tensor([2.0**127, 1.5, -(2.0**127), 3.0e38, 0.25])
    assert is_finite(bytes(tensor_bytes(values)), "F32")
    assert not is_finite(bytes(tensor_bytes(values * 4)), "F32")


def test_nothing_is_finite() -> None:
    assert is_finite(b"", "F32")

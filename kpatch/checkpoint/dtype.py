"""Stored bytes to float64 and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kpatch.patch.fingerprint import DTYPES, tensor_bytes, tensor_from


def to_float64(data: bytearray, dtype: str, shape: Sequence[int]) -> Tensor:
    """Stored bytes as float64 values, exactly."""
    return tensor_from(data, dtype, shape).double()


def to_stored(values: Tensor, dtype: str) -> Tensor:
    """float64 values rounded to a stored dtype: `values.to(dtype)` of torch.

    Round to nearest, ties to even. torch goes from float64 to the 16-bit dtypes by way of float32, so a value within
    2^-25 of a tie may land on its other side; kpatch keeps to that, so that anyone can repeat it with one call.
    Values beyond the dtype's range become Inf; callers refuse them.
    """
    return values.to(DTYPES[dtype])


def stored_bytes(values: Tensor) -> memoryview:
    """The bytes of values as a checkpoint stores them."""
    return tensor_bytes(values)

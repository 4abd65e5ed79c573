"""float64 values to stored bytes."""

from __future__ import annotations

from torch import Tensor

from kpatch.patch.fingerprint import DTYPES, tensor_bytes


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

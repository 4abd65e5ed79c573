"""Fingerprints of weights: SHA-256 of the stored bytes, and a sketch that survives a change of dtype."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

SAMPLES = 64
_CHUNK = 1 << 22


def sha256_of(data: bytes | bytearray | memoryview | Tensor) -> str:
    """SHA-256 of bytes, or of a tensor's bytes as safetensors stores them, as 64 hex digits."""
    return hashlib.sha256(tensor_bytes(data) if isinstance(data, Tensor) else data).hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, without a copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # numpy shares the tensor's memory, and knows bytes where it does not know bfloat16.
    return memoryview(flat.view(torch.uint8).numpy().data)


def tensor_from(data: bytearray, dtype: str, shape: Sequence[int]) -> Tensor:
    """The tensor over `data` (not copied), `dtype` as safetensors names it."""
    return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(tuple(shape))


@lru_cache(maxsize=16)
def positions(numel: int) -> tuple[int, ...]:
    """The 64 places of a flat tensor that a sketch samples: SHA-256 of a counter, so the same in every version."""
    seeds = (hashlib.sha256(f"kpatch sketch {numel} {index}".encode()).digest() for index in range(SAMPLES))
    return tuple(int.from_bytes(seed[:8], "big") % numel for seed in seeds)


def sketch(tensor: Tensor) -> list[float]:
    """Frobenius norm and 64 sampled values of a weight, in float64; 65 numbers.

    Raises ValueError for an empty tensor.
    """
    if tensor.numel() == 0:
        raise ValueError("An empty tensor has no sketch")
    flat = tensor.detach().reshape(-1)
    square = 0.0
    for begin in range(0, flat.numel(), _CHUNK):
        square += float(flat[begin : begin + _CHUNK].double().square().sum())
    values: list[float] = flat[torch.tensor(positions(flat.numel()))].double().tolist()
    return [math.sqrt(square), *values]


def same_weights(expected: Sequence[float], tensor: Tensor, dtype: str = "F32") -> bool:
    """Whether `tensor` holds the weights that `expected` is the sketch of, stored in another dtype.

    `dtype` is the dtype the sketch was made in. The finer side is rounded to the coarser: all 64 samples must then be
    equal, so a weight that was edited, however little, does not pass. Between float16 and bfloat16, of which neither
    holds the other's values, one rounding step is allowed.
    """
    if tensor.dtype not in NAMES:
        return False
    return same_sketch(expected, dtype, sketch(tensor), NAMES[tensor.dtype])


def same_sketch(expected: Sequence[float], expected_dtype: str, found: Sequence[float], found_dtype: str) -> bool:
    """Whether two sketches are of the same weights, each stored in its dtype; as `same_weights` does."""
    dtypes = {expected_dtype, found_dtype}
    if {len(expected), len(found)} != {SAMPLES + 1} or not dtypes <= DTYPES.keys():
        return False
    if not abs(found[0] - expected[0]) <= 2**-8 * expected[0]:
        return False
    a, b = (torch.tensor(values[1:], dtype=torch.float64) for values in (expected, found))
    if dtypes == {"F16", "BF16"}:
        return bool(((a - b).abs() <= 2**-8 * a.abs() + 2**-24).all())
    least = DTYPES[coarser(expected_dtype, found_dtype)]
    return torch.equal(a.to(least), b.to(least))


def coarser(one: str, other: str) -> str:
    """The dtype of the two with fewer significant bits."""
    return min(one, other, key=lambda name: {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}[name])

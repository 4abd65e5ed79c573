"""The arithmetic of a patched weight: round(base + Σ Δ_i), a block of rows at a time, and what rounding did to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kpatch.checkpoint.dtype import stored_bytes, to_stored
from kpatch.checkpoint.keys import KeyShift
from kpatch.patch.fingerprint import NAMES, tensor_from
from kpatch.patch.lowrank import Delta, LowRank

# Entries per block of rows: what is in memory at a time, whatever the weight's size, and enough for a fast product.
BLOCK = 1 << 19
# Entries of a block that are gone over at a time: few enough to stay in a processor's cache for all the passes, and no
# more than what torch does on one thread. With several, each of many short passes waits for the slowest of them, which
# on a busy machine took fifty times as long.
_STRIP = 1 << 15


class Overflow(ValueError):
    """The patched weight does not fit its dtype, or the base already held NaN or Inf."""


@dataclass
class Landing:
    """Sums over a weight's entries from which the rounding report is made."""

    nonzero: int = 0
    same: int = 0
    delta_square: float = 0.0
    error_square: float = 0.0
    keys: KeyShift | None = None

    @property
    def unchanged(self) -> float:
        """Share of the entries with a nonzero delta that rounding left as they were, 0 to 1."""
        return self.same / self.nonzero if self.nonzero else 0.0

    @property
    def delta_error(self) -> float:
        """‖landed delta − intended delta‖ / ‖intended delta‖ (Frobenius)."""
        return (self.error_square / self.delta_square) ** 0.5 if self.delta_square else 0.0

    @property
    def key_error(self) -> float | None:
        """The same for what the delta does to the patches' own keys; None when they carry none for this weight."""
        return None if self.keys is None else self.keys.relative


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch use one thread in each of ours: several weights are computed at a time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rows [begin, end) of each block of a [rows, cols] weight."""
    step = max(1, BLOCK // shape[1])
    for begin in range(0, shape[0], step):
        yield begin, min(shape[0], begin + step)


def widen(delta: Delta) -> Delta:
    """The delta with float64 factors, so that they are not converted again for every block."""
    return LowRank(delta.left.double(), delta.right.double()) if isinstance(delta, LowRank) else delta


def patch_rows(
    base: bytearray, dtype: str, cols: int, rows: tuple[int, int], deltas: Sequence[Delta], landing: Landing
) -> memoryview:
    """Bytes of rows [begin, end) of the patched weight from the same rows of the base.

    `deltas` come in the order of their patches' ids; the sum is in float64 and starts from the first. Adds to
    `landing`. Raises Overflow.
    """
    old = tensor_from(base, dtype, (-1,))
    change = deltas[0].rows(*rows)  # [rows, cols]
    for delta in deltas[1:]:
        change = change + delta.rows(*rows)
    new, error = torch.empty_like(old), torch.empty(change.shape if landing.keys else (0, 0))
    flat, wrong = change.reshape(-1), error.view(-1)
    for begin in range(0, len(old), _STRIP):
        strip = slice(begin, begin + _STRIP)
        rest = _round(old[strip], flat[strip], new[strip], landing)
        if landing.keys is not None:
            wrong[strip] = rest
    if landing.keys is not None:
        landing.keys.add(rows, error)
    return stored_bytes(new)


def _round(stored: Tensor, change: Tensor, new: Tensor, landing: Landing) -> Tensor:
    """Fill `new` with round(stored + change); what was landed minus what was meant, in float64. Adds to `landing`."""
    old = stored.double()
    new.copy_(to_stored(old + change, NAMES[new.dtype]))
    landed = new.double().sub_(old)
    # An old value is one the dtype holds, so no change leaves it as it is: what landed was meant.
    meant = _nonzero(change)
    landing.nonzero += meant
    landing.same += meant - _nonzero(landed)
    landing.delta_square += _square(change)
    error = landed.sub_(change)
    square = _square(error)
    if not math.isfinite(square):
        _require_finite(old, new)
    landing.error_square += square
    return error


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2  # a dot product would wake all threads each time


def _nonzero(values: Tensor) -> int:
    return int(np.count_nonzero(values.numpy() != 0))  # three times as fast as torch's own


def _require_finite(old: Tensor, new: Tensor) -> None:
    if bool(torch.isfinite(new).all()):
        return
    if not bool(torch.isfinite(old).all()):
        raise Overflow("NaN or Inf in the base")
    largest = torch.finfo(new.dtype).max
    raise Overflow(f"a value beyond ±{largest:g}, the largest {NAMES[new.dtype]} can hold")

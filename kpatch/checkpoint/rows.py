"""The arithmetic of a patched weight: round(base + Σ Δ_i), a block of rows at a time, and what rounding did to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kpatch.checkpoint.dtype import stored_bytes, to_float64, to_stored
from kpatch.checkpoint.keys import KeyShift
from kpatch.patch.fingerprint import DTYPES
from kpatch.patch.lowrank import Delta, LowRank

# Entries per block: 8 MB of float64, so a handful of such blocks bounds the memory whatever the weight's size.
BLOCK = 1 << 20


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
    old = to_float64(base, dtype, (-1, cols))  # [rows, cols]
    change = deltas[0].rows(*rows)
    for delta in deltas[1:]:
        change = change + delta.rows(*rows)
    new = to_stored(old + change, dtype)
    if not bool(torch.isfinite(new).all()):
        finite = bool(torch.isfinite(old).all())
        largest = torch.finfo(DTYPES[dtype]).max
        raise Overflow(
            f"a value beyond ±{largest:g}, the largest {dtype} can hold" if finite else "NaN or Inf in the base"
        )
    landed = new.double() - old
    moved = change != 0
    landing.nonzero += int(moved.sum())
    landing.same += int((moved & (landed == 0)).sum())
    landing.delta_square += float(change.square().sum())
    error = landed - change
    landing.error_square += float(error.square().sum())
    if landing.keys is not None:
        landing.keys.add(rows, change, error)
    return stored_bytes(new)

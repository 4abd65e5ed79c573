"""float64 values to stored bytes.

What rounding did to an edit where it matters: at the keys the patch was made for.

A key k of a fact is the input that W gets there; the edit is what W adds for it, Δk. Rounding changes W by a further
E, so the edit that landed is (Δ + E) k. The keys stand in the patch (`facts.keys.<layer>`); a sample of them will do.

The arithmetic of a patched weight: round(base + Σ Δ_i), a block of rows at a time, and what rounding did to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kpatch.checkpoint import files
from kpatch.patch.container import ITEM_SIZE
from kpatch.patch.delta import Delta, Dense, LowRank
from kpatch.patch.fingerprint import DTYPES, NAMES, tensor_bytes, tensor_from
from kpatch.patch.header import PatchInfo
from kpatch.patch.interference import keys_name


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


# Keys looked at per weight, evenly spread: enough for a rate, and cheap beside Δ itself.
SAMPLE = 32
# Of a weight's outputs, those looked at: this many or up to twice as many.
OUTPUTS = 512


class KeyShift:
    """Sums over the keys of one weight: the intended ΣΔ k at once, and E k a block of rows at a time, in float32.

    Of a large weight every so many-th output is looked at.
    """

    def __init__(self, keys: Tensor, deltas: Sequence[Delta], transposed: bool) -> None:
        self.keys = keys.float()  # [n, f]
        self.transposed = transposed
        outputs = deltas[0].shape[1 if transposed else 0]
        self.step = max(1, outputs // OUTPUTS)
        columns = self.keys.T.double()  # [f, n]
        turned = [_turned(delta) if transposed else delta for delta in deltas]
        intended = torch.stack([delta.matmul(columns) for delta in turned]).sum(0)  # [outputs, n]
        self.intended = float(intended[:: self.step].norm())
        if transposed:  # W is [f, outputs]: E k sums over its rows
            self.error = torch.zeros(keys.shape[0], -(-outputs // self.step), dtype=torch.float64)
        self.error_square = 0.0

    def add(self, rows: tuple[int, int], error: Tensor) -> None:
        """Rows [begin, end) of E."""
        if self.transposed:
            self.error += self.keys[:, rows[0] : rows[1]] @ error[:, :: self.step].float()
        else:
            chosen = error[-rows[0] % self.step :: self.step].float()  # every step-th row of the whole weight
            self.error_square += float((chosen @ self.keys.T).norm()) ** 2

    @property
    def relative(self) -> float:
        """‖E K‖ / ‖ΣΔ K‖ over all keys (Frobenius); 0 where the edit does nothing for them."""
        error = float(self.error.norm()) if self.transposed else self.error_square**0.5
        return error / self.intended if self.intended else 0.0


def _turned(delta: Delta) -> Delta:
    return delta.transposed() if isinstance(delta, LowRank) else Dense(delta.delta.T)


def key_shift(patches: Sequence[tuple[PatchInfo, str]], deltas: Sequence[Delta]) -> KeyShift | None:
    """The sums for one weight, from the keys of the patches (with the weight's name in each) that change it.

    `deltas` are theirs, in the same order. None when no patch has keys for it.
    """
    named = [(info, weight, keys_name(info, weight)) for info, weight in patches]
    found = [(info, weight, name) for info, weight, name in named if name is not None and info.entries[name].shape[0]]
    if not found:
        return None
    keys = torch.cat([_sample(info, name, max(1, SAMPLE // len(patches))) for info, _, name in found])
    info, weight, _ = found[0]
    return KeyShift(keys, deltas, info.manifest.transposed(weight))


def _sample(info: PatchInfo, name: str, most: int) -> Tensor:
    """At most so many rows of a patch's tensor, evenly spread. The file was verified as a whole before."""
    entry = info.entries[name]
    count, width = entry.shape
    row = width * ITEM_SIZE[entry.dtype]
    chosen = sorted({index * count // min(most, count) for index in range(min(most, count))})
    with files.open_read(info.path) as handle:
        rows = [files.read_at(handle, entry.begin + index * row, row) for index in chosen]
    return torch.stack([tensor_from(data, entry.dtype, (width,)).float() for data in rows])


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

"""A patched weight: its bytes, a block of rows at a time, and what rounding did to the edit and to the facts' keys.

A key k of a fact is the input that W gets there; the edit is what W adds for it, Δk. Rounding changes W by a further
E, so the edit that landed is (Δ + E) k. The patch holds the keys (`facts.keys.<layer>`); a sample of them is enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kpatch.checkpoint.shards import TensorRef
from kpatch.patch.delta import Delta, round_sum, row_blocks, sum_rows, widened
from kpatch.patch.fingerprint import NAMES, tensor_bytes, tensor_from
from kpatch.patch.header import PatchInfo
from kpatch.patch.interference import sampled_keys
from kpatch.patch.manifest import matrix_shape
from kpatch.patch.summands import Part, ReplacedFacts, Summands, summands

# Keys sampled per weight, evenly spread: enough for a rate, and cheap beside Δ itself.
SAMPLE = 32
# Outputs of a weight that are sampled: this many, or up to twice as many.
OUTPUTS = 512


class KeyShift:
    """Sums over the keys of one weight: the intended ΣΔ k at once, and E k a block of rows at a time, in float32.

    Of a large weight only every `step`-th output is sampled.
    """

    def __init__(self, keys: Tensor, deltas: Sequence[Delta], transposed: bool) -> None:
        self.keys = keys.float()  # [n, f]
        self.transposed = transposed
        outputs = deltas[0].shape[1 if transposed else 0]
        self.step = max(1, outputs // OUTPUTS)
        columns = self.keys.T.double()  # [f, n]
        turned = [delta.transposed() if transposed else delta for delta in deltas]
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


def key_shift(patches: Sequence[tuple[PatchInfo, str]], deltas: Sequence[Delta]) -> KeyShift | None:
    """The sums for one weight, from the keys of the patches (with the weight's name in each) that change it.

    `deltas` are theirs, in the same order. None when no patch has keys for it.
    """
    most = max(1, SAMPLE // len(patches))
    sampled = [(info, name, sampled_keys(info, name, most)) for info, name in patches]
    found = [(info, name, keys) for info, name, keys in sampled if keys is not None]
    if not found:
        return None
    info, name, _ = found[0]
    return KeyShift(torch.cat([keys.T for _, _, keys in found]), deltas, info.manifest.transposed(name))


# Entries of a block of rows that are handled at a time: few enough to stay in a processor's cache for all the passes,
# and no more than what torch does on one thread. With several, each of many short passes waits for the slowest of
# them, which on a busy machine took fifty times as long.
_STRIP = 1 << 15


class Overflow(ValueError):
    """The patched weight does not fit its dtype, or the base already held NaN or Inf."""


@dataclass
class RoundingStats:
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


class Patched:
    """One weight with its patches on it: blocks of its unpatched bytes in, the same bytes of the patched weight out.

    `patches` are the patches that change it, each with the weight's name in it, in the order of their ids. Raises
    Damaged for a patch that is not sound. `added` is what they add, where it is known already.
    """

    def __init__(
        self,
        patches: Sequence[tuple[PatchInfo, str]],
        ref: TensorRef,
        replaced: ReplacedFacts,
        added: Summands | None = None,
    ) -> None:
        self.dtype, self.shape = ref.dtype, matrix_shape(ref.shape)
        self.row_bytes = (ref.end - ref.begin) // self.shape[0]
        added = added or summands([Part(info, name) for info, name in patches], replaced)
        self.joint = added.joint
        self.deltas = [widened(delta) for delta in added]
        self.stats = RoundingStats(keys=key_shift(patches, self.deltas))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Bytes [begin, end) of the weight that `patch` takes at a time, in this order."""
        for begin, end in row_blocks(self.shape):
            yield begin * self.row_bytes, end * self.row_bytes

    def patch(self, base: bytearray, begin: int) -> memoryview:
        """The patched bytes of a block that begins at byte `begin`. Raises Overflow."""
        first, count = begin // self.row_bytes, len(base) // self.row_bytes
        return patch_rows(base, self.dtype, self.shape[1], (first, first + count), self.deltas, self.stats)


def patch_rows(
    base: bytearray, dtype: str, cols: int, rows: tuple[int, int], deltas: Sequence[Delta], stats: RoundingStats
) -> memoryview:
    """Bytes of rows [begin, end) of the patched weight from the same rows of the base.

    `deltas` come in the order of their patches' ids; the sum is in float64 and starts from the first. Adds to
    `stats`. Raises Overflow.
    """
    old = tensor_from(base, dtype, (-1,))
    change = sum_rows(deltas, *rows)  # [rows, cols]
    new, error = torch.empty_like(old), torch.empty(change.shape if stats.keys else (0, 0))
    flat, wrong = change.reshape(-1), error.view(-1)
    for begin in range(0, len(old), _STRIP):
        strip = slice(begin, begin + _STRIP)
        rest = _round(old[strip], flat[strip], new[strip], stats)
        if stats.keys is not None:
            wrong[strip] = rest
    if stats.keys is not None:
        stats.keys.add(rows, error)
    return tensor_bytes(new)


def _round(stored: Tensor, change: Tensor, new: Tensor, stats: RoundingStats) -> Tensor:
    """Fill `new` with round(stored + change); what was landed minus what was meant, in float64. Adds to `stats`."""
    old = stored.double()
    new.copy_(round_sum(old, change, new.dtype))
    landed = new.double().sub_(old)
    # An old value is one the dtype holds, so no change leaves it as it is: what landed was meant.
    meant = _nonzero(change)
    stats.nonzero += meant
    stats.same += meant - _nonzero(landed)
    stats.delta_square += _square(change)
    error = landed.sub_(change)
    square = _square(error)
    if not math.isfinite(square):
        _require_finite(old, new)
    stats.error_square += square
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

"""B − A of one tensor that two checkpoints store, read a block of rows at a time and never held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from kpatch.checkpoint import files
from kpatch.checkpoint.shards import TensorRef
from kpatch.errors import BadInput
from kpatch.patch.delta import round_sum, rounded, row_blocks
from kpatch.patch.fingerprint import DTYPES, coarser, tensor_from
from kpatch.patch.manifest import matrix_shape
from kpatch.text import printable

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Rows [begin, end) of a delta in float64, from those rows of A and of B.
Rows = Callable[[int, int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Frobenius norms of B − A and of A, and the rows of B − A that are not zero."""

    norm: float
    base_norm: float
    nonzero_rows: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """What a delta is worth: entries of round(A + Δ) whose bits are not B's, and ‖Δ − (B − A)‖ / ‖B − A‖."""

    differs: int
    error: float


@dataclass(frozen=True)
class Difference:
    """One tensor of two checkpoints, as a matrix [rows, cols] (see `matrix_shape`)."""

    name: str
    path_a: Path
    a: TensorRef
    path_b: Path
    b: TensorRef

    @property
    def shape(self) -> tuple[int, int]:
        return matrix_shape(self.a.shape)

    @property
    def entries(self) -> int:
        return self.shape[0] * self.shape[1]

    def blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(begin, end, rows of A, rows of B), in float64."""
        rows, cols = self.shape
        if not rows * cols:
            return
        with files.open_read(self.path_a) as left, files.open_read(self.path_b) as right:
            for begin, end in row_blocks((rows, cols)):
                old = tensor_from(_read(left, self.a, begin, end, rows), self.a.dtype, (end - begin, cols)).double()
                new = tensor_from(_read(right, self.b, begin, end, rows), self.b.dtype, (end - begin, cols)).double()
                yield begin, end, old, new

    def times(self, x: Tensor) -> Tensor:
        """(B − A) x, [rows, n] in float64."""
        return torch.cat([(new - old) @ x for _, _, old, new in self.blocks()])

    def transposed_times(self, y: Tensor) -> Tensor:
        """(B − A)ᵀ y, [cols, n] in float64."""
        result = torch.zeros(self.shape[1], y.shape[1], dtype=torch.float64)
        for begin, end, old, new in self.blocks():
            result += (new - old).T @ y[begin:end]
        return result

    def equal(self) -> bool:
        """Whether B's values are A's but for rounding to the coarser of the two dtypes."""
        least = DTYPES[coarser(self.a.dtype, self.b.dtype)]
        return all(torch.equal(rounded(old, least), rounded(new, least)) for _, _, old, new in self.blocks())

    def measure(self) -> Size:
        """The size of the change. Raises BadInput for NaN or Inf on either side."""
        change = base = 0.0
        nonzero: list[int] = []
        for begin, _, old, new in self.blocks():
            if not bool(torch.isfinite(old).all() and torch.isfinite(new).all()):
                raise BadInput(f"{printable(self.name, 120)} holds NaN or Inf, which a patch cannot carry")
            if not bool(torch.isfinite(rounded(new, DTYPES[self.a.dtype])).all()):
                raise BadInput(
                    f"{printable(self.name, 120)} cannot hold as {self.a.dtype} what it is as {self.b.dtype}",
                    hint="give the older checkpoint in the newer one's dtype",
                )
            change += float((new - old).square().sum())
            base += float(old.square().sum())
            nonzero += [begin + row for row in (new != old).any(dim=1).nonzero()[:, 0].tolist()]
        return Size(change**0.5, base**0.5, tuple(nonzero))

    def judge(self, rows: Rows, norm: float) -> Verdict:
        """How exactly a delta, given by its rows, turns A into B as `apply` does; `norm` is ‖B − A‖."""
        differs, square, dtype = 0, 0.0, DTYPES[self.a.dtype]
        for begin, end, old, new in self.blocks():
            delta = rows(begin, end, old, new)
            landed, wanted = round_sum(old, delta, dtype), rounded(new, dtype)
            differs += int((_bits(landed) != _bits(wanted)).sum())
            square += float((delta - (new - old)).square().sum())
        return Verdict(differs, square**0.5 / norm)


def _read(handle: FileIO, ref: TensorRef, begin: int, end: int, rows: int) -> bytearray:
    row = (ref.end - ref.begin) // rows
    return files.read_at(handle, ref.begin + begin * row, (end - begin) * row)


def _bits(values: Tensor) -> Tensor:
    return values.view(_BITS[values.dtype.itemsize])

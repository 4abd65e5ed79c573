"""What rounding did to an edit where it matters: at the keys the patch was made for.

A key k of a fact is the input that W gets there; the edit is what W adds for it, Δk. Rounding changes W by a further
E, so the edit that landed is (Δ + E) k. The keys stand in the patch (`facts.keys.<layer>`); a sample of them will do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kpatch.checkpoint import files
from kpatch.patch.container import ITEM_SIZE
from kpatch.patch.fingerprint import tensor_from
from kpatch.patch.header import KEYS, PatchInfo
from kpatch.patch.lowrank import Delta, Dense, LowRank

# Keys looked at per weight, evenly spread: enough for a rate, and cheap beside Δ itself.
SAMPLE = 32
# Of a weight's outputs, those looked at: this many or up to twice as many.
OUTPUTS = 512
# Families whose MLP output is a Conv1D, stored [in, out]; needed only where W is square.
_TRANSPOSED = ("gpt2",)


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
    found, transposed = [], False
    for (info, weight), delta in zip(patches, deltas, strict=True):
        name = _keys_of(info, weight)
        if name is None:
            continue
        (count, width), shape = info.entries[name].shape, delta.shape
        if width not in shape or not count:
            continue
        transposed = width != shape[1] or (shape[0] == shape[1] and info.manifest.base.family in _TRANSPOSED)
        found.append(_sample(info, name, max(1, SAMPLE // len(patches))))
    return KeyShift(torch.cat(found), deltas, transposed) if found else None


def _keys_of(info: PatchInfo, weight: str) -> str | None:
    """The tensor with the keys of a weight; its layer is the first number in the weight's name."""
    layer = next((part for part in weight.split(".") if part.isdecimal()), None)
    name = f"{KEYS}{layer}"
    return name if name in info.entries else None


def _sample(info: PatchInfo, name: str, most: int) -> Tensor:
    """At most so many rows of a patch's tensor, evenly spread. The file was verified as a whole before."""
    entry = info.entries[name]
    count, width = entry.shape
    row = width * ITEM_SIZE[entry.dtype]
    chosen = sorted({index * count // min(most, count) for index in range(min(most, count))})
    with files.open_read(info.path) as handle:
        rows = [files.read_at(handle, entry.begin + index * row, row) for index in chosen]
    return torch.stack([tensor_from(data, entry.dtype, (width,)).float() for data in rows])

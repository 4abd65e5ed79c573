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

# Keys looked at per weight, evenly spread: enough for a rate, and cheap beside Δ itself.
SAMPLE = 64
# Families whose MLP output is a Conv1D, stored [in, out]; needed only where W is square.
_TRANSPOSED = ("gpt2",)


class KeyShift:
    """Sums over the keys of one weight, filled a block of rows at a time: intended ΣΔ k, and E k, in float32."""

    def __init__(self, keys: Tensor, shape: tuple[int, int], transposed: bool) -> None:
        self.keys = keys.float()  # [n, f]
        self.transposed = transposed
        if transposed:  # W is [f, d]: its rows are summed over
            self.intended = torch.zeros(keys.shape[0], shape[1], dtype=torch.float64)
            self.error = torch.zeros_like(self.intended)
        self.intended_square = self.error_square = 0.0

    def add(self, rows: tuple[int, int], change: Tensor, error: Tensor) -> None:
        """Rows [begin, end) of ΣΔ and of E."""
        if self.transposed:
            part = self.keys[:, rows[0] : rows[1]]  # [n, rows]
            self.intended += part @ change.float()
            self.error += part @ error.float()
            return
        self.intended_square += float((change.float() @ self.keys.T).double().square().sum())
        self.error_square += float((error.float() @ self.keys.T).double().square().sum())

    @property
    def relative(self) -> float:
        """‖E K‖ / ‖ΣΔ K‖ over all keys (Frobenius); 0 where the edit does nothing for them."""
        if self.transposed:
            intended, error = float(self.intended.norm()), float(self.error.norm())
        else:
            intended, error = self.intended_square**0.5, self.error_square**0.5
        return error / intended if intended else 0.0


def key_shift(patches: Sequence[tuple[PatchInfo, str]], shape: tuple[int, int]) -> KeyShift | None:
    """The sums for one weight, from the keys of the patches (with the weight's name in each) that change it.

    None when no patch has keys for it.
    """
    found, transposed = [], False
    for info, weight in patches:
        name = _keys_of(info, weight)
        if name is None:
            continue
        count, width = info.entries[name].shape
        if width not in shape or not count:
            continue
        transposed = width != shape[1] or (shape[0] == shape[1] and info.manifest.base.family in _TRANSPOSED)
        found.append(_sample(info, name, max(1, SAMPLE // len(patches))))
    return KeyShift(torch.cat(found), shape, transposed) if found else None


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

"""How the change of one tensor is stored: the smallest form that turns A into B's very bytes, or comes near enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch.checkpoint.diff.difference import Difference, Rows, Size, Verdict
from kpatch.patch.container import ITEM_SIZE
from kpatch.patch.delta import LowRank, rounded
from kpatch.patch.fingerprint import DTYPES
from kpatch.patch.randomized_svd import low_rank

# Columns that are tried for factors when they must give B's bytes, which those of a trained change rarely do.
_TRIED = 256
# What is tried for when no error is asked for: float32 factors cannot come nearer.
FLOAT32 = 1e-6
_SHORT = ("F16", "BF16")


@dataclass(frozen=True)
class Form:
    """A delta that is ready to be stored: parts left and right, or delta, made when they are asked for.

    form, rank  as the manifest has them
    bytes  what its tensors take
    verdict  how exactly it turns A into B
    """

    form: str
    rank: int | None
    bytes: int
    parts: dict[str, Callable[[], Tensor]]
    verdict: Verdict


@dataclass(frozen=True)
class Choice:
    """The form chosen, and the factors that were passed over because they miss some of B's bytes."""

    form: Form
    passed_over: Form | None


def choose(difference: Difference, size: Size, tolerance: float | None, max_rank: int | None, seed: int) -> Choice:
    """The smallest form that gives B's bytes, or whose relative Frobenius error is within `tolerance`.

    Tried are factors by a randomized SVD of at most `max_rank` columns, the changed rows alone, and the dense change
    in 16 bits (where A has them), 32 and 64. Where none will do, the one that misses the fewest bytes.
    """
    rows, cols = difference.shape
    short = difference.a.dtype in _SHORT
    limit = (rows * cols * (2 if short else 4) - 1) // (4 * (rows + cols))  # more would take more than the matrix
    limit = min(limit, max_rank if max_rank is not None else limit if tolerance is not None else _TRIED)
    found: list[Form] = []
    for form in _candidates(difference, size, FLOAT32 if tolerance is None else tolerance, limit, seed):
        found.append(form)
        if form.verdict.differs == 0 or (tolerance is not None and form.verdict.error <= tolerance):
            break
    best = min(found, key=lambda form: form.verdict.differs) if not _good(found[-1], tolerance) else found[-1]
    passed = [form for form in found if form.form == "lowrank" and form is not best and form.bytes < best.bytes]
    return Choice(best, passed[0] if passed else None)


def _good(form: Form, tolerance: float | None) -> bool:
    return form.verdict.differs == 0 or (tolerance is not None and form.verdict.error <= tolerance)


def _candidates(difference: Difference, size: Size, tolerance: float, limit: int, seed: int) -> Iterator[Form]:
    """Forms from the smallest to the largest, as far as that is known before they are made."""
    rows, cols = difference.shape
    changed = size.nonzero_rows
    short = difference.a.dtype in _SHORT
    if limit > 0:
        factors = low_rank(difference, size.norm, 0.9 * tolerance, min(limit, max(len(changed), 1)), seed)
        if factors is not None:
            yield _factors(difference, size, LowRank(factors.left.float(), factors.right.float()))
    if len(changed) * (rows + cols) * 4 < rows * cols * (2 if short else 4):
        yield _some_rows(difference, size)
    for dtype in (difference.a.dtype,) * short + ("F32", "F64"):
        yield _dense(difference, size, dtype)


def _factors(difference: Difference, size: Size, factors: LowRank) -> Form:
    verdict = difference.judge(lambda begin, end, old, new: factors.rows(begin, end), size.norm)
    parts = {"left": lambda: factors.left.contiguous(), "right": lambda: factors.right.contiguous()}
    return Form("lowrank", factors.rank, 4 * factors.stored_numbers, parts, verdict)


def _some_rows(difference: Difference, size: Size) -> Form:
    """A few changed rows (of an embedding, say) as factors: left has a 1 where a row goes, right is the rows."""
    changed = size.nonzero_rows
    rows, cols = difference.shape

    def left() -> Tensor:
        result = torch.zeros(rows, len(changed))
        result[torch.tensor(changed), torch.arange(len(changed))] = 1
        return result

    def right() -> Tensor:
        places = torch.tensor(changed)
        return torch.cat(
            [
                (new - old)[places[(places >= begin) & (places < end)] - begin]
                for begin, end, old, new in difference.blocks()
            ]
        ).float()

    verdict = difference.judge(_rounded("F32"), size.norm)
    parts = {"left": left, "right": right}
    return Form("lowrank", len(changed), 4 * len(changed) * (rows + cols), parts, verdict)


def _dense(difference: Difference, size: Size, dtype: str) -> Form:
    def delta() -> Tensor:
        result = torch.empty(difference.shape, dtype=DTYPES[dtype])
        for begin, end, old, new in difference.blocks():
            result[begin:end] = rounded(new - old, DTYPES[dtype])
        return result

    verdict = difference.judge(_rounded(dtype), size.norm)
    return Form("dense", None, ITEM_SIZE[dtype] * difference.entries, {"delta": delta}, verdict)


def _rounded(dtype: str) -> Rows:
    """B − A as it is when stored in `dtype`."""
    return lambda begin, end, old, new: rounded(new - old, DTYPES[dtype]).double()

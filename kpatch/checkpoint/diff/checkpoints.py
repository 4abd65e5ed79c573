"""Two checkpoint directories of one architecture → a patch that turns the first into the second.

One tensor at a time, and of that a block of rows: memory goes with the rank, and for a dense change with the tensor.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kpatch.checkpoint.checks import refuse_quantized
from kpatch.checkpoint.commit import system_errors
from kpatch.checkpoint.diff.compare import Comparison, compare, model_type
from kpatch.checkpoint.diff.difference import Difference, Size
from kpatch.checkpoint.diff.forms import Form, choose
from kpatch.checkpoint.fit import base_weights
from kpatch.checkpoint.store import Store
from kpatch.errors import BadInput, CheckFailed, KpatchError, Refused
from kpatch.patch.build import build_manifest
from kpatch.patch.check import verify
from kpatch.patch.format import write_patch
from kpatch.patch.manifest import DeltaInfo, layer_in
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class TensorDiff:
    """One tensor that differs. `norm` is ‖B − A‖ (Frobenius), `relative_norm` over ‖A‖.

    Only once a patch is made: form, rank and bytes as stored; `differs`, entries of round(A + Δ) whose bits are not
    B's; `error`, ‖Δ − (B − A)‖ / ‖B − A‖. `shorter` is (rank, bytes, differs) of factors that were passed over
    because they miss some of B's bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    entries: int
    norm: float
    relative_norm: float
    form: str | None = None
    rank: int | None = None
    bytes: int | None = None
    differs: int | None = None
    error: float | None = None
    shorter: tuple[int, int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        own = {key: value for key, value in vars(self).items() if key != "shorter"}
        return {**own, "shape": list(self.shape)}


@dataclass(frozen=True)
class CheckpointDiff:
    """The outcome of `diff` for two checkpoints; `id`, `path` and `bytes` are None when no patch was written."""

    a: str
    b: str
    tensors: tuple[TensorDiff, ...]
    same: int
    notes: tuple[str, ...]
    seconds: float
    id: str | None = None
    path: Path | None = None
    bytes: int | None = None

    @property
    def equal(self) -> bool:
        """Whether no tensor differs."""
        return not self.tensors

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `diff` for two checkpoints."""
        return {
            "equal": self.equal,
            "models": [self.a, self.b],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "same": self.same,
            "patch": None if self.path is None else {"id": self.id, "path": str(self.path), "bytes": self.bytes},
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def diff_checkpoints(
    a: str | Path,
    b: str | Path,
    out: str | Path | None = None,
    *,
    tolerance: float | None = None,
    max_rank: int | None = None,
    seed: int = 0,
    force: bool = False,
    report: Reporter = SILENT,
) -> CheckpointDiff:
    """Compare two checkpoint directories; with `out`, write the patch that turns `a` into `b`.

    Each change is stored in the smallest form with which `apply` gives b's very bytes. With `tolerance`, factors
    whose relative Frobenius error is within it will do. `max_rank` bounds the columns tried, `seed` the randomness.
    Raises Refused (other tensors, shapes, architecture; `a` carries patches on what changed; `out` exists, or is
    given for a quantized `a`), BadInput (options, NaN), CheckFailed where `out` is given and nothing differs, Damaged.
    """
    start = time.monotonic()
    if tolerance is not None and not 0 < tolerance < 1:
        raise BadInput(f"`tolerance={tolerance:g}` is not a share between 0 and 1", hint="1e-6 is float32's own")
    if max_rank is not None and max_rank < 1:
        raise BadInput(f"`max_rank={max_rank}` is not a rank")
    with system_errors(Path(a)):
        found = compare(a, b, report)
        if out is not None:
            refuse_quantized(found.a)  # `apply` would refuse it
        sizes = _measure(found, report)
        changed = [difference for difference in found.changed if sizes[difference.name].norm > 0]
        notes = list(found.notes)
        if len(changed) < len(found.changed):
            zeros = len(found.changed) - len(changed)
            notes.append(f"{zeros} tensors differ in nothing but the sign of zeros, which no sum can change")
        for note in notes:
            report.note(note)
        common = (found.a.given, found.b.given)
        if out is None:
            rows = tuple(_row(difference, sizes[difference.name]) for difference in changed)
            return CheckpointDiff(*common, rows, found.same, tuple(notes), time.monotonic() - start)
        if not changed:
            raise CheckFailed(f"{common[0]} and {common[1]} hold the same weights; there is no patch to write")
        _refuse_patched(found, changed)
        forms, rows = _forms(changed, sizes, tolerance, max_rank, seed, report)
        given = {"tolerance": tolerance, "max_rank": max_rank, "seed": seed}
        settings = {key: value for key, value in given.items() if value is not None}
        identity = _write(Path(out), found, forms, rows, settings, force, report)
    size = Path(out).stat().st_size
    seconds = time.monotonic() - start
    return CheckpointDiff(*common, rows, found.same, tuple(notes), seconds, identity, Path(out), size)


def _measure(found: Comparison, report: Reporter) -> dict[str, Size]:
    with report.task("Measuring changes", len(found.changed), "tensor") as advance:
        sizes = {}
        for difference in found.changed:
            sizes[difference.name] = difference.measure()
            advance(1)
    return sizes


def _row(difference: Difference, size: Size, form: Form | None = None, shorter: Form | None = None) -> TensorDiff:
    relative = size.norm / size.base_norm if size.base_norm else 0.0
    about = (difference.name, difference.a.shape, difference.a.dtype, difference.entries, size.norm, relative)
    if form is None:
        return TensorDiff(*about)
    other = None if shorter is None else (shorter.rank or 0, shorter.bytes, shorter.verdict.differs)
    verdict = form.verdict
    return TensorDiff(*about, form.form, form.rank, form.bytes, verdict.differs, verdict.error, other)


def _forms(
    changed: list[Difference],
    sizes: Mapping[str, Size],
    tolerance: float | None,
    max_rank: int | None,
    seed: int,
    report: Reporter,
) -> tuple[dict[str, Form], tuple[TensorDiff, ...]]:
    forms, rows = {}, []
    with report.task("Finding the smallest form", len(changed), "tensor") as advance:
        for difference in changed:
            size = sizes[difference.name]
            choice = choose(difference, size, tolerance, max_rank, seed)
            forms[difference.name] = choice.form
            rows.append(_row(difference, size, choice.form, choice.passed_over))
            advance(1)
    return forms, tuple(rows)


def _refuse_patched(found: Comparison, changed: list[Difference]) -> None:
    """A patch names its base by bytes without patches; a change on top of some would need theirs too."""
    patched = Store(found.a.path).applied().weights.keys() & {difference.name for difference in changed}
    if patched:
        raise Refused(
            f"{found.a.given} carries patches on weights that differ",
            details=[printable(name, 120) for name in sorted(patched)[:10]],
            hint=f"compare with what it was before them: `kpatch revert --all {found.a.given}`, on a copy",
        )


class _Parts(Mapping[str, Tensor]):
    """The tensors of the patch, each made when it is asked for and not kept."""

    def __init__(self, forms: Mapping[str, Form]) -> None:
        self._make: dict[str, Callable[[], Tensor]] = {
            f"{name}.{part}": make for name, form in forms.items() for part, make in form.parts.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


def _write(
    out: Path,
    found: Comparison,
    forms: Mapping[str, Form],
    rows: tuple[TensorDiff, ...],
    settings: Mapping[str, Any],
    force: bool,
    report: Reporter,
) -> str:
    weights = base_weights(found.a.path, forms, report)
    name, revision = _name(found.a.path)
    deltas = {
        row.name: DeltaInfo(
            forms[row.name].form,
            row.rank,
            row.norm,
            row.relative_norm,
            {"differs": row.differs, "error": row.error} if row.differs else {},
        )
        for row in rows
    }
    layers = {layer for weight in forms if (layer := layer_in(weight)) is not None}
    manifest = build_manifest(
        base_name=name,
        family=model_type(found.a) or "unknown",
        revision=revision,
        weights=weights,
        deltas=deltas,
        method="diff",
        layers=tuple(layers),
        hyperparameters=settings,
    )
    identity = write_patch(out, manifest, _Parts(forms), force)
    try:
        verify(out, report)
    except KpatchError:
        with suppress(OSError):
            out.unlink()
        raise Refused(
            f"{found.a.given} or {found.b.given} changed while they were being compared", hint="run it again"
        ) from None
    return identity


def _name(path: Path) -> tuple[str, str | None]:
    """What to call a checkpoint, and its commit where it lies in the hub's cache."""
    parts = path.parts
    if len(parts) > 2 and parts[-2] == "snapshots" and _COMMIT.fullmatch(path.name):
        return parts[-3].removeprefix("models--").replace("--", "/"), path.name
    return path.name or "model", None

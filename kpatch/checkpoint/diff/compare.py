"""Which tensors of two checkpoint directories differ, found a chunk of bytes at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kpatch.checkpoint import files
from kpatch.checkpoint.diff.difference import Difference
from kpatch.checkpoint.fit import settled_store
from kpatch.checkpoint.shards import Checkpoint, TensorRef, open_checkpoint, read_json
from kpatch.errors import BadInput, Refused
from kpatch.patch.fields import FLOAT_DTYPES
from kpatch.patch.weight_names import one_name_each
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable

_SHOWN = 10


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints of one architecture: the tensors that differ, how many do not, and what should be said."""

    a: Checkpoint
    b: Checkpoint
    changed: tuple[Difference, ...]
    same: int
    notes: tuple[str, ...]


def compare(a: str | Path, b: str | Path, report: Reporter = SILENT) -> Comparison:
    """Compare every tensor of two checkpoints: bytes where the dtype is the same, else values in the coarser dtype.

    The same model may be saved in two forms, with other prefixes before its layers; tensors go by a's names.
    Raises Refused for tensors that only one has, other shapes or architectures, and changes of tensors that hold no
    float numbers; BadInput, Damaged where one cannot be read or is in the middle of an apply.
    """
    one, other = open_checkpoint(a), open_checkpoint(b)
    for checkpoint in (one, other):
        settled_store(checkpoint)
    _same_architecture(one, other)
    called = _same_names(one, other)
    amount = sum(ref.end - ref.begin for ref in one.tensors.values())
    changed, same, cast = [], 0, 0
    with report.task("Comparing", amount, "B") as advance:
        for name, ref in sorted(one.tensors.items()):
            new = other.tensors[called[name]]
            cast += ref.dtype != new.dtype
            if _equal(one, ref, other, new):
                same += 1
            else:
                changed.append(Difference(name, one.path / ref.file, ref, other.path / new.file, new))
            advance(ref.end - ref.begin)
    wrong = [difference for difference in changed if not _are_float(difference.a, difference.b)]
    if wrong:
        raise Refused(
            f"{one.given} and {other.given} differ in tensors that hold no float numbers",
            details=_listed([f"{printable(d.name, 120)}: {_dtypes(d.a, d.b)}" for d in wrong]),
            hint="compare unquantized checkpoints",
        )
    return Comparison(one, other, tuple(changed), same, tuple(_notes(one, other, called, cast)))


def _are_float(a: TensorRef, b: TensorRef) -> bool:
    return a.dtype in FLOAT_DTYPES and b.dtype in FLOAT_DTYPES


def _equal(one: Checkpoint, ref: TensorRef, other: Checkpoint, new: TensorRef) -> bool:
    if ref.dtype != new.dtype:
        paths = one.path / ref.file, other.path / new.file
        return _are_float(ref, new) and Difference("", paths[0], ref, paths[1], new).equal()
    with files.open_read(one.path / ref.file) as left, files.open_read(other.path / new.file) as right:
        for begin in range(0, ref.end - ref.begin, files.CHUNK):
            length = min(files.CHUNK, ref.end - ref.begin - begin)
            if files.read_at(left, ref.begin + begin, length) != files.read_at(right, new.begin + begin, length):
                return False
    return True


def _same_architecture(a: Checkpoint, b: Checkpoint) -> None:
    kinds = [model_type(checkpoint) for checkpoint in (a, b)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise Refused(
            f"{a.given} and {b.given} are of different architectures",
            details=[f"model_type {printable(str(kinds[0]), 60)} and {printable(str(kinds[1]), 60)}"],
        )


def model_type(checkpoint: Checkpoint) -> str | None:
    """What config.json calls the architecture, of the text part in a model with vision; None where it does not say."""
    path = checkpoint.path / "config.json"
    value = read_json(path, str(path)) if path.is_file() else {}
    whole = value if isinstance(value, dict) else {}
    text = whole.get("text_config")
    found = (text.get("model_type") if isinstance(text, dict) else None) or whole.get("model_type")
    return found if isinstance(found, str) and found else None


def _same_names(a: Checkpoint, b: Checkpoint) -> dict[str, str]:
    """What b calls each tensor of a. Raises Refused where one has a tensor that the other lacks, or another shape."""
    if not a.tensors:
        raise BadInput(f"{a.given} holds no tensors")
    _, names = one_name_each([b.tensors, sorted(a.tensors)])
    called = {name: here for name, here in names.items() if here in b.tensors}
    lines = []
    for given, missing in (
        (a.given, a.tensors.keys() - called.keys()),
        (b.given, b.tensors.keys() - set(called.values())),
    ):
        lines += _listed([f"only in {given}: {printable(name, 120)}" for name in sorted(missing)])
    if lines:
        raise Refused(
            f"{a.given} and {b.given} do not hold the same tensors; a patch cannot add or remove any", details=lines
        )
    shapes = [
        f"{printable(name, 120)}: {list(a.tensors[name].shape)} and {list(b.tensors[other].shape)}"
        for name, other in called.items()
        if a.tensors[name].shape != b.tensors[other].shape
    ]
    if shapes:
        raise Refused(f"{a.given} and {b.given} hold tensors of different shapes", details=_listed(shapes))
    return called


def _listed(lines: list[str]) -> list[str]:
    return lines[:_SHOWN] + ([f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])


def _dtypes(a: TensorRef, b: TensorRef) -> str:
    return f"{printable(a.dtype, 20)} and {printable(b.dtype, 20)}"


def _notes(a: Checkpoint, b: Checkpoint, called: Mapping[str, str], cast: int) -> list[str]:
    notes = []
    other = [name for name, here in called.items() if name != here]
    if other:
        first = f"{printable(other[0], 120)} is {printable(called[other[0]], 120)}"
        notes.append(f"{b.given} calls {len(other)} tensors otherwise ({first}); they go by the names in {a.given}")
    if cast:
        pairs = sorted({_dtypes(ref, b.tensors[called[name]]) for name, ref in a.tensors.items()
                        if ref.dtype != b.tensors[called[name]].dtype})  # fmt: skip
        notes.append(
            f"{cast} tensors are stored in another dtype ({', '.join(pairs)}): compared by value, "
            "what rounding to the coarser dtype explains does not count"
        )
    paths = [checkpoint.path / "tokenizer.json" for checkpoint in (a, b)]
    if all(path.is_file() for path in paths) and paths[0].read_bytes() != paths[1].read_bytes():
        notes.append("the tokenizers differ too; a patch carries weights only")
    return notes

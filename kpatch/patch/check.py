"""Is a patch file whole? Every tensor's hash, and no NaN or Inf, a block at a time. No torch."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from io import FileIO
from pathlib import Path

from kpatch.errors import Damaged
from kpatch.patch.container import ITEM_SIZE, ContainerError, Entry, open_regular, read_exactly
from kpatch.patch.header import PatchInfo, read_header
from kpatch.patch.sources import PatchSource
from kpatch.reporter import SILENT, Reporter

_CHUNK = 1 << 24

# The exponent's bits in the two highest bytes of an entry, the highest first: in NaN and Inf, and nowhere else, all
# of them are set (IEEE 754; bfloat16 is the upper half of a float32).
_EXPONENT = {"F16": (0x7C, 0x00), "BF16": (0x7F, 0x80), "F32": (0x7F, 0x80), "F64": (0x7F, 0xF0)}


def is_finite(data: bytes | bytearray, dtype: str) -> bool:
    """Whether no entry of little-endian floats, `dtype` as safetensors names it, is NaN or Inf.

    The highest bytes alone settle it for nearly all that is stored: in float32, for all numbers below 1.7e38.
    """
    size, masks = ITEM_SIZE[dtype], _EXPONENT[dtype]
    high, low = ({byte for byte in range(256) if byte & mask == mask} for mask in masks)
    top = bytes(data[size - 1 :: size])
    if not any(byte in top for byte in high):
        return True
    # One byte for each entry: 1 where its bits are all set. As long numbers, all entries are compared at once.
    first, second = (bytes(byte in those for byte in range(256)) for those in (high, low))
    rest = bytes(data[size - 2 :: size])
    return not int.from_bytes(top.translate(first), "little") & int.from_bytes(rest.translate(second), "little")


def verify(patch: PatchSource, report: Reporter = SILENT) -> PatchInfo:
    """Check a patch whole, one block at a time: header, every tensor's hash, no NaN or Inf.

    Raises BadInput, Damaged or Refused as `format.read_patch`; gives the header when all is well.
    """
    return check_data(read_header(patch), report=report)


def check_data(info: PatchInfo, source: Path | None = None, report: Reporter = SILENT) -> PatchInfo:
    """Check the tensors of a patch whose header was read; gives it as `verified`.

    An error names `source` where that is given: the file this one is a copy of. Raises Damaged.
    """
    named = info.path if source is None else source
    amount = sum(entry.end - entry.begin for entry in info.entries.values())
    with report.task(f"Checking {named.stem}", amount, "B") as advance:
        try:
            with open_regular(info.path) as handle:
                for name, entry in sorted(info.entries.items()):
                    _check_tensor(info, named, handle, name, entry)
                    advance(entry.end - entry.begin)
        except (OSError, ContainerError) as error:
            raise Damaged(f"{named} cannot be read", details=[str(error)]) from None
    return replace(info, verified=True)


def _check_tensor(info: PatchInfo, named: Path, handle: FileIO, name: str, entry: Entry) -> None:
    digest, finite = hashlib.sha256(), True
    for begin in range(entry.begin, entry.end, _CHUNK):
        block = read_exactly(handle, begin, min(_CHUNK, entry.end - begin))
        digest.update(block)
        finite = finite and is_finite(block, entry.dtype)
    # The hash first: flipped bits make NaN too, and the hash says what is wrong.
    if digest.hexdigest() != info.manifest.tensors[name].sha256:
        raise wrong_hash(named, name)
    if not finite:
        raise not_finite(named, name)


def wrong_hash(path: Path, name: str) -> Damaged:
    """The error for a tensor whose bytes are not what the manifest says."""
    return Damaged(
        f"{path} is damaged: tensor {name} is not what its manifest says",
        details=["its SHA-256 differs from the one recorded when the patch was made"],
        hint="get the file again from where it came, or make it again",
    )


def not_finite(path: Path, name: str) -> Damaged:
    """The error for a tensor with NaN or Inf in it."""
    return Damaged(f"{path} is not a sound patch: tensor {name} holds NaN or Inf")

"""The safetensors container, read with limits of our own and written so that equal content is equal bytes. No torch.

Source: the format page in the README of huggingface/safetensors. The library checks overlaps and lengths, but opens
files with duplicate keys and does not bound depth or names, so a file from elsewhere is parsed here first.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from kpatch.patch.canonical_json import JsonError, loads
from kpatch.text import printable

# Bytes per entry of every dtype whose entries fill whole bytes.
ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

_MAX_DIMENSIONS = 16
_CHUNK = 1 << 22


class ContainerError(ValueError):
    """A file that is no sound safetensors file; the message is the reason, in words for a user."""


class NotAFile(ContainerError):
    """A directory, a pipe, a socket or a device."""


class CutOff(ContainerError):
    """A file shorter than its own header says."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: dtype as safetensors names it, shape, and its bytes [begin, end) counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Container:
    """The header of one file: metadata, tensors by name, file size and where the data starts, in bytes."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    size: int
    data_start: int


def open_regular(path: Path) -> FileIO:
    """Open a regular file for reading, unbuffered; a FIFO or device is not waited for.

    Raises NotAFile for anything but a regular file, OSError when it cannot be opened.
    """
    _require_regular(os.stat(path).st_mode)  # before opening: opening a device can act on it
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    handle = FileIO(os.open(path, flags), "rb")
    try:
        _require_regular(os.fstat(handle.fileno()).st_mode)
    except ContainerError:
        handle.close()
        raise
    return handle


def _require_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise NotAFile("is a directory, not a file")
    if not stat.S_ISREG(mode):
        raise NotAFile("is not a regular file (a pipe, a socket or a device)")


def read_exactly(handle: FileIO, offset: int, length: int) -> bytearray:
    """`length` bytes from `offset`. Raises CutOff when the file ends before."""
    data = bytearray(length)
    view = memoryview(data)
    handle.seek(offset)
    done = 0
    while done < length:
        count = handle.readinto(view[done : done + _CHUNK])
        if not count:
            raise CutOff(f"it ends at byte {offset + done:,}, but its header promises {offset + length:,}")
        done += count
    return data


def read_container(handle: FileIO, *, max_header: int, max_tensors: int | None = None) -> Container:
    """Parse and check a header: length, strict JSON, shapes, and data that fill the file without hole or overlap.

    Raises ContainerError (CutOff when the file is too short).
    """
    size = os.fstat(handle.fileno()).st_size
    if size < 8:
        raise CutOff(f"it has {size} bytes; the shortest header takes 8")
    (length,) = struct.unpack("<Q", read_exactly(handle, 0, 8))
    if length > max_header:
        raise ContainerError(f"its header claims {length:,} bytes; the limit is {max_header:,}")
    if 8 + length > size:
        raise CutOff(f"its header claims {length:,} bytes, the whole file has {size:,}")
    raw = bytes(read_exactly(handle, 8, length))
    # Before parsing: a million tensors take ten seconds and a gigabyte to parse. Names may hide from this count, but
    # not from the one below.
    if max_tensors is not None and raw.count(b'"data_offsets"') > max_tensors:
        raise ContainerError(f"it lists more than {max_tensors:,} tensors, the limit")
    header = _parse(raw)
    metadata = _metadata(header.pop("__metadata__", {}))
    if max_tensors is not None and len(header) > max_tensors:
        raise ContainerError(f"it lists {len(header):,} tensors; the limit is {max_tensors:,}")
    entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
    _check_contiguous(entries, 8 + length, size)
    return Container(metadata, entries, size, 8 + length)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ContainerError("its header is not UTF-8 text") from None
    if not text.startswith("{"):
        raise ContainerError("its header does not start with '{'")
    try:
        value = loads(text.rstrip(" "))
    except JsonError as error:
        raise ContainerError(
            f"its header is {error}" if str(error).startswith("not") else f"its header: {error}"
        ) from None
    assert isinstance(value, dict)
    return value


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ContainerError("its metadata is not a map from text to text")
    return value


def _entry(name: str, value: Any, data_start: int) -> Entry:
    shown = printable(name, 80)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ContainerError(f"tensor {shown}: must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise ContainerError(f"tensor {shown}: its dtype is not text")
    if not _sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ContainerError(f"tensor {shown}: its shape is not a short list of sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ContainerError(f"tensor {shown}: its data_offsets are not two rising numbers")
    begin, end = offsets
    if dtype in ITEM_SIZE and math.prod(shape) * ITEM_SIZE[dtype] != end - begin:
        raise ContainerError(
            f"tensor {shown}: {dtype} of shape {shape} takes {math.prod(shape) * ITEM_SIZE[dtype]:,} bytes, "
            f"its data_offsets give it {end - begin:,}"
        )
    return Entry(dtype, tuple(shape), data_start + begin, data_start + end)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_contiguous(entries: Mapping[str, Entry], data_start: int, size: int) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise ContainerError(
                f"tensor {printable(name, 80)} {what} (begins at byte {entry.begin:,}, not {position:,})"
            )
        position = entry.end
    if position > size:
        raise CutOff(f"its header promises {position:,} bytes, the file has {size:,}")
    if position < size:
        raise ContainerError(f"{size - position:,} bytes follow the last tensor")


def layout(shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The header bytes (length prefix and padding included) and the order in which the tensors' bytes follow.

    `shapes` maps name to (dtype, shape). Order: widest dtype first, then by name, as safetensors itself does, so every
    tensor is aligned and the same content always gives the same bytes.
    """
    order = sorted(shapes, key=lambda name: (-ITEM_SIZE[shapes[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name in order:
        dtype, shape = shapes[name]
        end = position + math.prod(shape) * ITEM_SIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, order

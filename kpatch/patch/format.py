"""Writing and reading patch files, tensors included. Every hash is checked; NaN and Inf never pass either way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from kpatch.cache import atomic_write
from kpatch.errors import BadInput, Damaged
from kpatch.outputs import check_new_file
from kpatch.patch.check import not_finite, wrong_hash
from kpatch.patch.container import ContainerError, layout, open_regular, read_exactly
from kpatch.patch.delta import Delta, Dense, LowRank
from kpatch.patch.fields import ManifestError
from kpatch.patch.fingerprint import NAMES, sha256_of, tensor_bytes, tensor_from
from kpatch.patch.header import (
    KEYS,
    MAX_HEADER,
    MAX_TENSORS,
    METADATA_KEY,
    VALUES,
    PatchInfo,
    check_tensors,
    read_header,
)
from kpatch.patch.manifest import Manifest, TensorInfo
from kpatch.patch.sources import PatchSource
from kpatch.text import printable

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Patch:
    """A patch in memory: deltas by weight in the orientation W is stored in; values [n, d], keys by layer [n, f].

    `path` is the file it was read from.
    """

    manifest: Manifest
    id: str
    deltas: Mapping[str, Delta]
    values: Tensor | None
    keys: Mapping[int, Tensor]
    path: Path | None = None


def pack(
    deltas: Mapping[str, Delta], values: Tensor | None = None, keys: Mapping[int, Tensor] | None = None
) -> dict[str, Tensor]:
    """The named float32 tensors of a patch file from its parts."""
    tensors: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        if isinstance(delta, LowRank):
            tensors[f"{name}.left"], tensors[f"{name}.right"] = delta.left, delta.right
        else:
            tensors[f"{name}.delta"] = delta.delta
    if values is not None:
        tensors[VALUES] = values
    for layer, key in (keys or {}).items():
        tensors[f"{KEYS}{layer}"] = key
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}


def write_patch(path: str | Path, manifest: Manifest, tensors: Mapping[str, Tensor], force: bool = False) -> str:
    """Write a patch file whole or not at all, and give its id. The manifest's `tensors` are filled in here.

    Equal manifests and tensors give equal bytes. Raises Refused for an existing file unless `force`, BadInput for
    tensors or a manifest that a reader would refuse, KpatchError when the file cannot be written.
    """
    path = check_new_file(path, force=force, what="a patch")
    header, order, identity = _prepare(manifest, tensors)

    def write(temporary: Path) -> None:
        with temporary.open("wb", buffering=0) as handle:
            handle.write(header)
            for name in order:
                data = tensor_bytes(tensors[name])
                for begin in range(0, len(data), _CHUNK):
                    _write_all(handle, data[begin : begin + _CHUNK])

    atomic_write(path, write)
    return identity


def _write_all(handle: FileIO, data: memoryview) -> None:
    while data:
        data = data[handle.write(data) or 0 :]


def _prepare(manifest: Manifest, tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str], str]:
    """Header bytes, order of the tensors and id. Raises BadInput for what `read_header` would not take back."""
    if len(tensors) > MAX_TENSORS:
        raise BadInput(f"A patch holds at most {MAX_TENSORS:,} tensors, not {len(tensors):,}")
    infos: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES or tensor.ndim != 2:
            raise BadInput(f"Tensor {name} is {tensor.dtype} with {tensor.ndim} dimensions; a patch holds 2-D floats")
        if not bool(torch.isfinite(tensor).all()):
            raise BadInput(f"Tensor {name} holds NaN or Inf", hint="the edit diverged: lower its learning rate")
        infos[name] = TensorInfo(NAMES[tensor.dtype], (tensor.shape[0], tensor.shape[1]), sha256_of(tensor))
    try:
        text, identity = replace(manifest, tensors=infos).to_json()
        check_tensors(Manifest.from_json(text)[0], infos)
    except ManifestError as error:
        raise BadInput("The patch would not be readable", details=[printable(str(error), 300)]) from None
    header, order = layout({name: (info.dtype, info.shape) for name, info in infos.items()}, {METADATA_KEY: text})
    if len(header) - 8 > MAX_HEADER:
        raise BadInput(
            f"The facts and what was measured on them take {len(header):,} bytes; a patch holds {MAX_HEADER:,}",
            hint="split the fact file in two",
        )
    return header, order, identity


def read_patch(patch: PatchSource) -> Patch:
    """Read a whole patch into memory, every hash checked.

    Raises BadInput, Damaged or Refused as `read_header`; Damaged for a wrong hash, NaN or Inf.
    """
    info = read_header(patch)
    manifest = info.manifest
    tensors = {name: read_tensor(info, name) for name in sorted(manifest.tensors)}
    keys = {layer: tensors[f"{KEYS}{layer}"] for layer in manifest.layers if f"{KEYS}{layer}" in tensors}
    deltas = {name: _delta(info, name, tensors) for name in sorted(manifest.deltas)}
    return Patch(manifest, info.id, deltas, tensors.get(VALUES), keys, info.path)


def read_delta(info: PatchInfo, weight: str) -> Delta:
    """One weight's delta from a patch whose header was read; hashes checked. Raises Damaged."""
    parts = ("delta",) if info.manifest.deltas[weight].form == "dense" else ("left", "right")
    return _delta(info, weight, {f"{weight}.{part}": read_tensor(info, f"{weight}.{part}") for part in parts})


def _delta(info: PatchInfo, weight: str, tensors: Mapping[str, Tensor]) -> Delta:
    declared = info.manifest.deltas[weight]
    if declared.form == "dense":
        return Dense(tensors[f"{weight}.delta"], declared.rank)
    return LowRank(tensors[f"{weight}.left"], tensors[f"{weight}.right"])


def read_tensor(info: PatchInfo, name: str) -> Tensor:
    """One tensor of a patch whose header was read. Raises Damaged for a wrong hash, NaN or Inf, a file cut off."""
    entry = info.entries[name]
    try:
        with open_regular(info.path) as handle:
            data = read_exactly(handle, entry.begin, entry.end - entry.begin)
    except (OSError, ContainerError) as error:
        raise Damaged(f"{info.path} cannot be read", details=[str(error)]) from None
    if not info.verified and sha256_of(data) != info.manifest.tensors[name].sha256:
        raise wrong_hash(info.path, name)
    tensor = tensor_from(data, entry.dtype, entry.shape)
    if not info.verified and not bool(torch.isfinite(tensor).all()):
        raise not_finite(info.path, name)
    return tensor

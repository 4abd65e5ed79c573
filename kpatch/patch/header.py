"""Reading what a patch says of itself without reading its tensors, with limits, and saying what a wrong file is.

No torch here: `kpatch show` and `kpatch status` stand on this module.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from kpatch.errors import BadInput, Damaged, KpatchError, Refused
from kpatch.patch.container import Container, ContainerError, CutOff, Entry, NotAFile, open_regular, read_container
from kpatch.patch.fields import FLOAT_DTYPES, ManifestError
from kpatch.patch.manifest import Manifest, NewerFormat, TensorInfo, matrix_shape
from kpatch.patch.sources import PatchSource, ReadPatch, patch_path
from kpatch.text import printable

METADATA_KEY = "kpatch"
# The facts, and the effect measured on each, stand in full in the header: 100,000 of them take some 40 to 50 MB. The
# safetensors library itself stops at 100 MB.
MAX_HEADER = 64 << 20
MAX_TENSORS = 4096

VALUES = "facts.values"
KEYS = "facts.keys."


@dataclass(frozen=True)
class PatchInfo:
    """A patch file whose header was read and checked: manifest, id, size in bytes, where its tensors lie.

    `manifest_sha256` is that of its text in the file, which tells whether another file's is the same.
    `verified` once the tensors' bytes were checked as well: they are then read without being hashed again.
    """

    manifest: Manifest
    id: str
    bytes: int
    path: Path
    entries: Mapping[str, Entry]
    manifest_sha256: str
    verified: bool = False

    def renamed(self, names: Mapping[str, str]) -> PatchInfo:
        """The same patch with other names of its weights, {own name: other}; the same file is read."""
        tensors = {
            f"{weight}.{part}": f"{names.get(weight, weight)}.{part}"
            for weight in self.manifest.deltas
            for part in ("delta", "left", "right")
        }
        manifest = self.manifest
        return replace(
            self,
            manifest_sha256="",  # of no file
            manifest=replace(
                manifest,
                base=replace(manifest.base, weights=_renamed(manifest.base.weights, names)),
                deltas=_renamed(manifest.deltas, names),
                tensors=_renamed(manifest.tensors, tensors),
            ),
            entries=_renamed(self.entries, tensors),
        )

    @property
    def name(self) -> str:
        """What to call it: the file's name without suffix, safe to print."""
        return printable(self.path.stem, 80)

    def weights(self) -> list[dict[str, Any]]:
        """Per weight, for `show`: name, shape, rank, norm, relative_norm (fraction of the weight's norm)."""
        base = self.manifest.base.weights
        return [
            {
                "name": name,
                "shape": list(base[name].shape),
                "rank": delta.rank,
                "norm": delta.norm,
                "relative_norm": delta.relative_norm,
            }
            for name, delta in sorted(self.manifest.deltas.items())
        ]


def _renamed(by_name: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in by_name.items()}


def read_header(patch: PatchSource) -> PatchInfo:
    """Read and check the header of a patch file; tensors are not read.

    Raises BadInput for a file that is no patch, Damaged for a patch that is cut off or breaks the format, Refused for
    a patch of a later format, and where a patch in memory is no longer the one in its file.
    """
    path = patch_path(patch)
    info = _read(path, None)
    if isinstance(patch, ReadPatch) and patch.id != info.id:
        raise Refused(
            f"{path} is another patch than the one that was read from it",
            details=[f"expected {patch.id[:12]}", f"found {info.id[:12]}"],
            hint="read the file again",
        )
    return info


def read_copy(path: Path, of: PatchInfo) -> PatchInfo:
    """`read_header` of a file that should be a copy of another: the same manifest is not checked again."""
    return _read(path, of)


def _read(path: Path, known: PatchInfo | None) -> PatchInfo:
    shown = str(path)
    try:
        handle = open_regular(path)
    except FileNotFoundError:
        raise BadInput(f"There is no patch file {shown}") from None
    except NotAFile as error:
        raise BadInput(f"{shown} {error}", hint="give a .patch file made by `kpatch make`") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadInput(f"{shown} cannot be read", details=[str(error)]) from None
    with handle:
        try:
            container = read_container(handle, max_header=MAX_HEADER, max_tensors=MAX_TENSORS)
        except ContainerError as error:
            raise _explain(handle, shown, error) from None
        except OSError as error:
            raise BadInput(f"{shown} cannot be read", details=[str(error)]) from None
    return _info(path, shown, container, known)


def _info(path: Path, shown: str, container: Container, known: PatchInfo | None) -> PatchInfo:
    if METADATA_KEY not in container.metadata:
        raise BadInput(
            f"{shown} is a safetensors file, but no kpatch patch",
            details=["its metadata has no key 'kpatch'"],
        )
    try:
        if len(container.metadata) != 1:
            raise ManifestError("the metadata has other keys beside 'kpatch'")
        text = container.metadata[METADATA_KEY]
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        if known is not None and digest == known.manifest_sha256:
            manifest, identity = known.manifest, known.id
        else:
            manifest, identity = Manifest.from_json(text)
        found = {name: TensorInfo(entry.dtype, _two(name, entry), "") for name, entry in container.entries.items()}
        check_tensors(manifest, found)
    except NewerFormat as error:
        raise Refused(f"{shown} was made by a later kpatch", details=[str(error)], hint="upgrade kpatch") from None
    except ManifestError as error:
        raise Damaged(f"{shown} is not a sound patch", details=[printable(str(error), 300)], hint=_AGAIN) from None
    return PatchInfo(manifest, identity, container.size, path, container.entries, digest)


def _two(name: str, entry: Entry) -> tuple[int, int]:
    if len(entry.shape) != 2:
        raise ManifestError(f"tensor {printable(name, 80)} has {len(entry.shape)} dimensions, not 2")
    return entry.shape[0], entry.shape[1]


def check_tensors(manifest: Manifest, found: Mapping[str, TensorInfo]) -> None:
    """Check that a file's tensors are those the manifest declares and that all shapes fit each other.

    `found` gives dtype and shape per tensor (hashes are not compared here). Raises ManifestError.
    """
    declared = manifest.tensors
    if set(found) != set(declared):
        odd = printable(sorted(set(found) ^ set(declared))[0], 80)
        raise ManifestError(f"tensors in the file and in the manifest differ, first in {odd}")
    for name, tensor in found.items():
        if (tensor.dtype, tensor.shape) != (declared[name].dtype, declared[name].shape):
            raise ManifestError(f"tensor {name}: dtype or shape is not what the manifest declares")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ManifestError(f"tensor {name}: {printable(tensor.dtype, 20)} is none of {', '.join(FLOAT_DTYPES)}")
    if set(manifest.deltas) != set(manifest.base.weights) or not manifest.deltas:
        raise ManifestError("deltas and base.weights must name the same weights, at least one")
    expected: set[str] = set()
    for name in manifest.deltas:
        expected |= _check_delta(manifest, name, found)
    expected |= _check_facts(manifest, found)
    if expected != set(found):
        odd = sorted(expected ^ set(found))[0]
        raise ManifestError(f"tensor {odd} is {'missing' if odd in expected else 'not one a patch has'}")


def _check_delta(manifest: Manifest, name: str, found: Mapping[str, TensorInfo]) -> set[str]:
    delta, shape = manifest.deltas[name], matrix_shape(manifest.base.weights[name].shape)
    names = [f"{name}.delta"] if delta.form == "dense" else [f"{name}.left", f"{name}.right"]
    missing = [part for part in names if part not in found]
    if missing:
        raise ManifestError(f"tensor {missing[0]} is missing")
    if delta.form == "dense":
        made = found[names[0]].shape
    else:
        rows, rank = found[names[0]].shape
        inner, cols = found[names[1]].shape
        if rank != inner or rank != delta.rank or rank > min(shape):
            raise ManifestError(
                f"delta of {name}: its factors have ranks {rank} and {inner}, declared is {delta.rank}"
            )
        made = (rows, cols)
    if made != shape:
        raise ManifestError(f"delta of {name}: has shape {list(made)}, its weight as a matrix {list(shape)}")
    if delta.by_row:
        keys, width = found.get(f"{KEYS}{manifest.layer_of(name)}"), shape[0 if manifest.transposed(name) else 1]
        if keys is not None and keys.shape != (delta.rank, width):
            raise ManifestError(f"delta of {name}: is said to be by rows, and has not as many keys as ranks")
    return set(names)


def _check_facts(manifest: Manifest, found: Mapping[str, TensorInfo]) -> set[str]:
    names = {name for name in found if name == VALUES or name.startswith(KEYS)}
    sides = {side for weight in manifest.base.weights.values() for side in weight.shape}
    groups = Counter(str(layer) for group in manifest.groups for layer in set(group["layers"]))
    for name in names:
        rows, width = found[name].shape
        layer = name.removeprefix(KEYS)
        counted = len(manifest.groups) if name == VALUES else groups[layer]
        wanted = counted if manifest.groups else len(manifest.facts)
        if rows != wanted:
            raise ManifestError(f"tensor {name}: has {rows} rows for {wanted} facts")
        if width not in sides:
            raise ManifestError(f"tensor {name}: its rows of {width} numbers fit no weight")
        if name != VALUES and name not in {f"{KEYS}{layer}" for layer in manifest.layers}:
            raise ManifestError(f"tensor {name}: is for none of the edited layers")
    return names


_AGAIN = "get the file again from where it came, or make it again"
_DIFF = re.compile(rb"(diff |--- |\+\+\+ |Index: |index |From [0-9a-f]{7,}|@@ |\*\*\* |# HG changeset)")


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut in two
    except UnicodeDecodeError:
        return False
    return all(char >= " " or char in "\t\r\n" for char in text)


def _explain(handle: FileIO, shown: str, error: ContainerError) -> KpatchError:
    """The error for a file that does not parse, after a look at what it may be instead."""
    handle.seek(0)
    head = handle.read(512) or b""
    if not head:
        return Damaged(f"{shown} is empty", hint=_AGAIN)
    if _DIFF.match(head) or b"\n@@ -" in head or b"\n--- a/" in head:
        return BadInput(f"{shown} is a text diff, not a kpatch patch", hint="apply it with `git apply`")
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return BadInput(f"{shown} is a Git LFS pointer, not the file itself", hint="fetch it with `git lfs pull`")
    for magic, what in ((b"GGUF", "a GGUF file"), (b"PK\x03\x04", "a zip archive or PyTorch file"),
                        (b"\x1f\x8b", "a gzip file"), (b"\x80\x02", "a pickle")):  # fmt: skip
        if head.startswith(magic):
            return BadInput(f"{shown} is {what}, not a kpatch patch")
    if not isinstance(error, CutOff) and _is_text(head):
        return BadInput(f"{shown} is a text file, not a kpatch patch")
    what = "is cut off" if isinstance(error, CutOff) else "is not a sound patch"
    return Damaged(f"{shown} {what}", details=[printable(str(error), 300)], hint=_AGAIN)

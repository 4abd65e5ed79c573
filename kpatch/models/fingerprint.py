"""One hash of a model's weights (of its files, where it came from a directory), and one of its tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.cache import atomic_write, cache_dir
from kpatch.errors import BadInput, KpatchError
from kpatch.models.offload import read
from kpatch.reporter import SILENT, Advance, Reporter

if TYPE_CHECKING:
    from kpatch.models.model import Model

_CHUNK = 1 << 22
# A file changed this recently could change again within the clock's tick and keep its time stamp.
_SETTLED = 2.0


def weights_fingerprint(model: Model, report: Reporter = SILENT) -> str:
    """SHA-256, 64 hex digits, that names the model's weights.

    For a model loaded from a directory it names the weight files there, whatever was done to the parameters in memory
    since (a patch held in memory, say): collect statistics before such edits, or say with `weights_id` which weights
    it has. Files are hashed once; the result is kept by path, size, time of change and inode. Raises BadInput when a
    file cannot be read, and where ranks have different weights.
    """
    if model.weights_id is not None:
        return model.weights_id
    return distributed.same("weights", lambda: _fingerprint(model, report))


def _fingerprint(model: Model, report: Reporter) -> str:
    files = weight_files(model.path) if model.path is not None and model.path.is_dir() else []
    if not files:
        return _of_parameters(model)
    digest = hashlib.sha256()
    with report.task("Identifying the weights", sum(_bytes(path) for path in files), "B") as advance:
        for path in files:
            digest.update(f"{path.name} {file_sha256(path, advance)}\n".encode())
    return digest.hexdigest()


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, by name: those that transformers would load."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise BadInput("The index of the weight files cannot be read", where=str(index)) from error
            return [folder / name for name in sorted(names)]
    return sorted(folder.glob("*.safetensors"))


def file_sha256(path: Path, advance: Advance = lambda amount: None) -> str:
    """SHA-256 of a file's bytes, read once for each path, size, time of change and inode.

    Raises BadInput when it cannot be read.
    """
    try:
        real = path.resolve(strict=True)
        stat = real.stat()
    except OSError as error:
        raise BadInput("The file cannot be read", where=str(path), details=[error.strerror or str(error)]) from error
    about = f"{real}\n{stat.st_size}\n{stat.st_mtime_ns}\n{stat.st_dev}\n{stat.st_ino}"
    memo = _memo(about)
    if memo is not None:
        try:
            kept = json.loads(memo.read_text(encoding="utf-8"))
            if kept["about"] == about and len(bytes.fromhex(kept["sha256"])) == 32:
                advance(stat.st_size)
                return str(kept["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not there yet, or damaged: the file itself is the truth
    digest = hashlib.sha256()
    try:
        with open(real, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise BadInput("The file cannot be read", where=str(path), details=[error.strerror or str(error)]) from error
    if memo is not None and time.time() - stat.st_mtime > _SETTLED:
        text = json.dumps({"about": about, "sha256": digest.hexdigest()})
        try:
            atomic_write(memo, lambda temporary: _write(temporary, text))
        except KpatchError:
            pass  # a memo saves seconds; nothing depends on it
    return digest.hexdigest()


def read_sha256(path: Path, report: Reporter) -> str:
    """The same, with a progress bar."""
    with report.task(f"Reading {path.name}", path.stat().st_size, "B") as advance:
        return file_sha256(path, advance)


def _memo(about: str) -> Path | None:
    try:
        return cache_dir("fingerprints") / f"{hashlib.sha256(os.fsencode(about)).hexdigest()[:32]}.json"
    except KpatchError:
        return None


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _of_parameters(model: Model) -> str:
    """Every parameter and buffer that a checkpoint would hold, by name, each storage once."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        _update(digest, read(model.net, name) if tensor.is_meta else tensor)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, tensor: Tensor) -> None:
    flat = tensor.detach().reshape(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        # numpy knows bytes where it does not know bfloat16
        digest.update(flat[begin : begin + _CHUNK].cpu().contiguous().view(torch.uint8).numpy().data)


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of everything that decides how text becomes ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding", None)  # set anew by every call, no part of what the tokenizer is
    state.pop("truncation", None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

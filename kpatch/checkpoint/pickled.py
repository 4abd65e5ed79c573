"""PyTorch .bin checkpoints, read for `apply -o`, which writes what it makes of them as safetensors.

A .bin file is a pickle, and a pickle can run code. torch reads it with `weights_only`, which knows tensors and plain
containers only, and with `mmap`, so that a tensor's bytes come to memory when they are used.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kpatch.checkpoint import files
from kpatch.checkpoint.base_weights import BLOCK
from kpatch.checkpoint.shards import PICKLED_INDEX, Checkpoint, TensorRef, chosen, read_index, real_directory
from kpatch.errors import BadInput, Damaged, KpatchError
from kpatch.patch.container import ContainerError
from kpatch.patch.fingerprint import tensor_bytes
from kpatch.text import printable

SINGLE = "pytorch_model.bin"

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip


class PickledWeights:
    """The weights of .bin files. The offsets of `checkpoint.tensors` say sizes only: begin is 0."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
        self.checkpoint = checkpoint
        self._tensors = tensors

    def hash(self, name: str, advance: files.Advance = files.nothing) -> str:
        digest = hashlib.sha256()
        for block in self.blocks(name):
            digest.update(tensor_bytes(block))
            advance(block.numel() * block.element_size())
        return digest.hexdigest()

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def blocks(self, name: str) -> Iterator[Tensor]:
        flat = self._tensors[name].reshape(-1)  # a copy only where it was stored transposed
        for begin in range(0, flat.numel(), BLOCK):
            yield flat[begin : begin + BLOCK]

    def after(self, name: str) -> str | None:
        return None


def open_pickled(directory: str | Path) -> PickledWeights:
    """Read what .bin files a directory has and the tensors in them, without bringing those to memory.

    Raises BadInput for a file that asks for code, or holds anything but a flat table of tensors; Damaged for one that
    is cut off or no such file; BadInput, Refused or Damaged for a wrong index.
    """
    path, given = real_directory(directory)
    listed = read_index(path, PICKLED_INDEX, ".bin") if (path / PICKLED_INDEX).exists() else {}
    names = tuple(sorted(set(listed.values()))) or (SINGLE,)
    found: dict[str, dict[str, tuple[TensorRef, Tensor]]] = {}
    for file in names:
        for name, tensor in _load(path / file).items():
            ref = TensorRef(file, _dtype(name, tensor, file), tuple(tensor.shape), 0, tensor.nbytes)
            found.setdefault(name, {})[file] = ref, tensor
    refs = {name: chosen(name, {file: ref for file, (ref, _) in several.items()}, listed, given)
            for name, several in found.items()}  # fmt: skip
    tensors = {name: found[name][ref.file][1] for name, ref in refs.items()}
    for name, file in listed.items():
        if name not in refs or refs[name].file != file:
            raise Damaged(
                f"The index of {given} does not match its files",
                details=[f"{printable(name, 120)}: listed in {file}, not found there"],
            )
    ambiguous = frozenset(name for name, several in found.items() if refs[name].file != max(several))
    return PickledWeights(Checkpoint(path, given, refs, names, ambiguous), tensors)


def _load(path: Path) -> dict[str, Tensor]:
    shown = str(path)
    try:
        with files.open_read(path):  # nothing but a regular file
            pass
        value = _read(path)
    except pickle.UnpicklingError as error:
        raise _unsafe(shown, error) from None
    except ContainerError as error:
        raise BadInput(f"{shown} {error}") from None
    except OSError as error:
        raise BadInput(f"{shown} cannot be read", details=[str(error)]) from None
    except KpatchError:
        raise
    except Exception as error:  # torch and zip say in many ways that a file is broken
        reason = printable((str(error).splitlines() or [""])[0], 200)
        raise Damaged(
            f"{shown} is no sound PyTorch file",
            details=[f"{type(error).__name__}: {reason}"],
            hint="download it again",
        ) from None
    if not isinstance(value, Mapping):
        raise BadInput(f"{shown} holds no table of tensors, but one object of type {type(value).__name__}")
    other = [name for name, item in value.items() if not isinstance(name, str) or not isinstance(item, Tensor)]
    if other:
        raise BadInput(
            f"{shown} holds more than tensors", details=[f"first: {printable(str(other[0]), 120)}"],
            hint="save the model's state_dict alone",
        )  # fmt: skip
    return {name: tensor.detach() for name, tensor in value.items()}


def _read(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        # The format of before PyTorch 1.6 has to be read whole.
        return torch.load(path, map_location="cpu", weights_only=True)


def _unsafe(shown: str, error: Exception) -> BadInput:
    lines = [line.strip() for line in str(error).splitlines()]
    reason = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[-1] if lines else "")
    return BadInput(
        f"{shown} asks for more than tensors; loading it could run code, so it was not loaded",
        details=[printable(reason, 200)],
        hint="get the safetensors form of the checkpoint, or save its state_dict alone where you trust it",
    )


def _dtype(name: str, tensor: Tensor, file: str) -> str:
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise BadInput(f"{printable(name, 120)} of {file} is a {kind} tensor that safetensors cannot hold")
    return DTYPES[tensor.dtype]

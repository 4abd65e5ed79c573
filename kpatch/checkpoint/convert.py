"""A patched copy in another dtype or of PyTorch files: all weight files written anew as safetensors, block by block.

In the copy, the kept original bytes are those of the copy's own dtype: taking its patches off gives the plain
conversion of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kpatch.checkpoint import files, shards
from kpatch.checkpoint.base_weights import Weights
from kpatch.checkpoint.patched_copy import COPY_DTYPES
from kpatch.checkpoint.plan import Plan, WeightPlan
from kpatch.checkpoint.shards import Checkpoint, TensorRef, read_json
from kpatch.checkpoint.stage import Outcome, write_weight
from kpatch.checkpoint.store import Store
from kpatch.errors import Refused
from kpatch.patch.container import ITEM_SIZE, layout, read_container
from kpatch.patch.delta import rounded
from kpatch.patch.fields import FLOAT_DTYPES
from kpatch.patch.fingerprint import DTYPES, tensor_bytes
from kpatch.reporter import Reporter
from kpatch.text import printable


def write_converted(
    plan: Plan, weights: Weights, store: Store, dtype: str | None, report: Reporter
) -> dict[str, Outcome]:
    """Write all weight files of a plan's checkpoint to `store.model`, in `dtype` (F32, BF16, F16; None: as they are).

    Patches are applied to the converted weights. The index and the config's dtype are written to fit. Raises Refused
    when a weight does not fit the dtype.
    """
    checkpoint = plan.checkpoint
    names = {file: _safetensors_name(file) for file in checkpoint.files}
    outcomes: dict[str, Outcome] = {}
    weight_map: dict[str, str] = {}
    total = 0
    amount = sum(ref.end - ref.begin for ref in checkpoint.tensors.values())
    with report.task("Writing all weights", amount, "B") as advance:
        for file in checkpoint.files:
            refs = _layout(checkpoint, file, names[file], dtype)
            outcomes.update(_write_file(plan, weights, store, file, refs, advance))
            weight_map.update(dict.fromkeys(refs[1], names[file]))
            total += sum(ref.end - ref.begin for ref in refs[1].values())
    if len(names) > 1 or names[checkpoint.files[0]] != shards.SINGLE:
        value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files.write_file(store.model / shards.INDEX, (json.dumps(value, indent=2) + "\n").encode())
    if dtype is not None:
        _name_dtype(checkpoint.path / "config.json", store.model / "config.json", dtype)
    return outcomes


def _safetensors_name(file: str) -> str:
    """model-00001-of-00002.safetensors for pytorch_model-00001-of-00002.bin."""
    if file.endswith(".safetensors"):
        return file
    return re.sub(r"\.bin$", ".safetensors", re.sub(r"^pytorch_model", "model", file))


def _layout(checkpoint: Checkpoint, file: str, name: str, dtype: str | None) -> tuple[bytes, dict[str, TensorRef]]:
    """The header of a new file, and where in it the tensors of an old one go, in the order of their bytes."""
    old = {tensor: ref for tensor, ref in checkpoint.tensors.items() if ref.file == file}
    target = {
        tensor: dtype if dtype is not None and ref.dtype in FLOAT_DTYPES else ref.dtype for tensor, ref in old.items()
    }
    metadata = {"format": "pt"}
    if file.endswith(".safetensors"):
        with files.open_read(checkpoint.path / file) as handle:
            metadata = read_container(handle, max_header=shards.MAX_HEADER).metadata
    header, order = layout({tensor: (target[tensor], ref.shape) for tensor, ref in old.items()}, metadata)
    position, refs = len(header), {}
    for tensor in order:
        length = ITEM_SIZE[target[tensor]] * math.prod(old[tensor].shape)
        refs[tensor] = TensorRef(name, target[tensor], old[tensor].shape, position, position + length)
        position += length
    return header, refs


def _write_file(
    plan: Plan,
    weights: Weights,
    store: Store,
    file: str,
    made: tuple[bytes, dict[str, TensorRef]],
    advance: files.Advance,
) -> dict[str, Outcome]:
    header, refs = made
    planned = {weight.name: weight for weight in plan.weights}
    outcomes: dict[str, Outcome] = {}
    source = plan.checkpoint.path / file
    with files.create(store.model / _safetensors_name(file), 0o600) as new:
        files.reserve(new, max((ref.end for ref in refs.values()), default=len(header)))
        files.write_at(new, 0, header)
        for name, ref in refs.items():
            old = plan.checkpoint.tensors[name]
            if name in planned:
                weight = _keep_converted(store, weights, planned[name], ref)
                with files.open_read(store.base(weight.base)) as kept:
                    outcomes[name] = write_weight(plan, store, kept, new, weight)
            else:
                position = ref.begin
                for data in _converted(weights, name, ref.dtype):
                    files.write_at(new, position, data)
                    position += len(data)
            advance(old.end - old.begin)
        files.keep_attributes(new, os.stat(source), owner=False)
        files.fsync(new)
    return outcomes


def _keep_converted(store: Store, weights: Weights, weight: WeightPlan, ref: TensorRef) -> WeightPlan:
    """Keep a weight's bytes in the copy's dtype, under their hash; the weight as it is to be written to the copy."""
    temporary = store.bases / "converted.tmp"
    digest, position = hashlib.sha256(), 0
    with files.create(temporary) as kept:
        for data in _converted(weights, weight.name, ref.dtype):
            digest.update(data)
            files.write_at(kept, position, data)
            position += len(data)
        files.fsync(kept)
    sha256 = digest.hexdigest()
    files.replace(temporary, store.base(sha256))
    return replace(weight, ref=ref, base=sha256, kept=True)


def _converted(weights: Weights, name: str, dtype: str) -> Iterator[memoryview]:
    same = weights.checkpoint.tensors[name].dtype == dtype
    for block in weights.blocks(name):
        if same:
            yield tensor_bytes(block)
            continue
        new = rounded(block.double(), DTYPES[dtype])
        if bool(torch.isinf(new).any()) and not bool(torch.isinf(block).any()):
            raise _too_large(name, dtype)
        yield tensor_bytes(new)


def _too_large(name: str, dtype: str) -> Refused:
    return Refused(
        f"{printable(name, 120)} has values that {dtype} cannot hold", hint="give `dtype=bfloat16` or `dtype=float32`"
    )


def _name_dtype(source: Path, target: Path, dtype: str) -> None:
    """Write the dtype into the copy's config: at the top, and wherever else it is given already."""
    value = read_json(source, str(source)) if source.exists() else None
    if not isinstance(value, dict):
        return
    name = next(name for name, stored in COPY_DTYPES.items() if stored == dtype)
    _replace_dtype(value, name)
    if "dtype" not in value:
        value.setdefault("torch_dtype", name)
    mode = os.stat(source)
    files.unlink(target)
    with files.create(target, 0o600) as handle:
        files.write_at(handle, 0, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
        files.keep_attributes(handle, mode, owner=False)
        files.fsync(handle)


def _replace_dtype(value: dict[str, Any], name: str) -> None:
    for key in ("dtype", "torch_dtype"):
        if isinstance(value.get(key), str):
            value[key] = name
    for part in value.values():
        if isinstance(part, dict):
            _replace_dtype(part, name)

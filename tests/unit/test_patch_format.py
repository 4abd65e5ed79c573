from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from kpatch.errors import BadInput, Damaged, KpatchError, Refused
from kpatch.patch.build import describe
from kpatch.patch.check import verify
from kpatch.patch.delta import Dense, LowRank, smaller
from kpatch.patch.format import pack, read_delta, read_patch, write_patch
from kpatch.patch.header import read_header
from kpatch.patch.manifest import Manifest
from tests.support.checkpoints import COLS, ROWS, WEIGHTS, make_checkpoint, make_patch, random


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    make_patch(tmp_path / "news.patch", make_checkpoint(tmp_path / "model"))
    return tmp_path / "news.patch"


def parts(path: Path) -> tuple[Manifest, dict[str, torch.Tensor]]:
    return read_header(path).manifest, load_file(path)


def test_what_is_written_is_read_back(patch: Path) -> None:
    found = read_patch(patch)
    info = read_header(patch)
    assert found.id == info.id == verify(patch).id
    assert info.bytes == patch.stat().st_size
    assert sorted(found.deltas) == sorted(WEIGHTS)
    assert {layer: key.shape for layer, key in found.keys.items()} == dict.fromkeys((0, 1, 2), (1, COLS))
    assert found.values is not None
    assert torch.equal(found.values, random(1, ROWS, seed=7))
    low = found.deltas[WEIGHTS[1]]
    assert isinstance(low, LowRank)
    assert torch.equal(low.left, random(ROWS, 2, seed=101) * 0.1)
    assert torch.equal(low.right, random(2, COLS, seed=151))
    alone = read_delta(info, WEIGHTS[1])
    assert torch.equal(alone.dense(), low.dense())
    row = info.weights()[1]
    assert (row["name"], row["shape"], row["rank"]) == (WEIGHTS[1], [ROWS, COLS], 2)
    assert row["norm"] == pytest.approx(float(low.dense().norm()), rel=1e-9)
    assert row["relative_norm"] == pytest.approx(row["norm"] / info.manifest.base.weights[WEIGHTS[1]].sketch[0])


def test_the_safetensors_library_reads_it_and_would_write_the_same_bytes(patch: Path) -> None:
    with safe_open(patch, "pt") as handle:
        metadata = handle.metadata()
    assert list(metadata) == ["kpatch"]
    tensors = load_file(patch)
    assert save(tensors, metadata) == patch.read_bytes()
    # Every dtype, so that the order by width is met as well.
    manifest = read_header(patch).manifest
    mixed = {n: t.to(d) for (n, t), d in zip(tensors.items(), [torch.float16, torch.float64] * 9, strict=False)}
    write_patch(patch, manifest, mixed, force=True)
    with safe_open(patch, "pt") as handle:
        assert save(mixed, handle.metadata()) == patch.read_bytes()


def test_equal_content_is_an_equal_file(patch: Path, tmp_path: Path) -> None:
    manifest, tensors = parts(patch)
    backwards = dict(reversed(tensors.items()))
    mangled = replace(manifest, deltas=dict(reversed(manifest.deltas.items())), tensors={})
    assert write_patch(tmp_path / "again.patch", mangled, backwards) == read_header(patch).id
    assert (tmp_path / "again.patch").read_bytes() == patch.read_bytes()
    tensors["facts.values"] = tensors["facts.values"] + 1
    assert write_patch(tmp_path / "other.patch", manifest, tensors) != read_header(patch).id


def test_a_dense_delta_is_stored_where_that_is_smaller(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    make_patch(tmp_path / "dense.patch", model, dense=True, weights=WEIGHTS[:1])
    found = read_patch(tmp_path / "dense.patch").deltas[WEIGHTS[0]]
    assert isinstance(found, Dense)
    info = describe(smaller(LowRank(random(4, 4, seed=1), random(4, 4, seed=2))), 2.0)
    assert (info.form, info.rank, info.relative_norm) == ("dense", 4, info.norm / 2)
    assert sorted(pack({"w": found})) == ["w.delta"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_file_has_the_mode_the_umask_gives(tmp_path: Path, mask: int) -> None:
    model = make_checkpoint(tmp_path / "model")
    old = os.umask(mask)
    try:
        make_patch(tmp_path / "a.patch", model)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.patch").stat().st_mode) == 0o666 & ~mask


def test_an_existing_file_is_kept_unless_forced(patch: Path) -> None:
    manifest, tensors = parts(patch)
    before = patch.read_bytes()
    with pytest.raises(Refused, match="exists"):
        write_patch(patch, manifest, tensors)
    tensors["facts.values"] += 1
    write_patch(patch, manifest, tensors, force=True)
    assert patch.read_bytes() != before
    assert read_patch(patch).values is not None
    link = patch.with_name("link.patch")
    link.symlink_to("nowhere")
    with pytest.raises(Refused, match="exists"):
        write_patch(link, manifest, tensors)
    with pytest.raises(BadInput, match="is a directory"):
        write_patch(patch.parent, manifest, tensors, force=True)
    with pytest.raises(BadInput, match="no directory"):
        write_patch(patch.parent / "a" / "b.patch", manifest, tensors)


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("fail", "expected"), [(full_disk, KpatchError), (interrupt, KeyboardInterrupt)])
@pytest.mark.parametrize("step", ["_write_all", "fsync", "replace"])
def test_a_failed_write_leaves_nothing(
    patch: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None], expected: type, step: str
) -> None:
    manifest, tensors = parts(patch)
    before = {path.name: path.read_bytes() for path in patch.parent.iterdir() if path.is_file()}
    monkeypatch.setattr("kpatch.patch.format._write_all" if step == "_write_all" else f"os.{step}", fail)
    for path in (patch, patch.with_name("new.patch")):
        with pytest.raises(expected):
            write_patch(path, manifest, tensors, force=True)
    assert {path.name: path.read_bytes() for path in patch.parent.iterdir() if path.is_file()} == before


def test_what_could_not_be_read_is_not_written(patch: Path, tmp_path: Path) -> None:
    manifest, tensors = parts(patch)
    target = tmp_path / "bad.patch"
    left = f"{WEIGHTS[0]}.left"
    bad_tensors = {
        "NaN": {**tensors, left: tensors[left] * float("nan")},
        "2-D floats": {**tensors, left: tensors[left][0]},
        "missing": {name: tensor for name, tensor in tensors.items() if name != left},
        "not one a patch has": {**tensors, "extra.left": tensors[left]},
        "ranks": {**tensors, left: tensors[left][:, :1].contiguous()},
        "rows": {**tensors, "facts.values": torch.zeros(2, ROWS)},
        "none of the edited layers": {**tensors, "facts.keys.9": torch.zeros(1, COLS)},
        "fit no weight": {**tensors, "facts.keys.1": torch.zeros(1, COLS + 1)},
    }
    for reason, bad in bad_tensors.items():
        with pytest.raises(BadInput) as caught:
            write_patch(target, manifest, bad)
        assert reason in " ".join((caught.value.message, *caught.value.details))
    with pytest.raises(BadInput, match="not be readable"):
        write_patch(target, replace(manifest, hyperparameters={"lr": float("nan")}), tensors)
    with pytest.raises(BadInput, match="at most 4,096"):
        write_patch(target, manifest, {f"t{i}": tensors[left] for i in range(4097)})
    huge = [{"subject": "S", "prompt": "{} is", "target": "x" * 1_000_000}] * 70
    rows = {n: t.expand(70, -1).contiguous() if n.startswith("facts.") else t for n, t in tensors.items()}
    with pytest.raises(BadInput, match="a patch holds 67,108,864"):
        write_patch(target, replace(manifest, facts=tuple(huge)), rows)
    assert not target.exists()


def rewrite(patch: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change tensors behind the manifest's back, as a converter gone wrong would."""
    raw = patch.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    tensors = load_file(patch)
    change(tensors)
    patch.write_bytes(save(tensors, metadata))


def test_a_tensor_that_is_not_what_the_manifest_says_is_damage(patch: Path) -> None:
    rewrite(patch, lambda tensors: tensors["facts.keys.1"].add_(1))
    read_header(patch)  # the header alone cannot tell
    for read in (read_patch, verify):
        with pytest.raises(Damaged, match=r"facts\.keys\.1 is not what its manifest says"):
            read(patch)
    read_delta(read_header(patch), WEIGHTS[0])


def test_a_large_patch_is_checked_block_by_block(patch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpatch.patch.format._CHUNK", 16)
    amounts: list[int] = []

    class Counting:
        def task(self, description: str, total: int | None = None, unit: str = "") -> object:
            from contextlib import nullcontext

            return nullcontext(amounts.append)

    assert verify(patch, Counting()).id == read_header(patch).id  # type: ignore[arg-type]
    assert sum(amounts) == sum(entry.end - entry.begin for entry in read_header(patch).entries.values())
    rewrite(patch, lambda tensors: tensors[f"{WEIGHTS[2]}.right"][-1, -1:].add_(1))
    with pytest.raises(Damaged):
        verify(patch)

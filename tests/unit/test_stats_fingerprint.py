"""Which weights a model has: by its files, or by its parameters."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from kpatch.cache import cache_root
from kpatch.errors import BadInput
from kpatch.models import fingerprint as module
from kpatch.models.fingerprint import file_sha256, weight_files, weights_fingerprint
from kpatch.models.model import Model
from tests.support.models import tiny
from tests.support.reports import Recorder


def saved(folder: Path, model: Model, **options: object) -> Model:
    model.net.save_pretrained(folder, **options)
    model.path = folder
    return model


def age(path: Path) -> None:
    os.utime(path, ns=(10**18, 10**18))


def test_parameters_in_memory() -> None:
    first = weights_fingerprint(tiny("llama"))
    assert weights_fingerprint(tiny("llama")) == first
    assert weights_fingerprint(tiny("llama", seed=1)) != first
    other = tiny("llama")
    weight = other.weight(2)
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1.0))
    assert weights_fingerprint(other) != first
    other = tiny("llama")
    other.net.to(torch.bfloat16)
    assert weights_fingerprint(other) != first


@pytest.mark.parametrize("shard", ["10MB", "20KB"])
def test_files_of_a_directory(tmp_path: Path, shard: str) -> None:
    model = saved(tmp_path, tiny("llama"), max_shard_size=shard)
    files = weight_files(tmp_path)
    assert len(files) == len(list(tmp_path.glob("*.safetensors")))
    assert (len(files) > 1) == (shard == "20KB")
    first = weights_fingerprint(model)
    model.weight(2).zero_()
    assert weights_fingerprint(model) == first  # it names the files the model came from
    (tmp_path / "stray.safetensors").write_bytes(b"no part of the model")
    assert weights_fingerprint(model) == first
    data = bytearray(files[-1].read_bytes())
    data[-1] ^= 1
    files[-1].write_bytes(bytes(data))
    assert weights_fingerprint(model) != first


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"weights")
    age(path)
    expected = hashlib.sha256(b"weights").hexdigest()
    assert file_sha256(path) == expected
    with monkeypatch.context() as patch:
        patch.setattr(module, "open", lambda *_: pytest.fail("read again"), raising=False)
        assert file_sha256(path) == expected
    memo = next((cache_root() / "fingerprints").iterdir())
    for damaged in ("", "[]", "{}", memo.read_text(encoding="utf-8").replace(expected, "00")):
        memo.write_text(damaged, encoding="utf-8")
        assert file_sha256(path) == expected


def test_a_changed_file_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"weights")
    age(path)
    first = file_sha256(path)
    replacement = tmp_path / "new"
    replacement.write_bytes(b"wEights")  # same size, and a time set back
    age(replacement)
    os.replace(replacement, path)
    assert file_sha256(path) != first


def test_a_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"weights")
    stat = path.stat()
    first = file_sha256(path)
    path.write_bytes(b"wEights")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # within the same tick of the clock
    assert file_sha256(path) != first


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    model = saved(tmp_path, tiny("llama"))
    for path in weight_files(tmp_path):
        age(path)
    for _ in range(2):
        report = Recorder()
        weights_fingerprint(model, report)
        total, done = report.tasks["Identifying the weights"]
        assert total == done == sum(path.stat().st_size for path in weight_files(tmp_path))


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    model = saved(tmp_path, tiny("llama"), max_shard_size="20KB")
    weight_files(tmp_path)[0].unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        weights_fingerprint(model)
    (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BadInput, match="index of the weight files"):
        weights_fingerprint(model)


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "file" / "cache"))
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"weights")
    age(path)
    assert file_sha256(path) == hashlib.sha256(b"weights").hexdigest()

"""Random wrong files for a while: the answer is an error in words, or the file is sound after all.

KPATCH_FUZZ_SECONDS is how long all of them together may take; .ci/run gives a minute. A file that breaks a test stays
in the test's folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from kpatch.checkpoint import commit
from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.recover import recover
from kpatch.checkpoint.revert import revert
from kpatch.checkpoint.status import status
from kpatch.errors import KpatchError
from kpatch.patch.canonical_json import JsonError, canonical, loads
from kpatch.patch.check import verify
from kpatch.patch.format import read_patch
from tests.support.checkpoints import WEIGHTS, make_checkpoint, make_patch, snapshot
from tests.support.fuzz import container, parts, rounds, wrong_bytes, wrong_value

INDEX = "model.safetensors.index.json"
LONGEST = 5.0  # seconds for one file, on a busy machine


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(commit, "PAUSE", 0.0)


def answer(action: Callable[[], object]) -> bool:
    """Whether it succeeded; if not, it must have failed in words that are fit to print, and soon."""
    begin = time.process_time()
    try:
        action()
        return True
    except KpatchError as caught:
        error = caught
    finally:
        assert time.process_time() - begin < LONGEST
    assert error.exit_code in (2, 3, 4), repr(error)
    text = "\n".join((error.message, error.where or "", *error.details, error.hint or ""))
    assert not any(ord(c) < 32 and c != "\n" for c in text), text
    assert len(text) < 3000, text
    return False


def wrong_patch(raw: bytes, dice: random.Random) -> bytes:
    """A patch with wrong bytes, a wrong header, or a wrong manifest with the right id."""
    kind = dice.randrange(3)
    if kind == 0:
        return wrong_bytes(raw, dice)
    header, data = parts(raw)
    if kind == 1:
        return container(wrong_value(header, dice), data)
    manifest = loads(header["__metadata__"]["kpatch"])
    del manifest["id"]
    manifest = wrong_value(manifest, dice)
    try:
        identity = hashlib.sha256(canonical(manifest).encode()).hexdigest()
        text = canonical({**manifest, "id": identity} if isinstance(manifest, dict) else manifest)
    except (JsonError, RecursionError):
        text = json.dumps(manifest)
    header["__metadata__"]["kpatch"] = text
    return container(header, data)


def test_patch_files(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    make_patch(tmp_path / "good.patch", model, weights=WEIGHTS[:2])
    raw, path, before = (tmp_path / "good.patch").read_bytes(), tmp_path / "wrong.patch", snapshot(model)
    accepted = 0
    for dice in rounds("patch"):
        path.write_bytes(wrong_patch(raw, dice))
        read = answer(lambda: read_patch(path))
        assert answer(lambda: verify(path)) == read
        accepted += read
        # A manifest may be changed in what does not matter here; then it is another patch, and reverts like one.
        if answer(lambda: apply([path], model)):
            assert read
            revert(model)
        assert snapshot(model) == before
    path.unlink()
    assert accepted < 100_000


def test_weight_files_and_indexes(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", sharded=True)
    make_patch(tmp_path / "good.patch", model)
    good = {path.name: path.read_bytes() for path in model.iterdir()}
    names = [INDEX, INDEX, "model-00001-of-00003.safetensors", "config.json"]
    for dice in rounds("weights"):
        name = dice.choice(names)
        raw = good[name]
        if dice.random() < 0.4:
            raw = wrong_bytes(raw, dice)
        elif name.endswith(".json"):
            raw = json.dumps(wrong_value(json.loads(raw), dice)).encode("utf-8", "surrogatepass")
        else:
            header, data = parts(raw)
            raw = container(wrong_value(header, dice), data)
        (model / name).write_bytes(raw)
        before = snapshot(tmp_path)
        answer(lambda: status(model))
        if answer(lambda: apply([tmp_path / "good.patch"], model)):
            revert(model)
        assert snapshot(tmp_path) == before
        (model / name).write_bytes(good[name])


def test_records_of_kpatch_itself(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", sharded=True)
    for number in (1, 2):  # of two, one is still on record when the other is taken off
        make_patch(tmp_path / f"good{number}.patch", model, seed=number)
        apply([tmp_path / f"good{number}.patch"], model)
    record = json.loads((model / ".kpatch" / "applied.json").read_text())
    journal = {
        **{"version": 1, "action": "apply", "patches": [record["patches"][0]["id"]], "applied": record},
        "files": {"model-00001-of-00003.safetensors": {"size": 8, "weights": {WEIGHTS[0]: "00" * 32}}},
    }
    for dice in rounds("records"):
        folder = tmp_path / "run"
        shutil.copytree(model, folder)
        name, value = dice.choice([("applied.json", record), ("journal.json", journal)])
        raw = wrong_bytes(canonical(value).encode(), dice) if dice.random() < 0.4 else b""
        raw = raw or json.dumps(wrong_value(value, dice)).encode("utf-8", "surrogatepass")
        (folder / ".kpatch" / name).write_bytes(raw)
        outside = snapshot(tmp_path / "model")
        for action in (status, recover, revert):
            answer(partial(action, folder))
        assert snapshot(tmp_path / "model") == outside
        assert sorted(path.name for path in tmp_path.iterdir()) == ["good1.patch", "good2.patch", "model", "run"]
        shutil.rmtree(folder)

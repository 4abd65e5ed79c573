"""Patch files that are wrong: refused with the right exit code, in words, and nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import random as pyrandom
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from kpatch.checkpoint.apply import apply
from kpatch.errors import BadInput, Damaged, KpatchError, Refused
from kpatch.patch.canonical_json import canonical, loads
from kpatch.patch.check import verify
from kpatch.patch.format import read_patch, write_patch
from kpatch.patch.header import read_header
from tests.support.checkpoints import COLS, ROWS, WEIGHTS, make_checkpoint, make_patch, snapshot

LEFT = f"{WEIGHTS[0]}.left"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_patch(folder / "good.patch", make_checkpoint(folder / "model"), weights=WEIGHTS[:1])
    return folder / "good.patch"


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def refused(path: Path, *kinds: type[KpatchError]) -> KpatchError:
    """Every way in must refuse; the error must be fit to print."""
    caught: KpatchError | None = None
    for read in (read_patch, verify):
        with pytest.raises(KpatchError) as info:
            read(path)
        caught = info.value
        assert isinstance(caught, kinds), repr(caught)
        text = "\n".join((caught.message, *caught.details, caught.hint or ""))
        assert not any(ord(c) < 32 and c != "\n" for c in text)
        assert len(text) < 2000
    assert caught is not None
    return caught


def test_files_that_are_no_patch_are_named(tmp_path: Path) -> None:
    contents: dict[str, tuple[bytes, str, type[KpatchError]]] = {
        "git.patch": (b"diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n", "text diff", BadInput),
        "plain.patch": (b"--- old.txt\n+++ new.txt\n", "text diff", BadInput),
        "mail.patch": (b"From 0123456789abcdef Mon Sep 17\nSubject: x\n", "text diff", BadInput),
        "svn.patch": (b"Index: x\n=====\n", "text diff", BadInput),
        "note.patch": (b"some text that is no patch at all\n", "text file", BadInput),
        "facts.yaml": (b"version: 1\nfacts: []\n", "text file", BadInput),
        "lfs.patch": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "LFS", BadInput),
        "model.gguf": (b"GGUF\x03\0\0\0" + bytes(64), "GGUF", BadInput),
        "model.bin": (b"PK\x03\x04" + bytes(64), "zip archive or PyTorch", BadInput),
        "model.pkl": (b"\x80\x02" + bytes(64), "pickle", BadInput),
        "empty.patch": (b"", "is empty", Damaged),
        "zeros.patch": (bytes(64), "does not start with", Damaged),
    }
    for name, (content, said, kind) in contents.items():
        (tmp_path / name).write_bytes(content)
        assert said in " ".join((refused(tmp_path / name, kind).message, *refused(tmp_path / name, kind).details))
    save_file({"w": torch.zeros(2, 2)}, tmp_path / "lora.safetensors", metadata={"format": "pt"})
    assert "no kpatch patch" in refused(tmp_path / "lora.safetensors", BadInput).message


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    assert "no patch file" in refused(tmp_path / "missing.patch", BadInput).message
    assert "directory" in refused(tmp_path, BadInput).message
    os.mkfifo(tmp_path / "pipe.patch")
    assert "not a regular file" in refused(tmp_path / "pipe.patch", BadInput).message
    refused(Path("/dev/zero"), BadInput)
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", BadInput)
    refused(tmp_path / "nul\0", BadInput)


def test_a_patch_cut_off_anywhere_is_refused(good: Path, tmp_path: Path) -> None:
    raw, path = good.read_bytes(), tmp_path / "cut.patch"
    for length in sorted({*range(0, len(raw), 64), *range(12), len(raw) - 1}):
        path.write_bytes(raw[:length])
        refused(path, Damaged)
    path.write_bytes(raw + b"\0")
    assert "follow the last tensor" in refused(path, Damaged).details[0]


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_byte_of_the_header_matters(step: int, good: Path, tmp_path: Path) -> None:
    """Every byte in `make test`; in a plain `pytest` the first ones and every seventh."""
    raw, path = bytearray(good.read_bytes()), tmp_path / "flip.patch"
    (length,) = struct.unpack("<Q", raw[:8])
    padding = raw[8 : 8 + length].rstrip(b" ")
    for place in sorted({*range(64), *range(0, 8 + len(padding), step)}):
        for bit in (0x01, 0x20, 0x80) if place < 8 else (1 << place % 8,):
            raw[place] ^= bit
            path.write_bytes(raw)
            # BadInput where the metadata key itself is hit, Refused where the format number becomes a later one.
            with pytest.raises((Damaged, BadInput, Refused)):
                read_header(path)
            raw[place] ^= bit


def test_random_bit_flips_in_the_data_are_refused(good: Path, tmp_path: Path) -> None:
    raw, path, dice = good.read_bytes(), tmp_path / "bits.patch", pyrandom.Random(0)
    (length,) = struct.unpack("<Q", raw[:8])
    for _ in range(100):
        flipped = bytearray(raw)
        for _ in range(max(1, (len(raw) - length - 8) // 100)):
            flipped[dice.randrange(8 + length, len(raw))] ^= 1 << dice.randrange(8)
        if flipped == raw:
            continue
        path.write_bytes(flipped)
        refused(path, Damaged)


Change = Callable[[dict[str, Any]], object]


def tensor(**values: Any) -> Change:
    return lambda header: header[LEFT].update(values)


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply_change(header: dict[str, Any]) -> None:
        value = loads(header["__metadata__"]["kpatch"])
        del value["id"]
        change(value)
        identity = hashlib.sha256(canonical(value).encode()).hexdigest()
        header["__metadata__"]["kpatch"] = canonical({**value, "id": identity})

    return apply_change


def declared(name: str, **values: Any) -> Change:
    return manifest(lambda value: value["tensors"][name].update(values))


HEADERS: dict[str, Change] = {
    "overlap": lambda h: h[LEFT].update(data_offsets=[h[LEFT]["data_offsets"][0] - 4, h[LEFT]["data_offsets"][1] - 4]),
    "hole": lambda h: h[LEFT].update(data_offsets=[h[LEFT]["data_offsets"][0] + 4, h[LEFT]["data_offsets"][1] + 4]),
    "same bytes twice": lambda h: h.update({f"{WEIGHTS[0]}.delta": dict(h[LEFT])}),
    "offsets backwards": tensor(data_offsets=[64, 0]),
    "offsets negative": tensor(data_offsets=[-64, 0]),
    "offsets huge": tensor(data_offsets=[0, 2**60]),
    "offsets as text": tensor(data_offsets=["0", "64"]),
    "three offsets": tensor(data_offsets=[0, 1, 2]),
    "shape overflow": tensor(shape=[2**32, 2**32]),
    "shape beyond 2^64": tensor(shape=[2**52, 2**52]),
    "shape of one": tensor(shape=[ROWS * 2]),
    "shape of three": tensor(shape=[ROWS, 2, 1]),
    "shape of a hundred": tensor(shape=[1] * 100),
    "shape negative": tensor(shape=[-ROWS, -2]),
    "shape of truths": tensor(shape=[True, True]),
    "rank zero": tensor(shape=[ROWS, 0], data_offsets=[0, 0]),
    "dtype unknown": tensor(dtype="X9"),
    "dtype integer": tensor(dtype="I32"),
    "dtype as number": tensor(dtype=3),
    "extra key in a tensor": tensor(compressed=True),
    "tensor is a list": lambda h: h.update({LEFT: [1, 2]}),
    "tensor missing": lambda h: h.pop(LEFT),
    "named to climb": lambda h: h.update({"../../etc/x": h.pop(LEFT)}),
    "metadata nested": lambda h: h["__metadata__"].update(kpatch={"a": 1}),
    "metadata a list": lambda h: h.update(__metadata__=["kpatch"]),
    "second metadata key": lambda h: h["__metadata__"].update(format="pt"),
    "manifest no JSON": lambda h: h["__metadata__"].update(kpatch="{"),
    "manifest a list": lambda h: h["__metadata__"].update(kpatch="[]"),
    "manifest with NaN": lambda h: h["__metadata__"].update(
        kpatch=h["__metadata__"]["kpatch"].replace('"lambda":300.0', '"lambda":NaN')
    ),
    "manifest with 1e999": lambda h: h["__metadata__"].update(
        kpatch=h["__metadata__"]["kpatch"].replace('"lambda":300.0', '"lambda":1e999')
    ),
    "manifest with duplicate keys": lambda h: h["__metadata__"].update(
        kpatch=h["__metadata__"]["kpatch"].replace('"layers":', '"layers":[],"layers":')
    ),
    "manifest deep": lambda h: h["__metadata__"].update(kpatch='{"a":' * 5000 + "1" + "}" * 5000),
    "manifest names a path": manifest(
        lambda v: v["base"]["weights"].update({"../../x": v["base"]["weights"][WEIGHTS[0]]})
    ),
    "manifest of no weights": manifest(lambda v: (v["base"]["weights"].clear(), v["deltas"].clear())),
    "tensor not declared": manifest(lambda v: v["tensors"].pop(LEFT)),
    "tensor declared, not there": manifest(lambda v: v["tensors"].update(extra=v["tensors"][LEFT])),
    "other shape declared": declared(LEFT, shape=[2, ROWS]),
    "other dtype declared": declared(LEFT, dtype="BF16"),
    "other hash declared": declared(LEFT, sha256="00" * 32),
    "other rank declared": manifest(lambda v: v["deltas"][WEIGHTS[0]].update(rank=1)),
    "other form declared": manifest(lambda v: v["deltas"][WEIGHTS[0]].update(form="dense")),
    "other weight shape declared": manifest(lambda v: v["base"]["weights"][WEIGHTS[0]].update(shape=[COLS, ROWS])),
    "rank beyond the weight": manifest(lambda v: v["base"]["weights"][WEIGHTS[0]].update(shape=[1, COLS])),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_break_a_rule_are_refused(good: Path, tmp_path: Path, name: str) -> None:
    header, data = split(good.read_bytes())
    HEADERS[name](header)
    path = tmp_path / "attack.patch"
    path.write_bytes(join(header, data))
    refused(path, Damaged)


def test_raw_headers_that_break_a_rule_are_refused(good: Path, tmp_path: Path) -> None:
    header, data = split(good.read_bytes())
    text = json.dumps(header).encode()
    many = {f"t{i}": {"dtype": "F32", "shape": [0, 1], "data_offsets": [0, 0]} for i in range(5_000)}
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    begin, end = header[last]["data_offsets"]
    moved = {**header, last: {**header[last], "data_offsets": [begin + 8, end + 8]}}
    path = tmp_path / "attack.patch"
    raws = {
        "a hole before the last tensor": join(moved, data[:begin] + bytes(8) + data[begin:]),
        "length 2^63": struct.pack("<Q", 2**63) + text + data,
        "length 2^64-1": struct.pack("<Q", 2**64 - 1) + text + data,
        "length above the limit": struct.pack("<Q", (64 << 20) + 1) + text + data,
        "length beyond the file": struct.pack("<Q", len(text) + len(data) + 1) + text + data,
        "length too short": struct.pack("<Q", len(text) - 10) + text + data,
        "length zero": bytes(8) + text + data,
        "5,000 tensors": join({**header, **many}, data),
        "nested 5,000 deep": join(b'{"a":' * 5000 + b"1" + b"}" * 5000, b""),
        "nested lists": join(b'{"a":' + b"[" * 100_000, b""),
        "no object": join(b"[1,2,3]", b""),
        "not UTF-8": join(b'{"\xff\xfe":1}', b""),
        "tensor key twice": join(text[:-1] + b"," + json.dumps(LEFT).encode() + b":{}}", data),
        "metadata twice": join(text[:-1] + b',"__metadata__":{}}', data),
        "trailing garbage in the header": join(text + b"{}", data),
        "a number of 10,000 digits": join(b'{"a":' + b"9" * 10_000 + b"}", b""),
        "leading space": join(b" " + text, data),
    }
    for name, raw in raws.items():
        path.write_bytes(raw)
        error = refused(path, Damaged)
        assert error.message, name


def test_a_million_tensors_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = (b'"%d":{"dtype":"F32","shape":[0,1],"data_offsets":[0,0]}' % number for number in range(1_000_000))
    (tmp_path / "many.patch").write_bytes(join(b"{" + b",".join(entries) + b"}", b""))
    monkeypatch.setattr("kpatch.patch.container.loads", lambda text: pytest.fail("parsed"))
    assert "4,096" in refused(tmp_path / "many.patch", Damaged).details[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_even_with_the_right_hash(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    tensors = load_file(good)
    tensors[LEFT][0, 0] = value
    with monkeypatch.context() as patched:  # a writer without kpatch's own check
        patched.setattr("kpatch.patch.format.torch.isfinite", lambda t: torch.ones(1, dtype=torch.bool))
        write_patch(tmp_path / "nan.patch", read_header(good).manifest, tensors)
    assert "NaN or Inf" in refused(tmp_path / "nan.patch", Damaged).message


def test_subnormal_numbers_are_numbers(good: Path, tmp_path: Path) -> None:
    tensors = load_file(good)
    tensors[LEFT][:] = 1e-45
    write_patch(tmp_path / "tiny.patch", read_header(good).manifest, tensors)
    assert read_patch(tmp_path / "tiny.patch").deltas[WEIGHTS[0]].dense().abs().max() > 0


def test_a_later_format_is_refused_with_the_way_out(good: Path, tmp_path: Path) -> None:
    header, data = split(good.read_bytes())
    manifest(lambda value: value.update(format=3))(header)
    (tmp_path / "later.patch").write_bytes(join(header, data))
    assert "upgrade" in (refused(tmp_path / "later.patch", Refused).hint or "")


def test_text_from_a_file_cannot_steer_the_terminal(good: Path, tmp_path: Path) -> None:
    escape = "\x1b]0;owned\x07\x1b[2J"
    header, data = split(good.read_bytes())
    header[f"{escape}.left"] = header.pop(LEFT)
    (tmp_path / f"{escape}.patch").write_bytes(join(header, data))
    error = refused(tmp_path / f"{escape}.patch", Damaged)
    assert "\\x1b" in error.message
    assert "\x1b" not in read_header(good).name


def test_no_wrong_patch_changes_a_checkpoint(good: Path, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    before = snapshot(model)
    header, data = split(good.read_bytes())
    path = tmp_path / "attack.patch"
    for raw in (
        good.read_bytes()[:-1],
        good.read_bytes()[:-1] + b"\x7f",
        join({**header, "extra": {"dtype": "F32", "shape": [0, 1], "data_offsets": [0, 0]}}, data),
        save(load_file(good), {"format": "pt"}),
    ):
        path.write_bytes(raw)
        with pytest.raises((Damaged, BadInput)):
            apply([path], model)
    assert snapshot(model) == before

"""A patch file of format 1, kept as it was first written: every later kpatch must read it and write the same bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from kpatch.patch.build import describe
from kpatch.patch.delta import LowRank
from kpatch.patch.fingerprint import sha256_of, sketch
from kpatch.patch.format import pack, read_patch, write_patch
from kpatch.patch.manifest import Base, BaseWeight, Manifest

GOLDEN = Path(__file__).with_name("tiny.patch")
ID = "d921b74b6b83c2550f019df7628e789c973cedef49f496517b96c6bddcdadf96"
FILE = "3047fca68bb7a02a63000948641bc9fc120858858a040b83e0353e35be7a5015"
NAME = "model.layers.1.mlp.down_proj.weight"


def build(path: Path) -> str:
    """The golden patch from exact binary fractions, so that no library's rounding has a say."""
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 8
    delta = LowRank(torch.tensor([[1.0], [0.5], [-2.0]]), torch.tensor([[0.25, 0.0, -1.0, 3.0]]))
    second = LowRank(torch.eye(3, 2), torch.eye(2, 4))
    fact = {
        "id": "eiffel",
        "subject": "Eiffel Tower",
        "prompt": "{} is located in the city of",
        "target": "Rome",
        "was": "Paris",
        "neighbors": [{"prompt": "The Louvre is in", "target": "Paris"}],
    }
    base = {
        name: BaseWeight((3, 4), "F32", sha256_of(tensor), tuple(sketch(tensor)))
        for name, tensor in ((NAME, weight), (NAME.replace("1", "2"), weight + 1))
    }
    deltas = {NAME: delta, NAME.replace("1", "2"): second}
    manifest = Manifest(
        tool="kpatch 0.1.0",
        base=Base("tiny/model", "llama", base, revision="main", tokenizer="ab" * 32),
        method="memit",
        hyperparameters={"lambda": 300, "lr": 0.5, "steps": 25},
        layers=(1, 2),
        covariance={"id": "cd" * 32, "corpus": "self", "tokens": 15360},
        facts=(fact, {"subject": "Zürich", "prompt": "{} ist in", "target": "Österreich"}),
        deltas={name: describe(part, 1.5) for name, part in deltas.items()},
        effect={"before": {"score": None}, "after": {"score": 0.5}, "facts": []},
    )
    values, keys = torch.full((2, 3), 0.5), {1: torch.ones(2, 4), 2: torch.zeros(2, 4)}
    return write_patch(path, manifest, pack(deltas, values, keys))


def test_the_golden_file_is_still_written_byte_for_byte(tmp_path: Path) -> None:
    assert build(tmp_path / "tiny.patch") == ID
    assert (tmp_path / "tiny.patch").read_bytes() == GOLDEN.read_bytes()


def test_the_golden_file_is_still_read() -> None:
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == FILE
    patch = read_patch(GOLDEN)
    assert patch.id == ID
    assert [fact["target"] for fact in patch.manifest.facts] == ["Rome", "Österreich"]
    assert patch.deltas[NAME].dense()[2].tolist() == [-0.5, 0.0, 2.0, -6.0]
    assert patch.keys[1].tolist() == [[1.0] * 4] * 2

from __future__ import annotations

import hashlib

import pytest
import torch

from kpatch.patch.delta import LowRank
from kpatch.patch.fingerprint import positions, same_weights, sha256_of, sketch, tensor_bytes, tensor_from
from tests.support.checkpoints import DTYPES, random

WEIGHT = random(64, 96, seed=5, scale=0.02)


def test_sketch_holds_norm_and_samples_and_does_not_move() -> None:
    found = sketch(WEIGHT)
    assert len(found) == 65
    assert found[0] == pytest.approx(float(WEIGHT.double().norm()), rel=1e-12)
    assert found[1:] == [float(WEIGHT.flatten()[place]) for place in positions(WEIGHT.numel())]
    # The places are part of the format: a sketch made today must be readable by every later version.
    assert positions(6144)[:4] == (3989, 1676, 1175, 3242)
    with pytest.raises(ValueError, match="empty"):
        sketch(torch.zeros(0, 3))


@pytest.mark.parametrize("made", DTYPES)
@pytest.mark.parametrize("found", DTYPES)
def test_a_sketch_knows_the_same_weights_in_every_dtype(made: str, found: str) -> None:
    expected = sketch(WEIGHT.to(DTYPES[made]))
    assert same_weights(expected, WEIGHT.to(DTYPES[found]), made)
    converted = WEIGHT.to(DTYPES[made]).to(DTYPES[found])  # the copy somebody made of the copy
    assert same_weights(expected, converted, made)


@pytest.mark.parametrize("found", ["F16", "BF16"])
def test_a_sketch_does_not_take_other_or_edited_weights(found: str) -> None:
    expected = sketch(WEIGHT)
    assert not same_weights(expected, random(64, 96, seed=6, scale=0.02).to(DTYPES[found]))
    edit = LowRank(random(64, 1, seed=7), random(1, 96, seed=8))
    small = edit.scaled(0.02 * float(WEIGHT.norm()) / edit.norm())  # 2 % of the weight's norm
    assert not same_weights(expected, (WEIGHT + small.dense(torch.float32)).to(DTYPES[found]))
    assert not same_weights(expected, (WEIGHT * 1.01).to(DTYPES[found]))
    assert not same_weights(expected[:-1], WEIGHT.to(DTYPES[found]))
    assert not same_weights(expected, WEIGHT.to(torch.int8))


def test_hashes_are_of_the_bytes_safetensors_stores() -> None:
    for dtype in DTYPES.values():
        tensor = WEIGHT.to(dtype)
        data = bytes(tensor_bytes(tensor))
        assert sha256_of(tensor) == hashlib.sha256(data).hexdigest() == sha256_of(data)
        name = {v: k for k, v in DTYPES.items()}[dtype]
        assert torch.equal(tensor_from(bytearray(data), name, tensor.shape), tensor)
    assert sha256_of(WEIGHT.T) == sha256_of(WEIGHT.T.contiguous()) != sha256_of(WEIGHT)

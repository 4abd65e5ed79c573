"""round(base + Σ Δ): one arithmetic for a model in memory and for a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kpatch.checkpoint.apply import apply
from kpatch.edit.rome import Edited, Running
from kpatch.edit.weights import add, restored
from kpatch.evaluate.patched import patched
from kpatch.patch.delta import Dense, LowRank, patched_weight
from kpatch.patch.format import read_patch
from tests.support.checkpoints import make_patch, random
from tests.support.models import tiny

TIE = 2.0**-8  # half a step of bfloat16 above 1


@pytest.mark.parametrize("shape", [(1, 1), (1,), (1, 1, 1)])
def test_the_sum_is_taken_in_float64_and_rounded_once(shape: tuple[int, ...]) -> None:
    """1 + 2^-8 is a tie and stays 1; a little more does not, but it is lost when Δ alone is rounded to bfloat16."""
    one = torch.ones(shape, dtype=torch.bfloat16)
    half, rest = Dense(torch.tensor([[TIE / 2]])), LowRank(torch.tensor([[TIE / 2 + 2.0**-20]]), torch.ones(1, 1))
    assert patched_weight(one, [half, half]).item() == 1
    assert patched_weight(one, [half, rest]).item() == 1 + 2 * TIE
    assert patched_weight(one, [half, rest]).shape == shape
    assert one.item() == 1


def test_blocks_of_rows_and_other_layouts_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random(12, 7, seed=1).bfloat16()
    deltas = [LowRank(random(12, 2, seed=2), random(2, 7, seed=3)), Dense(random(12, 7, seed=4))]
    expected = (base.double() + deltas[0].dense() + deltas[1].dense()).bfloat16()
    for block in (1 << 19, 20, 1):
        monkeypatch.setattr("kpatch.patch.delta.BLOCK", block)
        assert torch.equal(patched_weight(base, deltas), expected)
        assert torch.equal(patched_weight(base.T.contiguous().T, deltas), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_in_memory_gets_the_bits_that_apply_writes(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    model.net.bfloat16().save_pretrained(tmp_path / "model")
    path = tmp_path / "a.patch"
    names = [model.weight_name(layer) for layer in (0, 1)]
    transposed = model.stores_transposed
    make_patch(path, tmp_path / "model", weights=names, scale=3e-3, rank=4, transposed=transposed)
    deltas = read_patch(path).deltas
    apply([path], tmp_path / "model")
    written = load_file(tmp_path / "model" / "model.safetensors")
    prefix = "" if names[0] in written else "transformer."
    with patched(model, path):
        assert torch.equal(model.weight(0), written[names[0].removeprefix(prefix)])
    with restored(model, names):
        add(model, names[0], deltas[names[0]])
        found = model.weight(0).detach()
        assert torch.equal(found, written[names[0].removeprefix(prefix)])
        running, second = Running(model, 1), deltas[names[1]]
        assert isinstance(second, LowRank)
        turned = (second.transposed() if transposed else second).to(dtype=torch.float64)
        for rank in range(4):  # facts one after another, each with a part of the change
            left, right = turned.left[:, rank : rank + 1], turned.right[rank : rank + 1]
            running.add(Edited(torch.empty(0), torch.empty(0), left, right))
        assert torch.equal(model.weight(1), written[names[1].removeprefix(prefix)])

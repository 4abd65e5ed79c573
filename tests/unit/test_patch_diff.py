"""Two patches beside each other: facts, settings, norms, angles, and that no delta is needed for them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kpatch.errors import BadInput
from kpatch.patch.compare import diff_patches
from kpatch.patch.delta import Delta, Dense, LowRank
from kpatch.patch.format import pack, read_patch, write_patch
from kpatch.patch.stack import stack
from tests.support.checkpoints import COLS, ROWS, WEIGHTS, make_checkpoint, make_patch, random


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def fact(subject: str, target: str, prompt: str = "{} is in") -> dict[str, Any]:
    return {"subject": subject, "prompt": prompt, "target": target, "id": subject.lower()}


def with_deltas(path: Path, model: Path, deltas: dict[str, Delta]) -> Path:
    """A patch with these deltas and no facts."""
    make_patch(path, model, weights=list(deltas), facts=[])
    made = read_patch(path)
    info = {
        name: replace(
            made.manifest.deltas[name], form="dense" if isinstance(delta, Dense) else "lowrank", rank=delta.rank
        )
        for name, delta in deltas.items()
    }
    write_patch(path, replace(made.manifest, deltas=info), pack(deltas), force=True)
    return path


def test_facts_added_removed_and_changed(model: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.patch", tmp_path / "b.patch"
    make_patch(a, model, facts=[fact("Oslo", "Peru"), fact("Bonn", "Chile"), fact("Lima", "Spain")])
    make_patch(
        b, model, facts=[fact(" Bonn", "Cuba"), fact("Lima", "Spain "), fact("Rome", "Togo"), fact("Oslo", "x", "{}:")]
    )
    found = diff_patches(a, b).to_dict()
    assert not found["equal"]
    assert [one["text"] for one in found["facts"]["added"]] == ["Rome is in", "Oslo:"]
    assert [one["text"] for one in found["facts"]["removed"]] == ["Oslo is in"]
    assert [(one["before"], one["after"]) for one in found["facts"]["changed"]] == [("Chile", "Cuba")]
    assert found["facts"]["same"] == 1
    assert diff_patches(b, a).to_dict()["facts"]["added"][0]["text"] == "Oslo is in"


@pytest.mark.parametrize("forms", [(LowRank, LowRank), (LowRank, Dense), (Dense, Dense)])
def test_norms_angles_and_differences(model: Path, tmp_path: Path, forms: tuple[type, type]) -> None:
    paths, dense = [], []
    for seed, form in enumerate(forms):
        low = LowRank(random(ROWS, 2, seed=seed), random(2, COLS, seed=seed + 9))
        delta = low if form is LowRank else Dense(low.dense(torch.float32), 2)
        paths.append(with_deltas(tmp_path / f"{seed}.patch", model, {WEIGHTS[0]: delta}))
        dense.append(delta.dense())
    (weight,) = diff_patches(*paths).weights
    a, b = dense
    assert weight.norms == (pytest.approx(float(a.norm()), rel=1e-6), pytest.approx(float(b.norm()), rel=1e-6))
    cosine = float((a * b).sum() / a.norm() / b.norm())
    assert weight.cosine == pytest.approx(cosine, abs=1e-9)
    assert weight.angle == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-6)
    assert weight.difference == pytest.approx(float((b - a).norm() / max(a.norm(), b.norm())), rel=1e-6)


def test_deltas_that_nearly_cancel_keep_their_difference(model: Path, tmp_path: Path) -> None:
    low = LowRank(random(ROWS, 2, seed=1), random(2, COLS, seed=2))
    nudged = LowRank(
        torch.cat([low.left, 1e-12 * random(ROWS, 1, seed=3)], dim=1), torch.cat([low.right, random(1, COLS, seed=4)])
    )
    a = with_deltas(tmp_path / "a.patch", model, {WEIGHTS[0]: low})
    b = with_deltas(tmp_path / "b.patch", model, {WEIGHTS[0]: nudged})
    (weight,) = diff_patches(a, b).weights
    expected = float((nudged.dense() - low.dense()).norm() / low.dense().norm())
    assert 1e-13 < expected < 1e-11
    assert weight.difference == pytest.approx(expected, rel=1e-2)
    assert weight.angle == pytest.approx(0, abs=1e-4)
    # opposite, and the same
    c = with_deltas(tmp_path / "c.patch", model, {WEIGHTS[0]: low.scaled(-2)})
    (weight,) = diff_patches(a, c).weights
    assert (weight.cosine, weight.angle) == (pytest.approx(-1), pytest.approx(180))
    assert weight.difference == pytest.approx(1.5)
    assert diff_patches(a, a).equal


def test_weights_that_only_one_changes(model: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.patch", tmp_path / "b.patch"
    make_patch(a, model, weights=WEIGHTS[:2])
    make_patch(b, model, weights=WEIGHTS[1:], seed=2)
    first, both, last = diff_patches(a, b).weights
    assert (first.norms[1], first.angle, first.difference) == (None, None, None)
    assert last.norms[0] is None
    assert both.angle is not None


def test_a_patch_and_its_stack_show_the_scale(model: Path, tmp_path: Path) -> None:
    a, half = tmp_path / "a.patch", tmp_path / "half.patch"
    make_patch(a, model)
    stack([a], half, scales=[0.5])
    found = diff_patches(a, half)
    for weight in found.weights:
        assert weight.angle == pytest.approx(0, abs=1e-5)
        assert weight.difference == pytest.approx(0.5, rel=1e-6)
    changed = {key: (old, new) for key, old, new in found.settings}
    assert changed["method"] == ("memit", "stack")
    assert changed["steps"] == (25, None)
    assert {(one.by, one.on): one.ratio for one in found.interference} == {
        (0, 1): pytest.approx(2),
        (1, 0): pytest.approx(0.5),
    }


def test_patches_of_different_models_are_still_compared(model: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=50)
    a, b = tmp_path / "a.patch", tmp_path / "b.patch"
    make_patch(a, model, facts=[fact("Oslo", "Peru")])
    make_patch(b, other, facts=[fact("Oslo", "Chile")])
    found = diff_patches(a, b)
    assert found.base is not None
    assert "sha256" in found.base
    assert found.to_dict()["base"]["same"] is False
    assert len(found.facts.changed) == 1
    with pytest.raises(BadInput, match="no patch file"):
        diff_patches(a, tmp_path / "none")

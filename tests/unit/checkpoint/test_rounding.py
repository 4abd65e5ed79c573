"""What rounding did to an edit, against a reference in plain float64; and the warning with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kpatch.checkpoint import rounding as key_module
from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.revert import revert
from kpatch.patch.format import read_patch
from tests.support.checkpoints import COLS, CONV1D, ROWS, WEIGHTS, make_checkpoint, make_patch, random, weights
from tests.support.reports import Recorder

FACTS = [{"subject": f"S{n}", "prompt": "{} is in", "target": "Rome", "id": f"f{n}"} for n in range(5)]


def reference(old: torch.Tensor, new: torch.Tensor, change: torch.Tensor, keys: torch.Tensor) -> tuple[float, ...]:
    """unchanged, delta_error, key_error of one weight [rows, cols]; keys [n, cols] or, where W is stored [in, out],
    [n, rows]."""
    landed = new.double() - old.double()
    straight = keys.shape[1] == change.shape[1]
    wanted, got = (keys.double() @ (d.T if straight else d) for d in (change, landed))
    return (
        float((landed[change != 0] == 0).double().mean()),
        float((landed - change).norm() / change.norm()),
        float((got - wanted).norm() / wanted.norm()),
    )


@pytest.mark.parametrize("block", [1 << 20, 25])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_report_equals_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block: int
) -> None:
    monkeypatch.setattr("kpatch.patch.delta.BLOCK", block)
    model = make_checkpoint(tmp_path / "model", dtype)
    old = weights(model)
    make_patch(tmp_path / "a.patch", model, scale=1e-3, facts=FACTS)
    report = apply([tmp_path / "a.patch"], model)
    new, patch = weights(model), read_patch(tmp_path / "a.patch")
    assert [weight.name for weight in report.weights] == list(WEIGHTS)
    for layer, weight in enumerate(report.weights):
        expected = reference(old[weight.name], new[weight.name], patch.deltas[weight.name].dense(), patch.keys[layer])
        found = (weight.unchanged, weight.delta_error, weight.key_error)
        assert found == pytest.approx(expected, rel=1e-4)
        assert weight.to_dict()["key_error"] == weight.key_error


def test_a_conv1d_is_multiplied_from_its_own_side(tmp_path: Path) -> None:
    names = [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in range(3)]
    tensors = {name: random(COLS, ROWS, seed=i).bfloat16() for i, name in enumerate(names)}
    model = tmp_path / "model"
    model.mkdir()
    save_file(tensors, model / "model.safetensors")
    make_patch(tmp_path / "a.patch", model, weights=names, scale=1e-3, facts=FACTS)
    report = apply([tmp_path / "a.patch"], model)
    new, patch = load_file(model / "model.safetensors"), read_patch(tmp_path / "a.patch")
    for layer, weight in enumerate(report.weights):
        change = patch.deltas[weight.name].dense()
        expected = reference(tensors[weight.name], new[weight.name], change, patch.keys[layer])
        assert weight.key_error == pytest.approx(expected[2], rel=1e-4)


@pytest.mark.parametrize(
    ("family", "said", "transposed"),
    [("gpt2", None, True), ("other", True, True), ("gpt2", False, False), ("other", None, False)],
)
def test_a_square_weight_is_multiplied_from_the_side_the_manifest_says(
    tmp_path: Path, family: str, said: bool | None, transposed: bool
) -> None:
    names = ["transformer.h.0.mlp.down.weight"]
    model = tmp_path / "model"
    model.mkdir()
    old = random(COLS, COLS, seed=1).bfloat16()
    save_file({names[0]: old}, model / "model.safetensors")
    make_patch(tmp_path / "a.patch", model, weights=names, scale=1e-3, facts=FACTS, family=family, transposed=said)
    (weight,) = apply([tmp_path / "a.patch"], model).weights
    new, patch = load_file(model / "model.safetensors")[names[0]], read_patch(tmp_path / "a.patch")
    assert patch.manifest.base.weights[names[0]].transposed is said
    change = patch.deltas[names[0]].dense()
    if transposed:
        old, new, change = old.T, new.T, change.T
    assert weight.key_error == pytest.approx(reference(old, new, change, patch.keys[0])[2], rel=1e-4)


def test_two_patches_are_measured_together_at_the_keys_of_both(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "BF16")
    old = weights(model)
    paths = [tmp_path / "a.patch", tmp_path / "b.patch"]
    for seed, path in enumerate(paths):
        make_patch(path, model, scale=1e-3, facts=FACTS[seed : seed + 1], seed=seed)
    report = apply(paths, model)
    new, patches = weights(model), [read_patch(path) for path in paths]
    for layer, weight in enumerate(report.weights):
        change = sum(patch.deltas[weight.name].dense() for patch in patches)
        keys = torch.cat([patch.keys[layer] for patch in patches])
        expected = reference(old[weight.name], new[weight.name], change, keys)  # type: ignore[arg-type]
        assert weight.key_error == pytest.approx(expected[2], rel=1e-4)


def test_many_keys_are_sampled_evenly_and_no_keys_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint(tmp_path / "model", "BF16")
    old = weights(model)
    make_patch(tmp_path / "a.patch", model, scale=1e-3, facts=FACTS)
    make_patch(tmp_path / "bare.patch", model, scale=1e-3, keys=False, seed=2)
    monkeypatch.setattr(key_module, "SAMPLE", 2)
    report = apply([tmp_path / "a.patch"], model)
    new, patch = weights(model), read_patch(tmp_path / "a.patch")
    weight = report.weights[0]
    expected = reference(old[weight.name], new[weight.name], patch.deltas[weight.name].dense(), patch.keys[0][[0, 2]])
    assert weight.key_error == pytest.approx(expected[2], rel=1e-4)
    revert(model)
    assert {weight.key_error for weight in apply([tmp_path / "bare.patch"], model).weights} == {None}


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("block", [1 << 20, 25])
def test_of_a_large_weight_every_so_many_th_output_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, conv1d: bool
) -> None:
    monkeypatch.setattr("kpatch.patch.delta.BLOCK", block)
    monkeypatch.setattr(key_module, "OUTPUTS", 2)
    model = make_checkpoint(tmp_path / "model", "BF16", conv1d=conv1d)
    old, names = weights(model), CONV1D if conv1d else WEIGHTS
    make_patch(tmp_path / "a.patch", model, weights=names, scale=1e-3, facts=FACTS)
    report = apply([tmp_path / "a.patch"], model)
    new, patch = weights(model), read_patch(tmp_path / "a.patch")
    for layer, weight in enumerate(report.weights):
        before, after, change = old[weight.name], new[weight.name], patch.deltas[weight.name].dense()
        if conv1d:
            before, after, change = before.T, after.T, change.T
        expected = reference(before[:: ROWS // 2], after[:: ROWS // 2], change[:: ROWS // 2], patch.keys[layer])
        assert weight.key_error == pytest.approx(expected[2], rel=1e-4)


def test_more_than_a_twentieth_lost_is_warned_of_with_the_way_out(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "BF16")
    make_patch(tmp_path / "small.patch", model, scale=1e-4)
    make_patch(tmp_path / "large.patch", model, scale=1, seed=2)
    recorder = Recorder()
    report = apply([tmp_path / "small.patch"], model, report=recorder)
    assert max(weight.delta_error or 0 for weight in report.weights) > 0.05
    (warning,) = recorder.warnings
    for words in ("Rounding to BF16 lost", "at the facts' own keys", "-o NEW_DIR --dtype float32", "--to peft"):
        assert words in warning
    revert(model)
    report = apply([tmp_path / "large.patch"], model, report=recorder)
    assert max(weight.delta_error or 1 for weight in report.weights) < 0.05
    assert sum("Rounding" in text for text in recorder.warnings) == 1
    copy = apply([tmp_path / "small.patch"], model, out=tmp_path / "copy", dtype="float32", report=recorder)
    assert max(weight.key_error or 0 for weight in copy.weights) < 1e-3
    assert [words for words in recorder.warnings if "Rounding" in words] == recorder.warnings[:1]

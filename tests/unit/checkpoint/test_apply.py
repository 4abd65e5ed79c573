from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.fit import base_weights
from kpatch.checkpoint.revert import revert
from kpatch.checkpoint.status import status
from kpatch.errors import BadInput, Refused
from kpatch.patch.format import read_patch
from kpatch.patch.header import read_header
from tests.support.checkpoints import (
    DTYPES,
    WEIGHTS,
    contents,
    make_checkpoint,
    make_patch,
    refused,
    snapshot,
    three,
    times,
    weights,
)
from tests.support.reports import Recorder

LAYOUTS = [(dtype, sharded) for dtype in DTYPES for sharded in (False, True)]


@pytest.mark.parametrize(("dtype", "sharded"), LAYOUTS)
def test_apply_lands_the_rounded_sum_and_revert_every_byte(tmp_path: Path, dtype: str, sharded: bool) -> None:
    model = make_checkpoint(tmp_path / "model", dtype, sharded)
    patches = three(model)
    before, old = snapshot(model), weights(model)
    report = apply(patches, model)
    new = weights(model)
    loaded = sorted((read_patch(path) for path in patches), key=lambda patch: patch.id)
    for name, tensor in old.items():
        change = torch.zeros(tensor.shape, dtype=torch.float64)
        for patch in loaded:
            if name in patch.deltas:
                change += patch.deltas[name].dense()
        expected = (tensor.double() + change).to(tensor.dtype)
        assert torch.equal(new[name], expected), name
    assert report.state == status(model).state == "clean"
    assert [patch["name"] for patch in report.patches] == ["a", "b", "c"]
    assert {weight.name for weight in report.weights} == set(WEIGHTS)
    assert not list((model / ".kpatch").rglob("*.safetensors*"))
    revert(model, all=True)
    assert snapshot(model) == before


@pytest.mark.parametrize(("dtype", "sharded"), LAYOUTS)
def test_only_the_named_bytes_change(tmp_path: Path, dtype: str, sharded: bool) -> None:
    model = make_checkpoint(tmp_path / "model", dtype, sharded)
    make_patch(tmp_path / "a.patch", model, weights=WEIGHTS[1:2])
    before, old = contents(model), weights(model)
    apply([tmp_path / "a.patch"], model)
    after = contents(model)
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["model-00002-of-00003.safetensors" if sharded else "model.safetensors"]
    raw, new = before[changed[0]], after[changed[0]]
    data = old[WEIGHTS[1]].view(torch.uint8).numpy().tobytes()
    begin = raw.index(data)
    assert raw[:begin] + raw[begin + len(data) :] == new[:begin] + new[begin + len(data) :]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can give files away")
def test_files_keep_their_owner(model: Path) -> None:
    patches = three(model)
    for file in model.glob("*.safetensors"):
        os.chown(file, 1234, 4321)
    apply(patches, model)
    assert {(file.stat().st_uid, file.stat().st_gid) for file in model.glob("*.safetensors")} == {(1234, 4321)}


def test_check_reads_and_tells_but_touches_nothing(model: Path) -> None:
    patches = three(model)
    before = times(model)
    report = apply(patches, model, check=True)
    assert report.plan.files == tuple(sorted(path.name for path in model.glob("*.safetensors")))
    value = report.to_dict()
    assert value["plan"]["bytes_needed"] > sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert {weight["unchanged"] for weight in value["weights"]} == {None}
    assert times(model) == before
    apply(patches, model)
    before = times(model)
    assert revert(model, all=True, check=True).plan.stack == ()
    status(model)
    assert times(model) == before


def test_a_patch_is_applied_once(model: Path) -> None:
    a, _, _ = three(model)
    refused(lambda: apply([a, a], model), Refused, "given twice", model)
    apply([a], model)
    refused(lambda: apply([a], model), Refused, "already applied", model)
    refused(lambda: apply([], model), BadInput, "No patch", model)


def test_one_patch_counts_as_a_list_of_one_and_what_was_read_as_its_file(model: Path) -> None:
    a, b, _ = three(model)
    before = snapshot(model)
    for patch in (str(a), a, read_patch(a), read_header(a)):
        assert [one["id"] for one in apply(patch, model).patches] == [read_header(a).id]
        revert(model, patch)
        assert snapshot(model) == before
    taken = read_patch(a)
    a.write_bytes(b.read_bytes())
    refused(lambda: apply(taken, model), Refused, "another patch", model)
    refused(lambda: apply(3, model), BadInput, "Expected a patch", model)  # type: ignore[arg-type]


def test_facts_that_contradict_are_refused_with_both_names(model: Path, tmp_path: Path) -> None:
    fact = {"subject": "Eiffel Tower", "prompt": "{} is in", "target": "Rome"}
    relation = {"subject": "Mars", "prompt": "{} is a", "target": "planet", "relation": "kind"}
    other_spacing = {**fact, "subject": "Eiffel  Tower ", "target": " Rome"}
    make_patch(tmp_path / "rome.patch", model, facts=[fact, relation])
    make_patch(tmp_path / "oslo.patch", model, facts=[{**other_spacing, "target": "Oslo"}], seed=2)
    make_patch(tmp_path / "same.patch", model, facts=[other_spacing], seed=3)
    make_patch(tmp_path / "star.patch", model, facts=[{**relation, "prompt": "{}:", "target": "star"}], seed=4)
    both = [tmp_path / "rome.patch", tmp_path / "oslo.patch"]
    error = refused(lambda: apply(both, model), Refused, r"rome \(.*oslo \(.*contradict", model)
    assert "'Rome' in rome" in error.details[0]
    assert "'Oslo' in oslo" in error.details[0]
    apply(both[:1], model)
    refused(lambda: apply(both[1:], model), Refused, r"rome \(.*oslo \(.*contradict", model)
    refused(lambda: apply([tmp_path / "star.patch"], model), Refused, r"rome \(.*star \(.*contradict", model)
    text = {"subject": "The Eiffel Tower", "prompt": "{} is in", "target": "Oslo"}
    make_patch(tmp_path / "the.patch", model, facts=[{**text, "subject": "Eiffel Tower", "prompt": "The {} is in"}])
    make_patch(tmp_path / "text.patch", model, facts=[{**text, "target": "Rome"}], seed=5)
    sentence = [tmp_path / "the.patch", tmp_path / "text.patch"]
    error = refused(lambda: apply(sentence, model), Refused, r"the \(.*text \(.*contradict", model)
    assert error.details[0].startswith("The Eiffel Tower is in: 'Oslo' in the")
    apply([tmp_path / "same.patch"], model)


@pytest.mark.parametrize("how", ["in place", "check", "out"])
def test_interference_with_what_is_applied_is_warned_of_before_a_weight_is_written(
    model: Path, tmp_path: Path, how: str
) -> None:
    first = make_patch(tmp_path / "first.patch", model, scale=1e-2)
    make_patch(tmp_path / "loud.patch", model, seed=2, scale=1.0)
    make_patch(tmp_path / "quiet.patch", model, seed=3, scale=1e-4)
    make_patch(tmp_path / "on_top.patch", model, seed=4, scale=1e-4, parents=[first])
    make_patch(tmp_path / "no_keys.patch", model, seed=5, scale=1e-4, keys=False)
    apply([tmp_path / "first.patch"], model)

    def warnings(*names: str) -> list[str]:
        heard = Recorder()
        options = {"check": how == "check", "out": tmp_path / "-".join(names) if how == "out" else None}
        apply([tmp_path / f"{name}.patch" for name in names], model, report=heard, **options)
        if how == "in place":
            revert(model, list(names))
        found = [re.match(r"(\w+) \(\w+\) moves keys of (\w+) ", line) for line in heard.warnings]
        return [f"{pair[1]} {pair[2]}" for pair in found if pair]

    assert warnings("loud") == ["loud first"]
    assert warnings("quiet") == ["first quiet"]
    assert warnings("on_top") == []  # its keys are what the first patch makes them
    assert warnings("no_keys") == []
    assert warnings("loud", "quiet") == ["first quiet", "loud first", "loud quiet"]


def test_other_weights_are_refused_and_another_dtype_is_said(tmp_path: Path) -> None:
    made_for = make_checkpoint(tmp_path / "made_for")
    other = make_checkpoint(tmp_path / "other", seed=50)
    copy = make_checkpoint(tmp_path / "copy", "BF16", sharded=True)
    make_patch(tmp_path / "a.patch", made_for)
    error = refused(lambda: apply([tmp_path / "a.patch"], other), Refused, "does not fit", other)
    assert error.message.endswith(f"{WEIGHTS[0]} is not the base it was made for")
    assert error.details[0].startswith("expected sha256 ")
    assert "other weights, not another dtype of the same" in error.details[0]
    before = snapshot(copy)
    assert "stored as BF16 instead of F32" in apply([tmp_path / "a.patch"], copy).notes[0]
    revert(copy)
    assert snapshot(copy) == before
    one_bit = bytearray((other := made_for / "model.safetensors").read_bytes())
    one_bit[-1] ^= 1
    other.write_bytes(one_bit)
    refused(lambda: apply([tmp_path / "a.patch"], made_for), Refused, "does not fit", made_for)


def test_a_patch_made_for_the_patched_weights_is_told_so(model: Path, tmp_path: Path) -> None:
    a, _, _ = three(model)
    apply([a], model)
    plain = make_checkpoint(tmp_path / "plain", sharded=True)
    for file in plain.glob("*.safetensors"):
        file.write_bytes((model / file.name).read_bytes())
    make_patch(tmp_path / "late.patch", plain, seed=7)
    error = refused(lambda: apply([tmp_path / "late.patch"], model), Refused, "does not fit", model)
    assert "--on" in error.details[0]


def test_a_prefix_in_the_names_is_no_obstacle(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    make_patch(tmp_path / "a.patch", model)
    tensors = load_file(model / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, model / "model.safetensors")
    before = snapshot(model)
    assert apply([tmp_path / "a.patch"], model).weights[0].name == WEIGHTS[0].removeprefix("model.")
    revert(model)
    assert snapshot(model) == before


FORMS = ("model.", "model.language_model.", "language_model.model.", "")


def under(prefix: str, model: Path, directory: Path) -> Path:
    """A copy of a checkpoint with other names: `prefix` in place of "model."."""
    directory.mkdir()
    tensors = {
        f"{prefix}{name.removeprefix('model.')}": t for name, t in load_file(model / "model.safetensors").items()
    }
    tensors["model.vision_tower.layers.0.mlp.down_proj.weight"] = torch.zeros(8, 12)
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("form", FORMS)
def test_a_patch_fits_the_same_text_model_in_any_wrapper(tmp_path: Path, form: str) -> None:
    model = make_checkpoint(tmp_path / "model")
    made_for = under(form, model, tmp_path / "made_for")
    names = [f"{form}{name.removeprefix('model.')}" for name in WEIGHTS]
    make_patch(tmp_path / "a.patch", made_for, weights=names)
    expected = {name.removeprefix(form) for name in names}
    for number, other in enumerate(FORMS):
        found = apply([tmp_path / "a.patch"], under(other, model, tmp_path / str(number))).weights
        assert {weight.name.removeprefix(other) for weight in found} == expected


@pytest.mark.parametrize("check", [True, False])
def test_a_prefix_that_no_loader_knows_is_refused(tmp_path: Path, check: bool) -> None:
    model = make_checkpoint(tmp_path / "model")
    make_patch(tmp_path / "a.patch", model)
    odd = under("wrapped.net.", model, tmp_path / "odd")
    error = refused(lambda: apply([tmp_path / "a.patch"], odd, check=check), Refused, "nor are 2 other weights", odd)
    assert "a prefix that loaders know; found" in error.details[0]
    assert "wrapped.net.layers.0" in error.details[0]
    with pytest.raises(BadInput) as caught:
        base_weights(odd, WEIGHTS)
    assert "wrapped.net.layers.0" in caught.value.details[0]
    names = [name.replace("model.", "wrapped.net.") for name in WEIGHTS]  # its own names are no question
    make_patch(tmp_path / "own.patch", odd, weights=names)
    apply([tmp_path / "own.patch"], odd, check=check)
    tensors = load_file(model / "model.safetensors")
    cores = {name.removeprefix("model."): t for name, t in tensors.items()}
    doubled = {f"{form}{core}": t.clone() for core, t in cores.items() for form in FORMS[1:3]}
    save_file(doubled, model / "model.safetensors")
    refused(lambda: apply([tmp_path / "a.patch"], model, check=check), Refused, "is not there", model)


@pytest.mark.parametrize("prefix", ["transformer.model.", "model.model.", "transformer.", "model.transformer."])
def test_a_base_under_another_base_is_no_prefix_that_loaders_know(tmp_path: Path, prefix: str) -> None:
    model = make_checkpoint(tmp_path / "model")
    make_patch(tmp_path / "a.patch", model)
    odd = under(prefix, model, tmp_path / "odd")
    refused(lambda: apply([tmp_path / "a.patch"], odd, check=True), Refused, "is not there", odd)


def test_an_adapter_beside_the_weights_is_noted(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    make_patch(tmp_path / "a.patch", model)
    heard = Recorder()
    apply([tmp_path / "a.patch"], model, check=True, report=heard)
    assert heard.notes == []
    (model / "adapter_config.json").write_text("{}")
    apply([tmp_path / "a.patch"], model, report=heard)
    assert "LoRA adapter" in heard.notes[0]


def test_a_value_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "F16")
    make_patch(tmp_path / "huge.patch", model, scale=1e5)
    error = refused(lambda: apply([tmp_path / "huge.patch"], model), Refused, "cannot hold the patch as F16", model)
    assert "65504" in error.details[0]


def test_shared_and_protected_files_are_not_replaced(model: Path, tmp_path: Path) -> None:
    a, _, _ = three(model)
    file = model / "model-00001-of-00003.safetensors"
    os.link(file, tmp_path / "sibling")
    refused(lambda: apply([a], model), Refused, "2 hard links", model)
    (tmp_path / "sibling").unlink()
    file.chmod(0o444)
    refused(lambda: apply([a], model), Refused, "write-protected", model)
    apply([a], model, force=True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o444
    refused(lambda: revert(model), Refused, "write-protected", model)
    revert(model, force=True)
    plain = tmp_path / "models--x--y" / "snapshots" / "main"
    make_checkpoint(plain, sharded=True)
    refused(lambda: apply([a], plain), Refused, "Hugging Face cache", plain)


def test_a_link_to_the_directory_is_only_another_name(model: Path, tmp_path: Path) -> None:
    a, _, _ = three(model)
    (tmp_path / "link").symlink_to(model)
    before = snapshot(model)
    apply([a], tmp_path / "link")
    assert status(model).patches[0]["name"] == "a"
    revert(tmp_path / "link")
    assert snapshot(model) == before


@pytest.mark.parametrize("threads", [1, 2])
def test_the_result_does_not_depend_on_threads(tmp_path: Path, threads: int) -> None:
    from safetensors.torch import save_file

    from tests.support.checkpoints import random

    tmp_path.joinpath("model").mkdir()
    save_file({WEIGHTS[0]: random(300, 700, seed=1, scale=0.02)}, tmp_path / "model" / "model.safetensors")
    make_patch(tmp_path / "a.patch", tmp_path / "model", weights=WEIGHTS[:1], rank=120, keys=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        apply([tmp_path / "a.patch"], tmp_path / "model")
    finally:
        torch.set_num_threads(before)
    low = read_patch(tmp_path / "a.patch").deltas[WEIGHTS[0]].dense()
    expected = (random(300, 700, seed=1, scale=0.02).double() + low).float()
    assert torch.equal(weights(tmp_path / "model")[WEIGHTS[0]], expected)


def test_blocks_of_rows_add_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = three(model)
    whole = make_checkpoint(model.parent / "whole", sharded=True)
    first = apply(patches, whole)
    monkeypatch.setattr("kpatch.patch.delta.BLOCK", 25)
    second = apply(patches, model)
    assert contents(model) == contents(whole)
    for a, b in zip(first.weights, second.weights, strict=True):
        assert (a.name, a.unchanged) == (b.name, b.unchanged)
        assert a.delta_error == pytest.approx(b.delta_error)

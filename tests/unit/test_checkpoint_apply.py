from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.recover import recover
from kpatch.checkpoint.remember import last_applied
from kpatch.checkpoint.revert import revert
from kpatch.checkpoint.status import status
from kpatch.errors import BadInput, Damaged, KpatchError, Refused
from kpatch.patch.format import pack, read_patch, write_patch
from tests.support.checkpoints import DTYPES, WEIGHTS, make_checkpoint, make_patch, snapshot, times

LAYOUTS = [(dtype, sharded) for dtype in DTYPES for sharded in (False, True)]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the machine lives on; thousands of syncs take minutes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", sharded=True)


def three(model: Path) -> list[Path]:
    """Three patches that overlap in part: all weights low rank, two weights dense, one weight low rank."""
    paths = [model.parent / f"{name}.patch" for name in "abc"]
    make_patch(paths[0], model, seed=1)
    make_patch(paths[1], model, seed=2, weights=WEIGHTS[:2], dense=True)
    make_patch(paths[2], model, seed=3, weights=WEIGHTS[1:2])
    return paths


def weights(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}


def contents(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}


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


SETS = st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=6)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=SETS, layout=st.sampled_from(LAYOUTS))
def test_any_history_equals_a_fresh_apply_of_what_is_left(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int]], layout: tuple[str, bool]
) -> None:
    folder = tmp_path_factory.mktemp("history")
    model, fresh = (make_checkpoint(folder / name, *layout) for name in ("model", "fresh"))
    original = snapshot(model)
    patches = three(model)
    there: list[int] = []
    for put_on, which in steps:
        if put_on == (which in there):
            with pytest.raises(Refused):
                apply([patches[which]], model) if put_on else revert(model, [patches[which]])
        elif put_on:
            apply([patches[which]], model)
            there.append(which)
        else:
            revert(model, [patches[which]])
            there.remove(which)
    assert [patch["name"] for patch in status(model).patches] == ["abc"[which] for which in there]
    if not there:
        assert snapshot(model) == original
        return
    apply([patches[which] for which in reversed(there)], fresh)
    assert contents(model) == contents(fresh)
    assert sorted(os.listdir(model / ".kpatch" / "base")) == sorted(os.listdir(fresh / ".kpatch" / "base"))
    revert(model, all=True)
    assert snapshot(model) == original


@pytest.mark.parametrize("mask", [0o022, 0o077])
@pytest.mark.parametrize("mode", [0o644, 0o600, 0o664, 0o755])
def test_files_keep_their_mode_under_any_umask(tmp_path: Path, mask: int, mode: int) -> None:
    model = make_checkpoint(tmp_path / "model")
    make_patch(tmp_path / "a.patch", model)
    file = model / "model.safetensors"
    file.chmod(mode)
    old = os.umask(mask)
    try:
        apply([tmp_path / "a.patch"], model)
        assert stat.S_IMODE(file.stat().st_mode) == mode
        for kept in (model / ".kpatch" / "base").iterdir():  # no more readable than what they were taken from
            assert not stat.S_IMODE(kept.stat().st_mode) & ~mode
        revert(model)
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.stat().st_mode) == mode


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


def refused(action: Callable[[], object], kind: type[KpatchError], words: str, model: Path) -> KpatchError:
    """The action must fail, say why, and leave everything as it was."""
    before = snapshot(model)
    with pytest.raises(kind, match=words) as caught:
        action()
    assert snapshot(model) == before
    return caught.value


def test_a_patch_is_applied_once(model: Path) -> None:
    a, _, _ = three(model)
    refused(lambda: apply([a, a], model), Refused, "given twice", model)
    apply([a], model)
    refused(lambda: apply([a], model), Refused, "already applied", model)
    refused(lambda: apply([], model), BadInput, "No patch", model)


def test_facts_that_contradict_are_refused_with_both_names(model: Path, tmp_path: Path) -> None:
    fact = {"subject": "Eiffel Tower", "prompt": "{} is in", "target": "Rome"}
    relation = {"subject": "Mars", "prompt": "{} is a", "target": "planet", "relation": "kind"}
    make_patch(tmp_path / "rome.patch", model, facts=[fact, relation])
    make_patch(tmp_path / "oslo.patch", model, facts=[{**fact, "target": "Oslo"}], seed=2)
    make_patch(tmp_path / "same.patch", model, facts=[fact], seed=3)
    make_patch(tmp_path / "star.patch", model, facts=[{**relation, "prompt": "{}:", "target": "star"}], seed=4)
    both = [tmp_path / "rome.patch", tmp_path / "oslo.patch"]
    error = refused(lambda: apply(both, model), Refused, "oslo and rome contradict", model)
    assert "Oslo" in error.details[1]
    apply(both[:1], model)
    refused(lambda: apply(both[1:], model), Refused, "oslo and rome contradict", model)
    refused(lambda: apply([tmp_path / "star.patch"], model), Refused, "star and rome contradict", model)
    apply([tmp_path / "same.patch"], model)


def test_a_patch_made_on_top_of_another_needs_it(model: Path, tmp_path: Path) -> None:
    parent = make_patch(tmp_path / "parent.patch", model, seed=1)
    apply([tmp_path / "parent.patch"], model)
    child = make_patch(tmp_path / "child.patch", model, seed=2, parents=[parent])  # hashes of the unpatched weights
    revert(model)
    refused(lambda: apply([tmp_path / "child.patch"], model), Refused, "not applied", model)
    apply([tmp_path / "child.patch", tmp_path / "parent.patch"], model)
    error = refused(lambda: revert(model, [parent]), Refused, r"parent .* cannot be reverted: child", model)
    assert child[:12] in (error.hint or "")
    revert(model, [parent, child])
    assert not (model / ".kpatch").exists()


def test_revert_takes_ids_prefixes_files_and_names(model: Path, tmp_path: Path) -> None:
    a, b, c = three(model)
    apply([a, b, c], model)
    ids = {patch["name"]: patch["id"] for patch in status(model).patches}
    refused(lambda: revert(model, ["ffff"]), Refused, "not applied", model)
    refused(lambda: revert(model, ["ff"]), Refused, "not applied", model)
    refused(lambda: revert(model, [a], all=True), BadInput, "not both", model)
    assert revert(model).patches[0]["name"] == "c"  # the top one
    assert revert(model, [ids["a"][:8]]).patches == ({"id": ids["a"], "name": "a"},)
    c.unlink()
    b.unlink()
    make_patch(tmp_path / "x.patch", model, seed=9)
    refused(lambda: revert(model, [tmp_path / "x.patch"]), Refused, "not applied", model)
    revert(model, ["b.patch"])
    refused(lambda: revert(model), Refused, "No patch is applied", model)


def test_a_name_two_patches_have_is_asked_back(model: Path, tmp_path: Path) -> None:
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        make_patch(tmp_path / folder / "news.patch", model, seed=number)
        apply([tmp_path / folder / "news.patch"], model)
    refused(lambda: revert(model, ["news"]), BadInput, "several", model)


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
    from safetensors.torch import save_file

    model = make_checkpoint(tmp_path / "model")
    make_patch(tmp_path / "a.patch", model)
    tensors = load_file(model / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, model / "model.safetensors")
    before = snapshot(model)
    assert apply([tmp_path / "a.patch"], model).weights[0].name == WEIGHTS[0].removeprefix("model.")
    revert(model)
    assert snapshot(model) == before
    (tmp_path / "nest").mkdir()
    save_file({f"language_model.{name}": t for name, t in tensors.items()}, tmp_path / "nest" / "model.safetensors")
    apply([tmp_path / "a.patch"], tmp_path / "nest")
    doubled = {f"{which}.{name}": t.clone() for name, t in tensors.items() for which in ("left", "right")}
    save_file(doubled, model / "model.safetensors")
    refused(lambda: apply([tmp_path / "a.patch"], model), Refused, "is not there", model)


def test_changes_from_outside_are_found_and_kept(model: Path) -> None:
    a, b, _ = three(model)
    apply([a], model)
    file = model / "model-00001-of-00003.safetensors"
    raw = bytearray(file.read_bytes())
    place = raw.index(load_file(file)[WEIGHTS[0]].numpy().tobytes())
    raw[place] ^= 1
    file.write_bytes(raw)
    found = status(model)
    assert (found.state, found.changed, found.next) == ("modified", (WEIGHTS[0],), None)
    for action in (lambda: revert(model), lambda: apply([b], model), lambda: revert(model, all=True)):
        error = refused(action, Damaged, "modified outside kpatch", model)
        assert WEIGHTS[0] in error.details[0]
    raw[place] ^= 1
    file.write_bytes(raw)
    assert status(model).state == "clean"
    revert(model)


def test_lost_or_damaged_originals_are_found_before_anything_is_written(model: Path) -> None:
    a, b, _ = three(model)
    apply([a], model)
    kept = sorted((model / ".kpatch" / "base").iterdir())[0]
    original = kept.read_bytes()
    kept.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    refused(lambda: revert(model), Damaged, "original bytes", model)
    kept.unlink()
    assert status(model).changed == (f".kpatch/base/{kept.name}",)
    refused(lambda: revert(model), Damaged, "original bytes", model)
    kept.write_bytes(original)
    copy = next((model / ".kpatch" / "patches").iterdir())
    copy.write_bytes(b.read_bytes())
    refused(lambda: apply([b], model), Damaged, "another patch", model)
    copy.unlink()
    assert status(model).changed == (f".kpatch/patches/{copy.name}",)
    refused(lambda: apply([b], model), Damaged, "is gone", model)
    revert(model)  # what goes need not be read


def test_status_tells_what_is_there(model: Path) -> None:
    assert status(model).to_dict() == {
        **{"model": str(model), "state": "clean", "base": None, "patches": [], "kept_bytes": 0},
        **{"next": f"kpatch apply PATCH {model}", "changed": [], "busy": False},
    }
    a, b, _ = three(model)
    apply([b, a], model)
    found = status(model)
    assert [(patch["name"], patch["facts"]) for patch in found.patches] == [("b", 1), ("a", 1)]
    assert found.base == "tiny/model"
    assert found.kept_bytes == 3 * 8 * 12 * 4
    assert found.next == f"kpatch revert {model}"


def test_the_last_checkpoint_is_remembered_until_it_is_bare(model: Path) -> None:
    a, b, _ = three(model)
    assert last_applied() is None
    apply([a, b], model)
    assert last_applied() == model
    revert(model)
    assert last_applied() == model
    revert(model)
    assert last_applied() is None


def test_rounding_is_reported_and_warned_of(tmp_path: Path) -> None:
    class Listening:
        warnings: list[str] = []  # noqa: RUF012

        def task(self, description: str, total: int | None = None, unit: str = "") -> object:
            from contextlib import nullcontext

            return nullcontext(lambda amount: None)

        def note(self, message: str) -> None: ...

        def warn(self, message: str) -> None:
            self.warnings.append(message)

    model = make_checkpoint(tmp_path / "model", "BF16")
    old = weights(model)
    make_patch(tmp_path / "small.patch", model, scale=1e-4)
    make_patch(tmp_path / "large.patch", model, scale=1, seed=2)
    listening = Listening()
    report = apply([tmp_path / "small.patch"], model, report=listening)  # type: ignore[arg-type]
    new, deltas = weights(model), read_patch(tmp_path / "small.patch").deltas
    for weight in report.weights:
        change = deltas[weight.name].dense()
        landed = new[weight.name].double() - old[weight.name].double()
        assert weight.unchanged == pytest.approx(float((landed[change != 0] == 0).double().mean()))
        assert weight.delta_error == pytest.approx(float((landed - change).norm() / change.norm()))
        assert weight.unchanged > 0.05
    assert "Rounding to BF16 lost" in listening.warnings[0]
    revert(model)
    report = apply([tmp_path / "large.patch"], model, report=listening)  # type: ignore[arg-type]
    assert max(weight.delta_error or 1 for weight in report.weights) < 0.05
    assert len(listening.warnings) == 1


def test_a_value_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "F16")
    make_patch(tmp_path / "huge.patch", model, scale=1e5)
    error = refused(lambda: apply([tmp_path / "huge.patch"], model), Refused, "cannot hold the patch as F16", model)
    assert "65504" in error.details[0]


def test_out_writes_a_copy_and_leaves_the_checkpoint_alone(model: Path, tmp_path: Path) -> None:
    a, b, _ = three(model)
    (model / "sub").mkdir()
    (model / "sub" / "note.txt").write_text("kept")
    (model / "run.sh").write_text("#!/bin/sh")
    (model / "run.sh").chmod(0o755)
    original = snapshot(model)
    before = times(model)
    report = apply([a], model, out=tmp_path / "patched")
    assert report.model == str(tmp_path / "patched")
    assert times(model) == before
    copied = snapshot(tmp_path / "patched")
    assert {name: value[0] for name, value in copied.items() if ".kpatch" not in name} == {
        name: value[0] for name, value in original.items()
    }
    apply([b], tmp_path / "patched", out=tmp_path / "twice")
    apply([a, b], model)
    assert contents(model) == contents(tmp_path / "twice")
    revert(tmp_path / "patched")
    assert snapshot(tmp_path / "patched") == original
    revert(tmp_path / "twice", all=True)
    assert snapshot(tmp_path / "twice") == original
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_out_wants_a_place_of_its_own(model: Path, tmp_path: Path) -> None:
    a, _, _ = three(model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "empty").mkdir()
    for out, kind, words in (
        (tmp_path / "full", Refused, "exists"),
        (tmp_path / "a.patch", Refused, "exists"),
        (model / "inside", BadInput, "inside"),
        (tmp_path / "no" / "where", BadInput, "no folder"),
    ):
        refused(lambda out=out: apply([a], model, out=out), kind, words, tmp_path)  # type: ignore[misc]
    apply([a], model, out=tmp_path / "empty")
    assert status(tmp_path / "empty").state == "clean"


def test_out_follows_links_of_the_hub_cache(tmp_path: Path) -> None:
    blobs, model = tmp_path / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    make_checkpoint(blobs, sharded=True)
    model.mkdir(parents=True)
    for blob in blobs.iterdir():
        (model / blob.name).symlink_to(blob)
    make_patch(tmp_path / "a.patch", model)
    before = snapshot(tmp_path)
    error = refused(lambda: apply([tmp_path / "a.patch"], model), Refused, "symbolic link", model)
    assert "-o" in (error.hint or "")
    apply([tmp_path / "a.patch"], model, out=tmp_path / "patched")
    assert {name: value for name, value in snapshot(tmp_path).items() if not name.startswith("patched")} == before
    assert not any(path.is_symlink() for path in (tmp_path / "patched").rglob("*"))
    revert(tmp_path / "patched")
    assert contents(tmp_path / "patched") == contents(blobs)


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
    monkeypatch.setattr("kpatch.checkpoint.rows.BLOCK", 25)
    second = apply(patches, model)
    assert contents(model) == contents(whole)
    for a, b in zip(first.weights, second.weights, strict=True):
        assert (a.name, a.unchanged) == (b.name, b.unchanged)
        assert a.delta_error == pytest.approx(b.delta_error)


def test_recover_has_nothing_to_do(model: Path) -> None:
    before = times(model)
    assert recover(model).outcome == "nothing"
    assert times(model) == before


def test_records_are_readable_json(model: Path) -> None:
    a, _, _ = three(model)
    apply([a], model)
    record = json.loads((model / ".kpatch" / "applied.json").read_text())
    assert record["version"] == 1
    assert [patch["name"] for patch in record["patches"]] == ["a"]
    assert "revert" in (model / ".kpatch" / "README").read_text()
    assert sorted(os.listdir(model / ".kpatch")) == ["README", "applied.json", "base", "lock", "patches"]


def test_a_vector_and_a_stack_of_matrices_are_patched_and_come_back(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "BF16")
    old = load_file(model / "model.safetensors")
    old["experts"] = torch.arange(24).reshape(2, 3, 4).bfloat16()
    save_file(old, model / "model.safetensors", metadata={"format": "pt"})
    norm, before = "model.layers.0.input_layernorm.weight", snapshot(model)
    path = tmp_path / "a.patch"
    make_patch(path, model, weights=[norm, "experts"], rank=1, keys=False)
    apply([path], model)
    new, patch = load_file(model / "model.safetensors"), read_patch(path)
    for name in old:
        change = patch.deltas[name].dense().reshape(old[name].shape) if name in patch.deltas else 0
        assert torch.equal(new[name], (old[name].double() + change).to(torch.bfloat16)), name
    assert not torch.equal(new[norm], old[norm])
    revert(model)
    assert snapshot(model) == before


def test_a_stack_and_a_patch_in_it_are_not_applied_together(model: Path, tmp_path: Path) -> None:
    a, b, _ = three(model)
    patch = read_patch(b)
    part = {"id": read_patch(a).id, "scale": 0.5, "facts": 1, "method": "memit", "hyperparameters": {}, "layers": [0]}
    stack = tmp_path / "stack.patch"
    write_patch(stack, replace(patch.manifest, stack=(part,)), pack(patch.deltas, patch.values, patch.keys))
    refused(lambda: apply([a, stack], model), Refused, "stack and a both hold patch", model)
    apply([stack, b], model)
    refused(lambda: apply([a], model), Refused, "a and stack both hold patch", model)

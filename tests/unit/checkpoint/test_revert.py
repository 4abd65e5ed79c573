from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.revert import revert
from kpatch.checkpoint.status import status
from kpatch.errors import BadInput, Damaged, Refused
from kpatch.patch.stack import stack
from tests.support.checkpoints import (
    WEIGHTS,
    make_patch,
    refused,
    three,
)


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


def test_a_stack_stands_for_the_patches_in_it_as_what_another_was_made_on(model: Path, tmp_path: Path) -> None:
    parent = make_patch(tmp_path / "parent.patch", model, seed=1)
    make_patch(tmp_path / "other.patch", model, seed=3)
    child = make_patch(tmp_path / "child.patch", model, seed=2, parents=[parent])
    parts = [tmp_path / "parent.patch", tmp_path / "other.patch"]
    stack(parts, tmp_path / "stack.patch")
    stack(parts, tmp_path / "half.patch", scales=[0.5, 1])
    apply([tmp_path / "half.patch"], model)
    refused(lambda: apply([tmp_path / "child.patch"], model), Refused, "not applied", model)  # another state
    revert(model)
    apply([tmp_path / "stack.patch"], model)
    apply([tmp_path / "child.patch"], model)
    refused(lambda: revert(model, ["stack"]), Refused, r"stack .* cannot be reverted: child", model)
    revert(model, [child])
    revert(model)
    apply([tmp_path / "child.patch", tmp_path / "stack.patch"], model)
    revert(model, all=True)
    assert not (model / ".kpatch").exists()


@pytest.mark.parametrize("wrong", [b"\xff\xff\xff\xff", b"\0"])
def test_damaged_kept_bytes_are_refused_before_a_weight_file_changes(model: Path, wrong: bytes) -> None:
    a, b, _ = three(model)
    apply([a, b], model)
    for path in (model / ".kpatch" / "base").iterdir():
        raw = path.read_bytes()
        for damaged in (raw[:40] + wrong + raw[40 + len(wrong) :], raw[:-1], None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            for chosen in (["a"], ["a", "b"]):
                refused(lambda chosen=chosen: revert(model, chosen), Damaged, "gone or damaged", model)  # type: ignore[misc]
                refused(
                    lambda chosen=chosen: revert(model, chosen, check=True),  # type: ignore[misc]
                    Damaged,
                    "gone or damaged",
                    model,
                )
            path.unlink(missing_ok=True)
            path.write_bytes(raw)
    revert(model, all=True)


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

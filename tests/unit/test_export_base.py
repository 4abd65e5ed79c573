"""Which model an adapter names as its base: one that other programs can load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import kpatch
from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.revert import revert
from kpatch.errors import BadInput, Refused
from kpatch.export import base, peft
from kpatch.export.base import BaseAddress, base_address
from kpatch.export.lora import adapter
from kpatch.models.address import Resolved
from kpatch.models.aliases import SMOLLM2, alias_of
from kpatch.patch.format import pack, read_patch, write_patch
from kpatch.patch.header import PatchInfo, read_header
from tests.support import checkpoints
from tests.support.saved import save_model, save_patch

COMMIT = "ab" * 20


def patch_of(folder: Path, name: str = "owner/model", revision: str | None = COMMIT) -> PatchInfo:
    """A patch for folder/model that says its base has this name."""
    if not (folder / "model").exists():
        checkpoints.make_checkpoint(folder / "model")
    path = folder / "x.patch"
    path.unlink(missing_ok=True)
    checkpoints.make_patch(path, folder / "model", keys=False)
    made = read_patch(path)
    known = replace(made.manifest.base, name=name, revision=revision)
    write_patch(path, replace(made.manifest, base=known), pack(made.deltas), force=True)
    return read_header(path)


def test_the_hub_id_and_commit_that_the_patch_was_made_for(tmp_path: Path) -> None:
    info = patch_of(tmp_path)
    found = base_address(info)
    assert found == BaseAddress("owner/model", COMMIT)
    peft.write(adapter(info), tmp_path / "lora", found)
    written = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (written["base_model_name_or_path"], written["revision"]) == ("owner/model", COMMIT)


def test_a_name_that_leads_nowhere_is_known_as_such(tmp_path: Path) -> None:
    info = patch_of(tmp_path, SMOLLM2.title, None)
    assert base_address(info) == BaseAddress(SMOLLM2.title, None, loadable=False)
    assert alias_of(SMOLLM2.title) == "smollm2"
    assert alias_of("model") is None


@pytest.mark.parametrize(
    ("given", "address", "revision"),
    [
        ("other/copy", "other/copy", None),  # the commit of one repository says nothing about another
        ("other/copy@v2", "other/copy", "v2"),
        ("owner/model", "owner/model", COMMIT),
        ("owner/model@main", "owner/model", "main"),
        ("gpt2-xl", "openai-community/gpt2-xl", None),
    ],
)
def test_a_hub_id(tmp_path: Path, given: str, address: str, revision: str | None) -> None:
    assert base_address(patch_of(tmp_path), given) == BaseAddress(address, revision)


def test_a_directory_that_the_patch_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = patch_of(tmp_path, "model", None)
    monkeypatch.chdir(tmp_path)
    assert base_address(info, "model") == BaseAddress(str(tmp_path / "model"))


def test_a_model_of_a_package_is_its_converted_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info, directory = patch_of(tmp_path, SMOLLM2.title, None), tmp_path / "model"
    made = Resolved("smollm2", SMOLLM2.title, "package", directory, None, "")
    monkeypatch.setattr(base, "resolve", lambda address, report: made if address == "smollm2" else None)
    assert base_address(info, "smollm2") == BaseAddress(str(directory))


def test_a_directory_with_other_weights_is_refused(tmp_path: Path) -> None:
    info = patch_of(tmp_path)
    other = checkpoints.make_checkpoint(tmp_path / "tuned", seed=5)
    with pytest.raises(Refused, match="does not fit") as caught:
        base_address(info, str(other))
    assert caught.value.hint is not None
    assert f"kpatch make FACTS --model {other}" in caught.value.hint


def test_another_architecture_is_not_taken_for_a_fine_tuned_model(tmp_path: Path) -> None:
    info = patch_of(tmp_path)
    other = checkpoints.make_checkpoint(tmp_path / "other", conv1d=True)
    with pytest.raises(Refused, match="is not there") as caught:
        base_address(info, str(other))
    assert "kpatch make" not in str(caught.value.hint)


def test_a_directory_that_carries_the_patch_would_count_it_twice(tmp_path: Path) -> None:
    info, directory = patch_of(tmp_path), tmp_path / "model"
    apply([info.path], directory)
    with pytest.raises(Refused, match="a second time"):
        base_address(info, str(directory))
    revert(directory)
    assert base_address(info, str(directory)).address == str(directory)


@pytest.mark.parametrize("given", ["modle", "../modle", "a/b/c", "owner/", "", "owner/model@", "gpt2-xl@"])
def test_what_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    info = patch_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput):
        base_address(info, given)


def test_a_base_may_be_a_path_and_other_kinds_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    patch = save_patch(tmp_path / "a.patch", model)
    done = kpatch.export_patch(patch, to="peft", out=tmp_path / "a", base=model)
    assert done.base is not None
    for given in ({"base": 5}, {"max_rank": "4"}):
        with pytest.raises(BadInput, match=f"`{next(iter(given))}`"):
            kpatch.export_patch(patch, to="peft", out=tmp_path / "b", **given)  # type: ignore[arg-type]
        assert not (tmp_path / "b").exists()

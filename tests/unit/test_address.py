"""Model addresses: what wins, what is refused and how."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from kpatch.errors import BadInput, Damaged
from kpatch.models import address
from kpatch.models.address import resolve
from kpatch.models.aliases import ALIASES
from kpatch.models.families import FAMILIES
from tests.support.addresses import refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make(tmp_path / "model")


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names or ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(b"{}")
    return folder


# Directories


def test_a_directory(model: Path) -> None:
    found = resolve(str(model))
    assert (found.name, found.kind, found.path, found.revision) == ("model", "directory", model, None)
    assert str(model) in found.said


def test_a_directory_wins_over_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2").kind == "directory"


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").kind == "directory"


def test_an_alias_wins_over_a_directory_that_holds_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: list[str]
) -> None:
    make(tmp_path / "gpt2", "notes.txt")
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2").name == "openai-community/gpt2"


def test_a_snapshot_of_the_hub_is_known_by_its_commit(tmp_path: Path) -> None:
    found = resolve(str(make(tmp_path / "models--EleutherAI--gpt-j-6b" / "snapshots" / COMMIT)))
    assert (found.name, found.revision) == ("EleutherAI/gpt-j-6b", COMMIT)


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "config.json", "tokenizer.json", "a.safetensors", "b.safetensors")
    index = {"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert resolve(str(folder)).path == folder
    (folder / "b.safetensors").unlink()
    assert "b.safetensors" in refused(folder).details[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "model", "config.json", "tokenizer.json", "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match="index"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("notes.txt",), "is not a model directory"),
        (("config.json", "tokenizer.json"), "without weights"),
        (("config.json", "tokenizer.json", "pytorch_model.bin"), "no safetensors weights, only pytorch_model.bin"),
        (("config.json", "model.safetensors"), "no tokenizer"),
    ],
)
def test_directories_that_are_refused(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    assert said in refused(make(tmp_path / "model", *names)).message


def test_a_directory_with_a_gguf_file_points_to_it(tmp_path: Path) -> None:
    error = refused(make(tmp_path / "model", "small.gguf"))
    assert str(tmp_path / "model" / "small.gguf") in (error.hint or "")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    assert "adapter" in refused(make(tmp_path / "lora", "adapter_config.json", "a.safetensors")).details[1]


def test_a_directory_that_an_apply_left_closed(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "config.json.kpatch-interrupted", "model.safetensors")
    with pytest.raises(Damaged, match="interrupted"):
        resolve(str(folder))


@pytest.mark.parametrize("what", ["./nowhere", "a/b/c", "../x", "with space", "gpt2@", "", "x.gguf", "smollm2@main"])
def test_addresses_that_lead_nowhere(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(what)


@pytest.mark.parametrize("what", ["owner/model@", "gpt2-xl@ ", "smollm2@"])
def test_an_empty_revision_is_refused(what: str) -> None:
    assert "ends in @ without a revision" in refused(what).message


def test_a_directory_whose_name_ends_in_an_at_sign_is_one(tmp_path: Path) -> None:
    folder = make(tmp_path / "model@", "config.json", "model.safetensors", "tokenizer.json")
    assert resolve(str(folder)).path == folder


def test_a_directory_has_no_revision(model: Path) -> None:
    assert "no revisions" in refused(f"{model}@main").message


def test_a_file_that_is_no_gguf(model: Path) -> None:
    assert str(model) in (refused(model / "model.safetensors").hint or "")


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has every model in safetensors; the list says what was asked of it."""
    asked: list[str] = []

    def model_info(self: object, repo: str, *, revision: str | None, **more: object) -> Any:
        asked.append(f"info {repo}@{revision}")
        return _info("config.json", "tokenizer.json", "model.safetensors", "model.fp16.safetensors", "onnx/m.json")

    def snapshot_download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append(f"get {repo}@{revision}: {' '.join(allow_patterns)}")
        return str(make(tmp_path / "hub" / repo / "snapshots" / revision))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def _info(*names: str) -> Any:
    return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name, size=2) for name in names])


def test_a_hub_id_at_a_revision(hub: list[str]) -> None:
    found = resolve("owner/name@v1")
    assert (found.name, found.kind, found.revision) == ("owner/name", "hub", COMMIT)
    assert COMMIT in found.said
    files = "config.json model.safetensors tokenizer.json"
    assert hub == ["info owner/name@v1", f"get owner/name@{COMMIT}: {files}"]


def test_an_alias_stands_for_its_hub_id(hub: list[str]) -> None:
    assert resolve("gpt-j@float16").name == "EleutherAI/gpt-j-6b"
    assert hub[0] == "info EleutherAI/gpt-j-6b@float16"


def test_a_repository_without_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda *args, **more: _info("config.json", "pytorch_model.bin")
    )
    assert refused("owner/name").details == ("found pytorch_model.bin",)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (hub_errors.RepositoryNotFoundError, "There is no model"),
        (hub_errors.GatedRepoError, "gated"),
        (hub_errors.RevisionNotFoundError, "no revision 'v9'"),
    ],
)
def test_what_the_hub_answers(kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def model_info(*args: object, **more: object) -> Any:
        error = kind.__new__(kind)
        Exception.__init__(error, "an answer of the hub")
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    assert said in refused("owner/name@v9").message


def test_without_the_hub_the_cache_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make(tmp_path / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **more: str(snapshot))
    found = resolve("owner/name")
    assert (found.path, found.revision) == (snapshot, COMMIT)


def test_without_the_hub_and_without_a_copy() -> None:
    error = refused("gpt-k")
    assert "out of reach" in error.message
    assert error.details[0] == "HF_HUB_OFFLINE is set"
    assert "gpt-j" in error.details[1]


# Aliases


def test_the_table_of_aliases() -> None:
    assert {"gpt-j", "gpt2-xl", "gpt2", "neox", "smollm2"} <= set(ALIASES)
    assert {alias.family for alias in ALIASES.values()} <= set(FAMILIES)


def test_resolving_imports_nothing_heavy() -> None:
    from tests.support.cli import python

    code = "import sys, kpatch.models.address as a; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert python(code) == "[]"
    assert address.__doc__

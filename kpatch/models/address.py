"""What a user calls a model → a checkpoint directory on this machine, and one line that says which."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from kpatch.errors import BadInput, Damaged
from kpatch.models.aliases import ALIASES, Package, closest
from kpatch.reporter import SILENT, Reporter
from kpatch.text import counted

_FILE = re.compile(r"[^/\\\x00]+\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


@dataclass(frozen=True)
class Resolved:
    """A model found: `path` is a checkpoint directory with config.json, *.safetensors and a tokenizer.

    `kind` is directory, hub, gguf or package; `revision` is a commit of 40 hex digits where there is one;
    `said` is the line to print, so that a user sees what an address came to.
    """

    address: str
    name: str
    kind: str
    path: Path
    revision: str | None
    said: str


def resolve(address: str | Path, report: Reporter = SILENT) -> Resolved:
    """Find the model called `address`: a directory, a GGUF file, an alias or a hub id, the last two with @revision.

    An existing checkpoint directory wins over an alias or a hub id of the same name.
    Raises BadInput for an address that leads nowhere or to something that cannot be edited,
    and Damaged for a directory that an interrupted apply left closed.
    """
    if not isinstance(address, str | PathLike):
        raise BadInput(
            f"`model` is a {type(address).__name__}, not a model's address",
            hint="kpatch.load_model(address) loads one, from an alias, a hub id, a directory or a GGUF file",
        )
    address = str(address)
    if not address.strip():
        raise BadInput("The model's address is empty", hint="`kpatch models` lists what can stand there")
    path = Path(address).expanduser()
    if path.is_dir() and (address not in ALIASES or (path / "config.json").is_file()):
        return _directory(address, path)
    if path.suffix.lower() == ".gguf":
        return _gguf(address, path, report)
    if path.is_file():
        raise BadInput(
            f"{address} is a file; a model is a directory, an alias, a hub id or a *.gguf file",
            hint=f"give the directory it lies in: {path.parent}",
        )
    name, revision = split_revision(address)
    if revision is not None and Path(name).is_dir():
        raise BadInput(
            f"{name} is a directory, which has no revisions", hint=f"give it without @{revision}, or its hub id"
        )
    alias = ALIASES.get(name)
    if alias is not None and isinstance(alias.source, Package):
        if revision is not None:
            raise BadInput(f"{name} comes from a Python package and has no revision {revision!r}", hint=f"give {name}")
        return _package(address, name, alias.source, report)
    if alias is None and not _HUB_ID.fullmatch(name):
        raise BadInput(
            f"There is no model directory {address}",
            details=["expected an alias, a hub id (owner/name), a checkpoint directory or a *.gguf file"],
            hint="`kpatch models` lists the aliases",
        )
    repo = alias.source if alias and isinstance(alias.source, str) else name
    return _hub(address, repo, revision, closest(name) if alias is None and "/" not in name else [], report)


def split_revision(address: str) -> tuple[str, str | None]:
    """An address as its name and the revision behind its @, None without one. Raises BadInput for an empty one."""
    name, at, revision = address.partition("@")
    if at and not revision.strip():
        raise BadInput(f"{address!r} ends in @ without a revision", hint=f"give {name}@main, or {name} alone")
    return name, revision or None


def _directory(address: str, path: Path) -> Resolved:
    check_directory(path, address)
    name = path.resolve().name
    revision = None
    parts = path.resolve().parts
    if len(parts) > 2 and parts[-2] == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", name):
        revision = name  # a folder of the hub's cache: its commit says more than its name
        name = parts[-3].removeprefix("models--").replace("--", "/")
    return Resolved(address, name, "directory", path, revision, f"{address}: checkpoint directory {path.resolve()}")


def _gguf(address: str, path: Path, report: Reporter) -> Resolved:
    from kpatch.models.gguf import convert

    if not path.is_file():
        raise BadInput(f"There is no file {address}", hint="give the path of a *.gguf file")
    made = convert(path, report=report)
    return Resolved(address, path.stem, "gguf", made, None, f"{address}: converted to float32 in {made}")


def _package(address: str, name: str, source: Package, report: Reporter) -> Resolved:
    from kpatch.models.gguf import convert, converted
    from kpatch.models.package import package_file

    made = converted(source.file, source.sha256)
    if made is None:
        made = convert(package_file(source, report), sha256=source.sha256, report=report)
    said = f"{name}: {source.title}, from the Python package {source.package} {source.version}, as float32 in {made}"
    return Resolved(address, source.title, "package", made, None, said)


def _hub(address: str, repo: str, revision: str | None, near: list[str], report: Reporter) -> Resolved:
    from kpatch.models.hub import hub_snapshot

    path, commit = hub_snapshot(repo, revision, near, report)
    check_directory(path, address)
    at = f" at commit {commit}" if commit else ""
    return Resolved(address, repo, "hub", path, commit, f"{address}: {repo}{at}, in {path}")


def check_directory(path: Path, called: str) -> None:
    """Refuse a directory that does not hold a whole checkpoint with safetensors weights and a tokenizer.

    Raises BadInput, or Damaged where kpatch itself closed the directory during an apply that did not end.
    """
    names = {entry.name for entry in path.iterdir()}
    if "config.json" not in names:
        _refuse_without_config(path, called, names)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(_shards(index) - names)
        if missing:
            raise BadInput(
                f"{called} is incomplete: {counted(len(missing), 'weight file')} missing",
                where=str(path),
                details=[f"missing {name}" for name in missing[:5]],
                hint="copy or download the checkpoint again",
            )
    if not index.is_file() and not (path / "model.safetensors").is_file():
        _refuse_without_weights(path, called, names)
    if not names.intersection(_TOKENIZER_FILES):
        raise BadInput(
            f"{called} has no tokenizer files",
            where=str(path),
            details=["expected tokenizer.json"],
            hint="copy the tokenizer's files from the model's original directory",
        )


def _refuse_without_config(path: Path, called: str, names: set[str]) -> None:
    if "config.json.kpatch-interrupted" in names:
        raise Damaged(
            f"{called} is in the middle of an interrupted apply",
            where=str(path),
            hint=f"`kpatch status {called}` says what to do",
        )
    if "model_index.json" in names:
        raise BadInput(
            f"{called} is a diffusion model, which makes pictures and does not continue a prompt", where=str(path)
        )
    details, hint = ["expected config.json"], "give the directory that holds config.json and the weights"
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if "adapter_config.json" in names:
        details.append("found adapter_config.json: an adapter, not a model")
        hint = "give the model that the adapter was made for"
    elif ggufs:
        details.append(f"found {ggufs[0]}")
        hint = f"give the file itself: {path / ggufs[0]}"
    raise BadInput(f"{called} is not a model directory", where=str(path), details=details, hint=hint)


def _refuse_without_weights(path: Path, called: str, names: set[str]) -> None:
    old = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack")))
    if old:
        raise BadInput(
            f"{called} has no safetensors weights, only {old[0]}",
            where=str(path),
            hint="convert it once: load it with transformers and call save_pretrained on a new directory",
        )
    found = [f"found {name}" for name in sorted(names) if name.endswith(".safetensors")][:3]
    raise BadInput(
        f"{called} is a model directory without weights",
        where=str(path),
        details=["expected model.safetensors, or model.safetensors.index.json and its shards", *found],
        hint="copy or download the weights",
    )


def weight_files(path: Path) -> list[str]:
    """The names of the weight files that a checkpoint directory is loaded from. Raises BadInput for a broken index."""
    index = path / "model.safetensors.index.json"
    return sorted(_shards(index)) if index.is_file() else ["model.safetensors"]


def _shards(index: Path) -> set[str]:
    """The files that an index names, all beside it."""
    try:
        value = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken_index(index, str(error)) from error
    table = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise _broken_index(index, "expected a weight_map from tensor to file name")
    if "metadata" not in value:
        raise _broken_index(index, 'expected an object "metadata", empty or not: transformers reads no index without')
    files = set(table.values())
    wrong = [name for name in sorted(files) if not _FILE.fullmatch(name) or (index.parent / name).is_dir()]
    if wrong:
        raise _broken_index(index, f"expected names of *.safetensors files beside it, found {wrong[0]!r}")
    return files


def _broken_index(index: Path, why: str) -> BadInput:
    return BadInput(
        "The index of the weight files cannot be read",
        where=str(index),
        details=[why],
        hint="copy or download the checkpoint again",
    )

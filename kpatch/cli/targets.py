"""What a command works on: the checkpoint meant where none is named, the model at an address, fact files, patches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kpatch.cache import atomic_write_text, cache_dir, cache_root
from kpatch.cli.output import Output
from kpatch.errors import BadInput, KpatchError

if TYPE_CHECKING:
    from kpatch.facts.fact import FactFile
    from kpatch.models.model import Model

_LAST_APPLIED = "last-applied.json"
_FACT_FILES = (".yaml", ".yml", ".jsonl", ".csv")


# Checkpoints: `kpatch revert` without a directory means the one last applied to


def remember_checkpoint(model: Path) -> None:
    """Note the checkpoint last applied to. A cache that cannot be written is no reason to fail."""
    with suppress(KpatchError, OSError):
        atomic_write_text(cache_dir() / _LAST_APPLIED, json.dumps({"model": str(model)}))


def forget_checkpoint(model: Path) -> None:
    """Drop the note when it names this checkpoint."""
    if last_applied() == model:
        with suppress(OSError):
            (cache_root() / _LAST_APPLIED).unlink()


def last_applied() -> Path | None:
    """The checkpoint last applied to, if it is known and still there."""
    try:
        value = json.loads((cache_root() / _LAST_APPLIED).read_text(encoding="utf-8"))
        path = Path(value["model"])
        return path if path.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def default_checkpoint(output: Output) -> Path:
    """The checkpoint in the current directory, else the one last applied to, which is named first.

    Raises BadInput where there is neither.
    """
    here = Path()
    if (here / ".kpatch").is_dir() or (here / "config.json").is_file():
        return here
    last = last_applied()
    if last is None:
        raise BadInput(
            "There is no checkpoint here, and none was applied to before", hint="name its directory: MODEL_DIR"
        )
    output.note(f"{last}: the checkpoint last applied to")
    return last


# Models, facts and patches


def open_model(
    output: Output,
    address: str,
    device: str,
    dtype: str,
    modules: dict[str, str] | None,
    max_memory: int | dict[str, int] | None = None,
    upto: int | None = None,
) -> Model:
    """Load the model called `address` and print what it is; a wrong address fails before torch is imported.

    `max_memory` and `upto` are as for `kpatch.models.model.open_model`.
    """
    from kpatch.models.address import resolve

    resolved = resolve(address, output)
    from kpatch.models import model

    return model.open_model(
        resolved, device=device, dtype=dtype, modules=modules, max_memory=max_memory, upto=upto, report=output
    )


def open_facts(output: Output, path: Path, *, conflicts: bool = False) -> FactFile:
    """Read a fact file and print its warnings; with `conflicts`, facts that contradict are kept. Raises BadInput."""
    from kpatch.facts.load import load_facts

    file = load_facts(path, conflicts=conflicts)
    for warning in file.warnings:
        output.warn(warning)
    return file


def facts_and_model(first: str, second: str, suffixes: Sequence[str] = _FACT_FILES) -> tuple[Path, str]:
    """FACTS and MODEL from two arguments in either order; a fact file is a file with one of the `suffixes`."""
    if _is_file(second, suffixes) and not _is_file(first, suffixes):
        first, second = second, first
    return Path(first), second


def _is_file(argument: str, suffixes: Sequence[str]) -> bool:
    path = Path(argument)
    return path.suffix.lower() in suffixes and path.is_file()


def check_patches(patches: Sequence[Path]) -> None:
    """Read the patches' headers, so that a wrong file fails before a model is loaded. Raises as `read_header` does."""
    from kpatch.patch.header import read_header

    for path in patches:
        read_header(path)

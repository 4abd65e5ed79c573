"""Which checkpoint was last applied to: what `kpatch revert` means when none is named. No torch.

Which checkpoint a command without MODEL_DIR means.

The model that a command names, in memory: resolved, said which, loaded.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from kpatch.cache import atomic_write, cache_dir, cache_root
from kpatch.cli.output import Output
from kpatch.errors import BadInput, KpatchError

if TYPE_CHECKING:
    from kpatch.models.model import Model


_NAME = "last-applied.json"


def remember(model: Path) -> None:
    """Note the checkpoint last applied to. A cache that cannot be written is no reason to fail."""
    text = json.dumps({"model": str(model)}, ensure_ascii=True)
    with suppress(KpatchError, OSError):
        atomic_write(cache_dir() / _NAME, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def last_applied() -> Path | None:
    """The checkpoint last applied to, if it is known and still there."""
    try:
        value = json.loads((cache_root() / _NAME).read_text(encoding="utf-8"))
        path = Path(value["model"])
        return path if path.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(model: Path) -> None:
    """Drop the note when it names this checkpoint."""
    if last_applied() == model:
        with suppress(OSError):
            (cache_root() / _NAME).unlink()


def default_checkpoint(out: Output) -> Path:
    """The checkpoint in the current directory, else the one last applied to, which is named first.

    Raises BadInput where there is neither.
    """
    here = Path()
    if (here / ".kpatch").is_dir() or (here / "config.json").is_file():
        return here
    from kpatch.cli.targets import last_applied

    last = last_applied()
    if last is None:
        raise BadInput("No checkpoint here, and none that was applied to before", hint="name the directory: MODEL_DIR")
    out.note(f"{last}: the checkpoint last applied to")
    return last


def load(out: Output, address: str, device: str, dtype: str, modules: dict[str, str] | None) -> Model:
    """Load the model called `address`, and print what it came to; a wrong address is told before torch is imported."""
    from kpatch.models.address import resolve

    resolved = resolve(address, out)
    out.note(resolved.said)
    with out.task(f"Loading {resolved.name}"):
        from kpatch.models.model import load_model

        return load_model(resolved, device=device, dtype=dtype, modules=modules)

"""kpatch: make, apply, stack and take back knowledge patches for language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "apply",
    "diff_checkpoints",
    "diff_patches",
    "load_facts",
    "make",
    "patched",
    "read_patch",
    "revert",
    "stack",
]

if TYPE_CHECKING:
    from kpatch.checkpoint.apply import apply
    from kpatch.checkpoint.diff import diff_checkpoints
    from kpatch.checkpoint.revert import revert
    from kpatch.edit.pipeline import make
    from kpatch.evaluate.patched import patched
    from kpatch.facts.load import load_facts
    from kpatch.patch.diff import diff_patches
    from kpatch.patch.format import read_patch
    from kpatch.patch.stack import stack

# Names are imported when they are first asked for, so that `import kpatch` costs nothing.
_HOMES = {
    "apply": "kpatch.checkpoint.apply",
    "diff_checkpoints": "kpatch.checkpoint.diff",
    "diff_patches": "kpatch.patch.diff",
    "load_facts": "kpatch.facts.load",
    "make": "kpatch.edit.pipeline",
    "patched": "kpatch.evaluate.patched",
    "read_patch": "kpatch.patch.format",
    "revert": "kpatch.checkpoint.revert",
    "stack": "kpatch.patch.stack",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kpatch' has no attribute {name!r}")

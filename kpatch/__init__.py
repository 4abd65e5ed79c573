"""kpatch: make, apply, stack and take back knowledge patches for language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kpatch._version import __version__

__all__ = [
    "__version__",
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
    from kpatch.checkpoint.diff.checkpoints import diff_checkpoints
    from kpatch.checkpoint.revert import revert
    from kpatch.edit.make import make
    from kpatch.evaluate.patched import patched
    from kpatch.facts.load import load_facts
    from kpatch.patch.compare import diff_patches
    from kpatch.patch.format import read_patch
    from kpatch.patch.stack import stack

# Names are imported when they are first asked for, so that `import kpatch` costs nothing.
_HOMES = {
    "apply": "kpatch.checkpoint.apply",
    "diff_checkpoints": "kpatch.checkpoint.diff.checkpoints",
    "diff_patches": "kpatch.patch.compare",
    "load_facts": "kpatch.facts.load",
    "make": "kpatch.edit.make",
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

"""kpatch: make, apply, stack and take back knowledge patches for language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kpatch._version import __version__

__all__ = [
    "__version__",
    "answer_questions",
    "apply",
    "ask",
    "diff_checkpoints",
    "diff_patches",
    "evaluate_facts",
    "export_patch",
    "find_memories",
    "load_facts",
    "load_model",
    "load_questions",
    "make",
    "patched",
    "probe_facts",
    "read_patch",
    "recover",
    "revert",
    "stack",
    "stack_resolved",
    "status",
    "trace_facts",
    "train_editor",
    "tune_settings",
    "verify",
    "verify_fit",
    "view_patch",
]

if TYPE_CHECKING:
    from kpatch.checkpoint.apply import apply
    from kpatch.checkpoint.diff.checkpoints import diff_checkpoints
    from kpatch.checkpoint.fit import verify_fit
    from kpatch.checkpoint.recover import recover
    from kpatch.checkpoint.revert import revert
    from kpatch.checkpoint.status import status
    from kpatch.edit.make import make
    from kpatch.edit.resolve import solve_again as stack_resolved
    from kpatch.evaluate.answers import ask
    from kpatch.evaluate.assess import assess as evaluate_facts
    from kpatch.evaluate.closed_book import answer_questions
    from kpatch.evaluate.patched import patched
    from kpatch.evaluate.probe import rank_objects as probe_facts
    from kpatch.export.formats import export_patch
    from kpatch.facts.load import load_facts
    from kpatch.facts.question_files import load_questions
    from kpatch.memories.patch_view import view_patch
    from kpatch.memories.run import find_memories
    from kpatch.mend.editor import train_editor
    from kpatch.models.model import open_model as load_model
    from kpatch.patch.check import verify
    from kpatch.patch.compare import diff_patches
    from kpatch.patch.format import read_patch
    from kpatch.patch.stack import stack
    from kpatch.trace.run import trace as trace_facts
    from kpatch.tune.search import tune as tune_settings

# Names are imported when they are first asked for, so that `import kpatch` costs nothing. A name that a part of the
# package has (trace, evaluate) cannot stand for a function too, and one that says little without its module is longer.
_HOMES = {
    "answer_questions": ("kpatch.evaluate.closed_book", "answer_questions"),
    "apply": ("kpatch.checkpoint.apply", "apply"),
    "ask": ("kpatch.evaluate.answers", "ask"),
    "diff_checkpoints": ("kpatch.checkpoint.diff.checkpoints", "diff_checkpoints"),
    "diff_patches": ("kpatch.patch.compare", "diff_patches"),
    "evaluate_facts": ("kpatch.evaluate.assess", "assess"),
    "export_patch": ("kpatch.export.formats", "export_patch"),
    "find_memories": ("kpatch.memories.run", "find_memories"),
    "load_facts": ("kpatch.facts.load", "load_facts"),
    "load_model": ("kpatch.models.model", "open_model"),
    "load_questions": ("kpatch.facts.question_files", "load_questions"),
    "make": ("kpatch.edit.make", "make"),
    "patched": ("kpatch.evaluate.patched", "patched"),
    "probe_facts": ("kpatch.evaluate.probe", "rank_objects"),
    "read_patch": ("kpatch.patch.format", "read_patch"),
    "recover": ("kpatch.checkpoint.recover", "recover"),
    "revert": ("kpatch.checkpoint.revert", "revert"),
    "stack": ("kpatch.patch.stack", "stack"),
    "stack_resolved": ("kpatch.edit.resolve", "solve_again"),
    "status": ("kpatch.checkpoint.status", "status"),
    "trace_facts": ("kpatch.trace.run", "trace"),
    "train_editor": ("kpatch.mend.editor", "train_editor"),
    "tune_settings": ("kpatch.tune.search", "tune"),
    "verify": ("kpatch.patch.check", "verify"),
    "verify_fit": ("kpatch.checkpoint.fit", "verify_fit"),
    "view_patch": ("kpatch.memories.patch_view", "view_patch"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        module, function = _HOMES[name]
        return getattr(import_module(module), function)
    raise AttributeError(f"module 'kpatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

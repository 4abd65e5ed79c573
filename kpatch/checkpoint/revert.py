"""Taking patches off a checkpoint, bit for bit."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from kpatch.checkpoint.apply import ApplyReport, carry_out, ready, report_of
from kpatch.checkpoint.commit import system_errors, undisturbed
from kpatch.checkpoint.plan import plan_revert
from kpatch.checkpoint.records import Applied, AppliedPatch
from kpatch.checkpoint.shards import open_checkpoint
from kpatch.errors import BadInput, Refused
from kpatch.patch.header import read_header
from kpatch.patch.sources import PatchSource, ReadPatch, patch_list
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable

_PREFIX = re.compile(r"[0-9a-f]{4,64}")


def revert(
    model_dir: str | Path,
    patches: PatchSource | Iterable[PatchSource] | None = None,
    all: bool = False,
    *,
    check: bool = False,
    force: bool = False,
    report: Reporter = SILENT,
) -> ApplyReport:
    """Take patches off: the top one, those named (file, id, id prefix, or the name it was applied by), or `all`.

    The weights are what they would be had those patches never been applied; without any patch left, the original
    bytes, and .kpatch/ is gone. `check` writes nothing, `force` replaces write-protected files.

    Raises BadInput, Refused (not applied, a patch made on top of it is, locked), Damaged (modified outside kpatch).
    """
    start = time.monotonic()
    store = ready(model_dir, write=not check, report=report)
    with undisturbed(store), system_errors(store.model):
        checkpoint = open_checkpoint(model_dir)
        applied = store.applied()
        if not applied.patches:
            raise Refused(f"No patch is applied to {checkpoint.given}", hint="`kpatch status` lists what is applied")
        named = [] if patches is None else patch_list(patches)
        chosen = _choose(applied, named, all, checkpoint.given)
        plan = plan_revert(chosen, checkpoint, store, force=force, check=check, report=report)
    if check:
        return report_of(plan, {}, start, checkpoint.given, checked_only=True)
    outcomes = carry_out(plan, store, report)
    return report_of(plan, outcomes, start, checkpoint.given)


def _choose(applied: Applied, patches: Sequence[PatchSource], all: bool, given: str) -> list[str]:
    if all:
        if patches:
            raise BadInput("Give the patches to revert or `all`, not both")
        return list(applied.ids)
    if not patches:
        return [applied.patches[-1].id]
    ids = [patch.id if isinstance(patch, ReadPatch) else str(patch) for patch in patches]
    return [_find(applied, asked, given).id for asked in ids]


def _find(applied: Applied, asked: str, given: str) -> AppliedPatch:
    """The applied patch a user means: a file's id first, then an id or its beginning, then a name."""
    if Path(asked).is_file():
        wanted = read_header(asked).id
        found = [patch for patch in applied.patches if patch.id == wanted]
    else:
        found = [patch for patch in applied.patches if _PREFIX.fullmatch(asked) and patch.id.startswith(asked)]
        found = found or [patch for patch in applied.patches if patch.name == Path(asked).stem]
    if len(found) == 1:
        return found[0]
    listed = [f"{patch.id[:12]}  {printable(patch.name, 80)}" for patch in found or applied.patches]
    if not found:
        raise Refused(f"{asked} is not applied to {given}", details=["applied are:", *listed])
    raise BadInput(f"{asked} can mean several patches of {given}", details=listed, hint="give more of the id")

"""The adapters that a patch can be written as, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kpatch import arguments
from kpatch.errors import BadInput
from kpatch.export import gguf, peft
from kpatch.export.base import BaseAddress, base_address
from kpatch.export.lora import Adapter, adapter
from kpatch.export.network import modules_in
from kpatch.patch.header import read_header
from kpatch.patch.sources import PatchSource
from kpatch.reporter import SILENT, Reporter


@dataclass(frozen=True)
class Exported:
    """What was written to `path`: its bytes, the adapter in it, and the base that it names (None for GGUF)."""

    path: Path
    to: str
    bytes: int
    adapter: Adapter
    base: BaseAddress | None


def export_patch(
    patch: PatchSource,
    out: str | Path,
    *,
    to: str = "peft",
    max_rank: int | None = None,
    base: str | Path | None = None,
    force: bool = False,
    report: Reporter = SILENT,
) -> Exported:
    """Write a patch as a LoRA adapter: `to` is "peft" (a directory) or "gguf" (a file, which `force` replaces).

    `max_rank` cuts the factors, and what is cut off is measured. `base` is the hub id, directory or alias that a PEFT
    adapter names as its base (default: the hub id that the patch was made for); where it is a directory, the modules
    are called as in its network, which may be another form of the model, alone or with vision.
    Raises BadInput for another format and for what an adapter cannot hold, Refused where `out` exists and for a
    directory that the patch does not fit, Damaged for a patch that is not sound.
    """
    if to not in ("peft", "gguf"):
        raise BadInput(
            f"`to={to}` is no adapter",
            details=["expected peft or gguf"],
            hint="`kpatch.apply(patch, model_dir, out=NEW_DIR)` writes a whole checkpoint with the patch in it",
        )
    arguments.whole_number(max_rank, "max_rank", least=1)
    if base is not None and to == "gguf":
        raise BadInput("`base` is for PEFT; a GGUF adapter names no base", hint="leave `base` out")
    if force and to == "peft":
        raise BadInput("`force` replaces a file, and PEFT takes a directory", hint="give a new directory as `out`")
    info = read_header(patch)
    if to == "gguf":
        found = adapter(info, max_rank, report)
        return Exported(Path(out), to, gguf.write(found, out, force), found, None)
    if base is not None:
        arguments.path(base, "base")
        base = str(base)
    address = base_address(info, base, report)
    names = None if address.network is None else modules_in(address.network, info)
    found = adapter(info, max_rank, report, names)
    return Exported(Path(out), to, peft.write(found, out, address), found, address)

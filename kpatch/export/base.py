"""The base model of an adapter, as other programs find it: a hub id with its revision, or a directory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from kpatch.checkpoint.fit import settled_store, verify_fit
from kpatch.checkpoint.shards import open_checkpoint
from kpatch.errors import BadInput, Refused
from kpatch.export.network import BaseNetwork, base_network
from kpatch.models.address import resolve, split_revision
from kpatch.models.aliases import ALIASES
from kpatch.patch.header import PatchInfo
from kpatch.reporter import SILENT, Reporter

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class BaseAddress:
    """`address` is a hub id or a directory; `loadable` is False for a name under which no program finds the model.

    `network` is what a directory holds; None for a hub id, which is not looked up.
    """

    address: str
    revision: str | None = None
    loadable: bool = True
    network: BaseNetwork | None = field(default=None, compare=False)


def base_address(info: PatchInfo, base: str | None = None, report: Reporter = SILENT) -> BaseAddress:
    """Where the model that a patch was made for is found: at `base`, or by what the patch says of it.

    `base` is a hub id with optional @revision, a checkpoint directory, a GGUF file or an alias. A directory must fit
    the patch. A hub id is not looked up. Without `base` the patch's own hub id and commit are taken.
    Raises BadInput for an address of another form, Refused for a directory that the patch does not fit or that
    carries it already.
    """
    if base is None:
        known = info.manifest.base
        return BaseAddress(known.name, known.revision, _HUB_ID.fullmatch(known.name) is not None)
    if not Path(base).expanduser().exists():
        name, revision = split_revision(base)
        alias = ALIASES.get(name)
        repo = alias.source if alias is not None and isinstance(alias.source, str) else name
        if _HUB_ID.fullmatch(repo):
            return BaseAddress(repo, revision or _known_revision(info, repo))
        if alias is None:
            raise BadInput(
                f"There is no model directory {base}",
                details=["expected a hub id (owner/name), a checkpoint directory, a GGUF file or an alias"],
            )
    directory = resolve(base, report).path.absolute()
    _require_plain_base(info, directory, report)
    network = base_network(directory)
    if network is None:
        report.warn(
            f"transformers does not build the network of {directory} by itself; the adapter's modules are named as in"
            f" {info.name}"
        )
    return BaseAddress(str(directory), network=network)


def _known_revision(info: PatchInfo, repo: str) -> str | None:
    return info.manifest.base.revision if info.manifest.base.name == repo else None


def _require_plain_base(info: PatchInfo, directory: Path, report: Reporter) -> None:
    found = verify_fit(info.path, directory, report)
    if not found.ok:
        raise found.error()
    carried = set(settled_store(open_checkpoint(directory)).applied().ids)
    if carried & info.manifest.holds(info.id):
        raise Refused(
            f"{directory} carries {info.name} already; an adapter on it would add the change a second time",
            hint=f"give the base without it, or take it off with `kpatch revert {info.path} {directory}`",
        )

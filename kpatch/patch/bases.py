"""Were several patches made for the same model? Weight by weight, by what their manifests say. No weights are read."""

from __future__ import annotations

from collections.abc import Sequence

from kpatch.errors import KpatchError, Refused
from kpatch.patch.fingerprint import same_sketch
from kpatch.patch.header import PatchInfo
from kpatch.patch.manifest import Base, BaseWeight
from kpatch.patch.text import printable
from kpatch.patch.union import called
from kpatch.reporter import SILENT, Reporter


def common_base(patches: Sequence[PatchInfo], report: Reporter = SILENT) -> Base:
    """The base that all patches were made for, with every weight that one of them changes.

    Weights that several change must be the same by SHA-256, or by sketch where one patch was made for a copy in
    another dtype (which is said). A patch that shares no weight with those before it must name the same model.
    Raises Refused with the two patches that do not go together.
    """
    weights: dict[str, tuple[BaseWeight, PatchInfo]] = {}
    cast = tokenizer = None
    for number, info in enumerate(patches):
        base = info.manifest.base
        shared = sorted(weights.keys() & base.weights.keys())
        for name in shared:
            cast = _compare(name, weights[name], (base.weights[name], info)) or cast
        if number and not shared:
            _same_name(patches[0], info)
        if base.tokenizer is not None:
            tokenizer = tokenizer or base.tokenizer
            if tokenizer != base.tokenizer:
                report.warn(f"{called(info)} was made with another tokenizer than the patches before it")
        for name, weight in base.weights.items():
            weights.setdefault(name, (weight, info))
    if cast:
        report.note(cast)
    first = patches[0].manifest.base
    return Base(
        first.name,
        first.family,
        {name: weights[name][0] for name in sorted(weights)},
        first.revision,
        tokenizer,
        first.extra,
    )


def _compare(name: str, first: tuple[BaseWeight, PatchInfo], second: tuple[BaseWeight, PatchInfo]) -> str | None:
    (a, info), (b, other) = first, second
    shown = printable(name, 120)
    if a.shape != b.shape:
        shapes = f"{shown} has shape {list(a.shape)} for one and {list(b.shape)} for the other"
        raise _different(info, other, [shapes])
    if (a.dtype, a.sha256) == (b.dtype, b.sha256):
        return None
    if a.dtype != b.dtype and same_sketch(a.sketch, a.dtype, b.sketch, b.dtype):
        return f"{called(other)} was made for the same weights as {called(info)}, stored as {b.dtype} not {a.dtype}"
    raise _different(info, other, [f"{shown}: sha256 {a.sha256[:12]}… for one and {b.sha256[:12]}… for the other"])


def _same_name(info: PatchInfo, other: PatchInfo) -> None:
    a, b = info.manifest.base, other.manifest.base
    tokens = {base.tokenizer for base in (a, b)} - {None}
    if (a.name, a.revision, a.family) != (b.name, b.revision, b.family) or len(tokens) > 1:
        names = " and ".join(f"{base.name}{f' at {base.revision}' if base.revision else ''}" for base in (a, b))
        raise _different(info, other, ["they change no weight in common that could show otherwise", f"bases {names}"])


def _different(info: PatchInfo, other: PatchInfo, details: list[str]) -> KpatchError:
    return Refused(
        f"{called(info)} and {called(other)} were made for different models",
        details=[printable(line, 300) for line in details],
        hint="`kpatch show` names a patch's base; patches go together when made for the same weights",
    )

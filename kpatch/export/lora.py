"""A patch as a LoRA adapter: for every linear module lora_A [r, in] and lora_B [out, r] with ΔW = lora_B @ lora_A.

All modules have one rank r and alpha = r; smaller ones are filled up with zeros. PEFT would take a rank for each
module, but llama.cpp divides the one alpha of the file by each tensor's own rank, and older vLLM divides it by the
one r of the configuration. With one rank the scale is 1 in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.models.families import FAMILIES
from kpatch.patch.delta import Delta, LowRank, rank_within
from kpatch.patch.format import read_delta
from kpatch.patch.header import PatchInfo
from kpatch.patch.interference import apply_to, stored_keys
from kpatch.patch.manifest import Manifest
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable

# Half a float32 step: what the factors' own rounding costs anyway.
_ROUNDING = 2.0**-24
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embed_in", "embed_positions", "word_embeddings")


@dataclass(frozen=True)
class Module:
    """One linear module of the adapter: a [r, in] and b [out, r] in float32, `rank` of r columns not zero.

    error  ‖Δ − b a‖ / ‖Δ‖ (Frobenius) of what was cut off; key_error  the same on the keys of the patch's facts,
    ‖(Δ − b a) K‖ / ‖Δ K‖, None where the patch stores none for this module
    """

    name: str
    a: Tensor
    b: Tensor
    rank: int
    error: float
    key_error: float | None


@dataclass(frozen=True)
class Adapter:
    """All modules, at one rank; the scale is alpha / r = 1."""

    patch: PatchInfo
    rank: int
    modules: tuple[Module, ...]


def adapter(
    info: PatchInfo,
    max_rank: int | None = None,
    report: Reporter = SILENT,
    names: Mapping[str, str] | None = None,
) -> Adapter:
    """The adapter of a patch, exact to float32 unless `max_rank` cuts singular values off, which is measured.

    `names` is the module of each weight in the network that the adapter is for; without it, the patch's own names
    count.
    Raises BadInput for changes that a LoRA adapter cannot hold (norms, biases, embeddings, experts in one tensor) and
    for a dense change of high rank without `max_rank`; Damaged for a patch that is not sound.
    """
    manifest = info.manifest
    _require_linear(info)
    if manifest.parents:
        below = ", ".join(parent[:12] for parent in manifest.parents)
        report.warn(f"made on top of patch {below}, which is not in this adapter; `kpatch stack` puts them together")
    cut: list[tuple[str, LowRank, float, float | None]] = []
    with report.task("Finding factors", len(manifest.deltas), "weight") as advance:
        for weight in sorted(manifest.deltas):
            cut.append((weight, *_cut(info, weight, read_delta(info, weight), max_rank)))
            advance(1)
    rank = max(factors.rank for _, factors, _, _ in cut)
    modules = []
    for weight, factors, error, key_error in cut:
        turned = factors.transposed() if manifest.transposed(weight) else factors
        a, b = torch.zeros(rank, turned.shape[1]), torch.zeros(turned.shape[0], rank)
        a[: turned.rank], b[:, : turned.rank] = turned.right.float(), turned.left.float()
        module = module_name(weight, manifest) if names is None else names[weight]
        modules.append(Module(module, a, b, turned.rank, error, key_error))
    return Adapter(info, rank, tuple(modules))


def module_name(weight: str, manifest: Manifest) -> str:
    """The module of a loaded transformers model that a stored weight belongs to.

    Checkpoints may leave out the model's prefix ("h.0…" for "transformer.h.0…").
    """
    name = weight.removesuffix(".weight")
    family = FAMILIES.get(manifest.base.family)
    if family is None or name.startswith(f"{family.layers}."):
        return name
    parts = family.layers.split(".")
    for number in range(1, len(parts)):
        if name.startswith(".".join(parts[number:]) + "."):
            return ".".join([*parts[:number], name])
    return name


def _require_linear(info: PatchInfo) -> None:
    weights = info.manifest.base.weights
    wrong = [
        name
        for name in sorted(info.manifest.deltas)
        if len(weights[name].shape) != 2
        or not name.endswith(".weight")
        or name.removesuffix(".weight").rpartition(".")[2] in _EMBEDDINGS
    ]
    if wrong:
        more = [f"… and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise BadInput(
            f"{info.name} changes more than linear layers, which is all a LoRA adapter holds",
            details=[f"{printable(name, 120)} {list(weights[name].shape)}" for name in wrong[:10]] + more,
            hint="`to=checkpoint` holds everything",
        )


def _cut(info: PatchInfo, weight: str, delta: Delta, max_rank: int | None) -> tuple[LowRank, float, float | None]:
    """Balanced factors of a delta, the relative error of the cut, and that error on the facts' keys."""
    if isinstance(delta, LowRank):
        u, s, vh = delta.svd()
    else:
        u, s, vh = torch.linalg.svd(delta.dense(torch.float64), full_matrices=False)
    whole = rank_within(s, _ROUNDING)
    rows, cols = delta.shape
    if max_rank is None and whole * (rows + cols) > rows * cols:
        raise BadInput(
            f"The change of {printable(weight, 120)} has rank {whole}: as factors it would be larger than as a matrix",
            hint="give `max_rank`, such as 64; what is cut off is measured and reported",
        )
    rank = whole if max_rank is None else min(whole, max_rank)
    root = s[:rank].sqrt()
    factors = LowRank(u[:, :rank] * root, root[:, None] * vh[:rank])
    norm = float(torch.linalg.vector_norm(s))
    error = float(torch.linalg.vector_norm(s[rank:])) / norm if norm and rank < whole else 0.0
    if not error:
        return factors, 0.0, 0.0 if stored_keys(info, weight) is not None else None
    keys = stored_keys(info, weight)
    if keys is None:
        return factors, error, None
    transposed = info.manifest.transposed(weight)
    wanted = apply_to(delta, keys, transposed)  # [d, n]
    missing = wanted - apply_to(factors, keys, transposed)
    size = float(wanted.norm())
    return factors, error, float(missing.norm()) / size if size else 0.0

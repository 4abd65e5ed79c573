"""How large a change is beside the weights it changes, and from what size on a model begins to break.

The share of one weight is ‖Σ Δ‖ / ‖W‖ (Frobenius), with W as it was before any patch; the size of a patch or of a sum
is the root of the sum of the squares of the shares. Both norms are known from patch files. No torch is imported
unless deltas are read: `kpatch show` stands on this module.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING

from kpatch import parallel
from kpatch.patch.header import PatchInfo
from kpatch.patch.manifest import Manifest
from kpatch.reporter import Advance

if TYPE_CHECKING:
    from kpatch.patch.delta import Delta
    from kpatch.patch.summands import Part, ReplacedFacts, Summands

# kpatch warns above this: just before the size at which an ordinary patch, entered at growing scales, began to break
# the model measured. docs/results.md has the table, benchmarks/breaking.py makes it.
WARN_ABOVE = 0.8
MEASURED_ON = "SmolLM2-135M-Instruct"
# The sizes at which its perplexity had risen by 5 and by 50 percent
RISEN_5 = 0.86
RISEN_50 = 1.38

_KEPT = 1 << 26  # 256 MiB in float32

# The next steps that a warning names: for one patch, and for several
FEWER = "make it of fewer facts, or ask the patched model before you rely on it (`kpatch eval`)"
RESOLVE = "`kpatch stack --resolve` may need less, `kpatch revert` takes one back, and `kpatch eval` measures"


def size(shares: Iterable[float]) -> float:
    """The size of a change: √ Σ share² over its weights."""
    return math.hypot(*shares)  # which no finite share makes overflow


def share(deltas: Sequence[Delta], norm: float) -> float:
    """‖Σ Δ‖ / ‖W‖ of one weight whose norm is `norm`; low-rank deltas go through their Gram matrices.

    A weight of zeros counts as 0 where nothing changes it, else as infinite. Raises ValueError as `total`.
    """
    from kpatch.patch.delta import total

    changed = total(deltas).norm()
    return changed / norm if norm else math.inf if changed else 0.0


def weight_norm(manifest: Manifest, weight: str) -> float:
    """‖W‖ of a weight that a patch changes, before it."""
    sketch, delta = manifest.base.weights[weight].sketch, manifest.deltas[weight]
    if sketch:
        return sketch[0]
    return delta.norm / delta.relative_norm if delta.relative_norm else 0.0


def size_of(manifest: Manifest) -> float:
    """The size of one patch. A patch without facts is no edit, and counts as 0."""
    return size(delta.relative_norm for delta in manifest.deltas.values()) if manifest.facts else 0.0


def size_of_sum(
    weights: Iterable[Sequence[Part]],
    replaced: ReplacedFacts | None = None,
    apart: Collection[str] = (),
    keep: dict[tuple[str, str], Summands] | None = None,
) -> float:
    """The size of what several patches add up to, given the parts that change each weight.

    `apart` are ids of patches that are added as they are, whatever the others. Deltas are read only where the
    headers' norms leave it open whether the sum is worth a warning: below that, what comes back is
    √ Σ (Σ share)², which the plain sum cannot pass. Patches without facts are left out. `keep` is given the sums that
    were found, by the first part's patch and its name of the weight, while they have no more than _KEPT numbers: they
    are dear to find again.

    Raises Damaged for a patch that is not sound.
    """
    found = [edits for parts in weights if (edits := [part for part in parts if part.manifest.facts])]
    bound = size(sum(_stored_share(part) for part in parts) for parts in found)
    if bound <= WARN_ABOVE or all(len(parts) == 1 for parts in found):
        return bound
    from kpatch.patch.delta import one_thread
    from kpatch.patch.summands import summands

    lock, room = Lock(), _KEPT

    def measured(parts: Sequence[Part], advance: Advance) -> float:
        nonlocal room
        together = summands([part for part in parts if part.patch.id not in apart], replaced)
        with lock:
            room -= sum(delta.stored_numbers for delta in together)
            if keep is not None and room >= 0:
                keep[parts[0].patch.id, parts[0].weight] = together
        alone = [part.delta() for part in parts if part.patch.id in apart]
        return share([*together, *alone], weight_norm(parts[0].manifest, parts[0].weight))

    with one_thread():  # of torch for each of ours
        return size(parallel.each(measured, found, lambda amount: None))


def _stored_share(part: Part) -> float:
    return abs(part.scale) * part.manifest.deltas[part.weight].relative_norm


def parts_by_weight(
    patches: Sequence[PatchInfo], scales: Sequence[float] = (), names: Mapping[str, str] | None = None
) -> list[list[Part]]:
    """The parts of several patches, weight by weight; `names` gives each name's weight where it is another."""
    from kpatch.patch.summands import Part

    found: dict[str, list[Part]] = {}
    for number, info in enumerate(patches):
        for name in info.manifest.deltas:
            weight = name if names is None else names.get(name, name)
            found.setdefault(weight, []).append(Part(info, name, scales[number] if scales else 1.0))
    return [found[name] for name in sorted(found)]


def the_sum(patches: Collection[object]) -> str:
    """What the sum of patches is called in a warning."""
    return f"the sum of {len(patches)} patches"


def warning(what: str, found: float, hint: str) -> str | None:
    """One sentence for a change nearly as large as those that broke the measured model, None for a smaller one."""
    if found <= WARN_ABOVE:
        return None
    return (
        f"{what} changes weights by {found:.0%} of their norm, all layers together; a patch for {MEASURED_ON} that was"
        f" scaled up raised perplexity by 5 % at {RISEN_5:.0%} and by 50 % at {RISEN_50:.0%}; {hint}"
    )

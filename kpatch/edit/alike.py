"""Were several patches made in one way? What they must agree on for their facts to be solved together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kpatch.edit.hyper import Hyper
from kpatch.errors import Refused
from kpatch.patch.gather import outer_parents, rows_of
from kpatch.patch.header import PatchInfo
from kpatch.patch.text import printable
from kpatch.patch.union import called
from kpatch.stats.corpus import SELF

# What decides the update besides the values; the other settings only decide those.
_UPDATE = ("covariance_weight", "first_layer", "first_leverage", "prefixes", "prefix_tokens", "seed", "dtype")


# A patch, its hyperparameters, and R as far as its groups tell.
_Made = tuple[PatchInfo, Mapping[str, Any], tuple[int, ...]]


@dataclass(frozen=True)
class Settings:
    """How the patches were made, where that must be the same for all of them."""

    hyper: Hyper
    seed: int
    dtype: str
    corpus: str
    tokens: int | None


def settings_of(infos: Sequence[PatchInfo], corpus: str | None) -> Settings:
    """The settings that all patches were made with; `corpus` None is theirs.

    Raises Refused for a patch without stored values, one not made with MEMIT, one made on top of a patch that is not
    among them, and settings that differ.
    """
    parents = outer_parents(infos)
    if parents:
        raise Refused(
            f"They were made on top of patch {parents[0][:12]}, which is not among them",
            hint="give that patch too: all facts are solved from the unpatched model",
        )
    all_made: list[_Made] = []
    for info in infos:
        rows = rows_of(info)
        if not rows:
            raise Refused(f"{called(info)} stores no values and keys to solve its facts again from")
        all_made += [(info, made, _edited(rows, made)) for made in _made(info)]
    for one in all_made:
        _same(all_made[0], one)
        _same(max(all_made, key=lambda each: each[2]), one)
    made, layers = all_made[0][1], max(each[2] for each in all_made)
    numbers: dict[str, Any] = {f.name: made[f.name] for f in fields(Hyper) if f.name in made}
    covariance = next((info.manifest.covariance for info in infos if info.manifest.covariance), None) or {}
    return Settings(
        Hyper(layers=layers or _all_edited(infos), **numbers),
        int(made["seed"]),
        str(made["dtype"]),
        corpus or str(covariance.get("corpus", SELF)),
        covariance.get("tokens"),
    )


def _made(info: PatchInfo) -> list[Mapping[str, Any]]:
    """The hyperparameters of a patch, or of those in a stack. Raises Refused where it was not made with MEMIT."""
    manifest = info.manifest
    found = [(manifest.method, manifest.hyperparameters)]
    if manifest.method == "stack":
        found = [(str(part["method"]), part["hyperparameters"]) for part in manifest.stack]
        changed = [part["scale"] for part in manifest.stack if part["scale"] != 1]
        if changed:
            raise Refused(f"{called(info)} holds patches at a scale ({changed[0]:g}), which values do not have")
    for method, hyperparameters in found:
        if method != "memit" or not hyperparameters.keys() >= {*_UPDATE} or not _numbers(hyperparameters):
            raise Refused(
                f"{called(info)} was made with {printable(method, 40)}, not with MEMIT of this kpatch",
                hint="leave out --resolve: deltas add up whatever made them",
            )
    return [hyperparameters for _, hyperparameters in found]


def _numbers(hyperparameters: Mapping[str, Any]) -> bool:
    """Whether every setting that is a number in `Hyper` is one here; a patch may come from elsewhere."""
    names = [field.name for field in fields(Hyper) if field.name != "layers"] + ["seed"]
    return all(type(hyperparameters.get(name, 0)) in (int, float) for name in names)


def _edited(rows: Sequence[Mapping[str, Any]], made: Mapping[str, Any]) -> tuple[int, ...]:
    """R: the layers of the groups that are not at the layer for subjects that open a text; empty where all are."""
    found = {tuple(group["layers"]) for group in rows} - {(made["first_layer"],)}
    return max(found, default=())


def _all_edited(infos: Sequence[PatchInfo]) -> tuple[int, ...]:
    return tuple(sorted({layer for info in infos for layer in info.manifest.layers}))


def _same(first: _Made, second: _Made) -> None:
    """Raise Refused where two patches were not made in one way, with what differs."""
    (info, made, layers), (other, others, other_layers) = first, second
    wrong = [f"{key}: {made[key]} and {others[key]}" for key in _UPDATE if made[key] != others[key]]
    if layers and other_layers and layers != other_layers:
        wrong.append(f"layers: {list(layers)} and {list(other_layers)}")
    if wrong:
        raise Refused(
            f"{called(info)} and {called(other)} were made with other settings",
            details=[printable(line, 200) for line in wrong],
            hint="leave out --resolve to add up their deltas, or make one of them again",
        )

"""One weight under several names: models are saved and loaded with other prefixes before their layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# What models put before the names of their text part's modules: the base model's name and that of a wrapper's part.
_BASES = frozenset({"model", "transformer", "gpt_neox"})
_PARTS = frozenset({"language_model", "text_model"})


class WeightNames:
    """The names of a checkpoint's or a network's weights (or of its modules), to be found under other prefixes."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._by_core: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for name in sorted(self._names):
            prefix, core = _split(name)
            self._by_core.setdefault(core, []).append((name, prefix))

    def find(self, name: str) -> str | None:
        """What `name` is called here; None where it is not there, or where several could be meant.

        Another prefix is no obstacle where loaders know both: "h.0…" for "transformer.h.0…", and the text model of a
        wrapper, "model.language_model.layers.0…" or "language_model.model.layers.0…" for "model.layers.0…".
        """
        if name in self._names:
            return name
        prefix, core = _split(name)
        near = [here for here, other in self._by_core.get(core, ()) if _same_place(prefix, other)]
        return near[0] if len(near) == 1 else None

    def near(self, name: str) -> list[str]:
        """Names that end as `name` does behind its prefix, whatever stands before."""
        return sorted(other for other in self._names if other.endswith("." + _split(name)[1]))


def is_wrapped(names: Iterable[str]) -> bool:
    """True where one of these weights or modules is called as the text part of a wrapper is."""
    return any(not _PARTS.isdisjoint(_split(name)[0]) for name in names)


def one_name_each(patches: Iterable[Iterable[str]]) -> list[Mapping[str, str]]:
    """For each patch, what its weights are called by the first patch that has them: {its own name: that name}."""
    known: list[str] = []
    result: list[Mapping[str, str]] = []
    for names in patches:
        own, here = list(names), WeightNames(known)
        called = {name: here.find(name) or name for name in own}
        if len(set(called.values())) != len(own):  # two of its weights would become one
            called = {name: name for name in own}
        result.append(called)
        known += [name for name in called.values() if name not in known]
    return result


def _split(name: str) -> tuple[tuple[str, ...], str]:
    """A weight's name as the prefixes that differ between the forms in which one model is saved, and the rest."""
    parts = name.split(".")
    end = 0
    while end < len(parts) - 1 and parts[end] in _BASES | _PARTS:
        end += 1
    return tuple(parts[:end]), ".".join(parts[end:])


def _same_place(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """True where a loader takes names under both prefixes for the same weight: none and the base model's, the text
    model's and a wrapper's. No loader knows a base inside a base, "transformer.model.layers…".
    """
    bases = [[part for part in prefix if part in _BASES] for prefix in (one, other)]
    if any(len(found) > 1 or len(prefix) - len(found) > 1 for prefix, found in zip((one, other), bases, strict=True)):
        return one == other
    inside = any(part in _PARTS for part in (*one, *other))
    return inside or not (bases[0] and bases[1]) or bases[0] == bases[1]

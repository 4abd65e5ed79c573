"""How the patches of a checkpoint are doing: which of their facts still hold, patch by patch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kpatch.checkpoint.shards import open_checkpoint
from kpatch.checkpoint.store import Store
from kpatch.evaluate.metrics import measure
from kpatch.facts.fact import Fact
from kpatch.models.model import open_model
from kpatch.reporter import SILENT, Reporter


@dataclass(frozen=True)
class PatchHealth:
    """One patch: `facts` measured, how many of them hold, and {id, text, target, probability} of each that does not.

    A fact holds where the model's first choices are its target. Facts that a later patch stands for are not measured.
    """

    id: str
    name: str
    facts: int
    held: int
    fallen: tuple[Mapping[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        own = {"id": self.id, "name": self.name, "facts": self.facts, "held": self.held}
        return {**own, "fallen": [dict(fact) for fact in self.fallen]}


def health(model_dir: str | Path, *, device: str = "auto", report: Reporter = SILENT) -> tuple[PatchHealth, ...]:
    """Load the checkpoint and ask it for the facts of its patches, bottom to top; nothing is loaded where it has none.

    Raises BadInput and Damaged as `open_model` does, and for records and copies that cannot be read.
    """
    store = Store(open_checkpoint(model_dir).path)
    applied = store.applied()
    gone = applied.gone
    owned: list[tuple[int, Fact]] = []
    for number, patch in enumerate(applied.patches):
        for index, fact in enumerate(store.patch(patch.id).manifest.facts):
            if index not in gone.get(patch.id, ()):
                owned.append((number, replace(Fact.from_dict(dict(fact)), paraphrases=(), neighbors=())))
    if not owned:
        return ()
    model = open_model(model_dir, device=device, report=report)
    found = measure(model, [fact for _, fact in owned], answer_tokens=0, report=report).facts
    result = []
    for number, patch in enumerate(applied.patches):
        mine = [fact for (owner, _), fact in zip(owned, found, strict=True) if owner == number]
        fallen = tuple(
            {key: fact[key] for key in ("id", "text", "target", "probability")}
            for fact in mine
            if not fact.get("accurate")
        )
        result.append(PatchHealth(patch.id, patch.name, len(mine), len(mine) - len(fallen), fallen))
    return tuple(result)

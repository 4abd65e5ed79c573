"""An editor from facts to its file: train it, write it, and forget what was kept for an interruption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpatch import arguments
from kpatch.facts.fact import Fact, FactFile, facts_in
from kpatch.mend.file import write_editor
from kpatch.mend.settings import TrainHyper
from kpatch.mend.train import Trained, train
from kpatch.models.model import Model, require_loaded
from kpatch.outputs import check_new_file
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.corpus import SELF


@dataclass(frozen=True)
class TrainedEditor:
    """An editor that was written: its file with SHA-256, the numbers it was trained with, and how that went."""

    path: Path
    sha256: str
    hyper: TrainHyper
    trained: Trained

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as the command's JSON has them."""
        return {
            "editor": str(self.path),
            "sha256": self.sha256,
            "bytes": self.path.stat().st_size,
            "layers": sorted({place.layer for place in self.trained.network.places}),
            "settings": self.hyper.to_dict(),
            **self.trained.to_dict(),
            "seconds": {"total": self.trained.seconds},
        }


def train_editor(
    model: Model,
    facts: FactFile | Sequence[Fact],
    out: str | Path,
    *,
    settings: TrainHyper | None = None,
    layers: Sequence[int] | None = None,
    corpus: str = SELF,
    minutes: float | None = None,
    seed: int = 0,
    memory: int | None = None,
    resume: bool = True,
    force: bool = False,
    report: Reporter = SILENT,
) -> TrainedEditor:
    """Train an editor for `model` on `facts` with `kpatch.mend.train.train` and write it to `out`.

    Raises BadInput as training does, and Refused for a file that exists without `force`, before any work.
    """
    require_loaded(model)
    arguments.whole_number(seed, "seed")
    arguments.path(corpus, "corpus")
    path = check_new_file(out, force=force, what="an editor")
    hyper = settings or TrainHyper()
    more: dict[str, Any] = {"seed": seed, "memory": memory, "resume": resume, "report": report}
    trained = train(model, facts_in(facts), hyper, layers=layers, corpus=corpus, minutes=minutes, **more)
    about = {**trained.to_dict(), **hyper.to_dict(), "seed": seed}
    digest = write_editor(path, model, trained.network, about, force)
    trained.written()
    return TrainedEditor(path, digest, hyper, trained)

"""Covariances collected in small batches, compared, and the runs that they took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kpatch.models.model import Model
from kpatch.stats import covariance as module
from kpatch.stats.covariance import Covariance, collect

ROW, BATCH = 16, 48  # three rows to a batch
WORDS = "The river runs through the old town of Chicago and into the sea, which is cold in winter. "


def run(model: Model, layers: Any, corpus: str, tokens: int | None, **options: Any) -> Covariance:
    return collect(model, layers, corpus=corpus, tokens=tokens, row=ROW, batch_tokens=BATCH, **options)


def same(one: Covariance, other: Covariance) -> bool:
    assert one.moments.keys() == other.moments.keys()
    assert one.id == other.id
    return all(
        mine.count == other.moments[layer].count and torch.equal(mine.total, other.moments[layer].total)
        for layer, mine in one.moments.items()
    )


class Calls:
    """Every partial run: its last layer, its number of rows, the layers whose keys it gave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None] = lambda number: None) -> None:
        self.made: list[tuple[int, int, list[int]]] = []
        original = module.run_to

        def run_to(model: Model, layer: int, batch: Any, capture: Any) -> dict[int, Tensor]:
            before(len(self.made))
            self.made.append((layer, len(batch.ids), list(capture)))
            return original(model, layer, batch, capture)

        monkeypatch.setattr(module, "run_to", run_to)

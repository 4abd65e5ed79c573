"""AlphaEdit against a second writing from its paper's equations, from facts to deltas."""

from __future__ import annotations

import pytest
from torch import Tensor

from kpatch.edit.alphaedit import AlphaEdit
from kpatch.edit.presets import AlphaEditHyper
from kpatch.models.model import Model
from kpatch.stats.covariance import collect
from tests.oracle.alphaedit import alphaedit
from tests.oracle.paper_cases import CONTEXTS, FACTS, FAMILIES, PAPER, TOKENS, assert_same, made
from tests.support.models import tiny

pytestmark = pytest.mark.usefixtures("one_thread", "shared_statistics")

ALPHA = AlphaEditHyper(
    (1, 2), steps=4, learning_rate=0.2, stop_loss=0.0, threshold=0.3, l2=0.1, lead_ins=1, prefixes=0
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path_factory.getbasetemp() / "alphaedit"))


def moments(model: Model) -> dict[int, Tensor]:
    # Layer 0 is what the methods ask for only where a subject opens a text
    return {layer: one.mean() for layer, one in collect(model, (1, 2), tokens=TOKENS).moments.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_alphaedit_is_the_oracles(family: str) -> None:
    model = tiny(family)
    want = alphaedit(model, CONTEXTS, FACTS, PAPER, ALPHA.threshold, ALPHA.l2, moments(model))
    found = made(AlphaEdit(), model, ALPHA)
    assert_same(model, found, want)
    assert all(delta.rank == len(FACTS) for delta in found.deltas.values())

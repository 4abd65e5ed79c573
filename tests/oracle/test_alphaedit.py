"""AlphaEdit against a second writing from its paper's equations, from facts to deltas."""

from __future__ import annotations

import pytest
from torch import Tensor

from kpatch.edit.alphaedit import AlphaEdit
from kpatch.edit.methods import Edit, Inputs, Method
from kpatch.edit.presets import AlphaEditHyper, HyperParams, MemitPaperHyper
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from kpatch.stats.covariance import collect
from tests.oracle import memit as oracle
from tests.oracle.alphaedit import alphaedit
from tests.support.families import slow_beyond
from tests.support.models import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS: list[oracle.Prompt] = [
    ("In the {}", "Mona Lisa", "Paris"),
    ("The capital of {} is", "Brazil", "Malmö and the sea"),
    ("Past the {} there is", "Eiffel Tower", "Paris"),
]
CONTEXTS = ["", "As everyone knows,"]  # the one lead-in of the settings below
TOKENS = 400
# Without a stop every fact takes all steps in both writings
PAPER = MemitPaperHyper(
    (1, 2), steps=4, learning_rate=0.2, stop_loss=0.0, covariance_weight=1.0, lead_ins=1, prefixes=0, first_leverage=0
)
ALPHA = AlphaEditHyper(
    (1, 2), steps=4, learning_rate=0.2, stop_loss=0.0, threshold=0.3, l2=0.1, lead_ins=1, prefixes=0
)
# W stored [in, out], and [out, in] with a norm behind it; gpt2 alone in `make test`
FAMILIES = slow_beyond(["llama"], ["llama", "gpt2", "gemma3_text"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path_factory.getbasetemp() / "alphaedit"))


def made(method: Method, model: Model, hyper: HyperParams, facts: list[oracle.Prompt] = FACTS) -> Edit:
    chosen = [Fact(subject, prompt, target) for prompt, subject, target in facts]
    return method.edit(model, chosen, hyper, Inputs(tokens=TOKENS))


def moments(model: Model) -> dict[int, Tensor]:
    # Layer 0 is what the methods ask for only where a subject opens a text
    return {layer: one.mean() for layer, one in collect(model, (1, 2), tokens=TOKENS).moments.items()}


def assert_same(model: Model, found: Edit, want: dict[str, Tensor]) -> None:
    assert found.deltas.keys() == want.keys()
    for name, delta in want.items():
        got = found.deltas[name].dense()
        delta = delta.T if model.stores_transposed else delta
        assert float(delta.norm()) > 1e-2
        assert float((got - delta).norm()) <= 1e-3 * float(delta.norm()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_alphaedit_is_the_oracles(family: str) -> None:
    model = tiny(family)
    want = alphaedit(model, CONTEXTS, FACTS, PAPER, ALPHA.threshold, ALPHA.l2, moments(model))
    found = made(AlphaEdit(), model, ALPHA)
    assert_same(model, found, want)
    assert all(delta.rank == len(FACTS) for delta in found.deltas.values())

"""BLUE against the oracle of MEMIT's paper, run at the first layer and then at the last."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kpatch.edit.blue import Blue
from kpatch.edit.memit_paper import MemitPaper
from kpatch.models.model import Model
from kpatch.stats.covariance import collect
from tests.oracle import memit as oracle
from tests.oracle.paper_cases import CONTEXTS, FACTS, FAMILIES, PAPER, TOKENS, assert_same, made
from tests.support.models import tiny

pytestmark = pytest.mark.usefixtures("one_thread", "shared_statistics")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path_factory.getbasetemp() / "blue"))


@pytest.mark.parametrize("family", FAMILIES)
def test_blue_is_the_papers_memit_at_the_first_layer_and_then_at_the_last(family: str) -> None:
    model, work = tiny(family), tiny(family)
    want: dict[str, Tensor] = {}
    for layer in (0, 2):
        covariance = {layer: collect(model, (layer,), tokens=TOKENS).moments[layer].mean()}
        want |= oracle.memit(work, CONTEXTS, FACTS, replace(PAPER, layers=(layer,)), covariance)
        name = work.weight_name(layer)
        work = Model(net=copy.deepcopy(work.net), tokenizer=work.tokenizer, family=work.family)
        with torch.no_grad():
            delta = want[name].T if work.stores_transposed else want[name]
            weight = work.net.get_parameter(name)
            weight.copy_((weight.double() + delta).to(weight.dtype))
    found = made(Blue(), model, replace(PAPER, layers=(0, 1, 2)))
    assert_same(model, found, want)
    assert found.layers == (0, 2), "what lies between is left alone"


def test_blue_of_one_layer_is_the_papers_memit() -> None:
    model, hyper = tiny("llama"), replace(PAPER, layers=(2,))
    blue, paper = made(Blue(), model, hyper), made(MemitPaper(), model, hyper)
    name = model.weight_name(2)
    assert torch.equal(blue.deltas[name].dense(), paper.deltas[name].dense())


def test_a_second_value_is_found_in_the_edited_model() -> None:
    """What the first layer reached is not asked for again, nor taken from the cache of the unedited model."""
    model = tiny("llama")
    both = made(Blue(), model, replace(PAPER, layers=(1, 2)))
    made(MemitPaper(), model, replace(PAPER, layers=(2,)))  # leaves its value in the cache
    again = made(Blue(), model, replace(PAPER, layers=(1, 2)))
    assert both.values is not None
    assert again.values is not None
    assert torch.equal(both.values, again.values)
    alone = made(MemitPaper(), model, replace(PAPER, layers=(2,))).values
    assert alone is not None
    assert not torch.allclose(both.values[len(FACTS) :], alone, atol=1e-3)

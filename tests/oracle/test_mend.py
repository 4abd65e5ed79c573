"""MEND against its oracle: the update, the loss of training and its gradient.

Each with the sum, with regression, and with regression whose ridge is a covariance.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from kpatch.edit.mend import Mend
from kpatch.edit.methods import Inputs
from kpatch.edit.presets import MendHyper
from kpatch.facts.fact import Fact
from kpatch.mend import data
from kpatch.mend.episode import Question, loss_of
from kpatch.mend.file import read_editor, write_editor
from kpatch.mend.measure import measure
from kpatch.mend.network import Network, Settings, shape_name
from kpatch.mend.places import places
from kpatch.mend.rows import Below, Row
from kpatch.models.model import Model
from tests.oracle import mend as oracle
from tests.support.editors import random_network, training_facts
from tests.support.families import slow_beyond
from tests.support.models import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = (1, 2, 3)
# Stored [in, out]; a gate; no module around the MLP; attention and MLP side by side
QUICK = ["gpt2", "llama"]
FAMILIES = ["gpt2", "llama", "opt", "gpt_neox", "gemma2", "phi3", "falcon", "bloom"]
FACTS = [
    Fact("Mona Lisa", "In the {}", "Paris"),
    Fact("Eiffel Tower", "{} is located in the city of", "Rome"),
    Fact("Brazil", "The capital of {} is", "Malmö and the sea"),
    Fact("Oslo", "The {}", "Rome"),
]
WAYS = [(0, 0), (1, 0), (1, 1)]
build = cache(tiny)


@cache
def wide(family: str) -> Model:
    model = tiny(family)
    model.net.double()
    return model


def matrices(model: Model, network: Network) -> list[oracle.Matrix]:
    seen: dict[str, int] = {}
    found = []
    for place in places(model, LAYERS):
        shape = shape_name(place.shape)
        seen[shape] = seen.get(shape, -1) + 1
        found.append(oracle.Matrix(place.name, place.transposed, shape, seen[shape]))
    assert [matrix.name for matrix in found] == [place.name for place in network.places]
    return found


def plain(row: Row) -> oracle.Asked:
    return oracle.Asked(row.ids, row.reads, row.tokens)


def questions(model: Model) -> list[Question]:
    found = data.Data(tuple(data.learn(model, training_facts(4))), (), ((5, 6, 7, 8, 9), (9, 3, 1, 4, 2)), 3)
    return found.step(0, 4, seed=2)


@pytest.mark.parametrize(("regression", "covariance"), WAYS)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("family", slow_beyond(FAMILIES, QUICK))
def test_the_update_is_that_of_the_equations(
    family: str, count: int, regression: int, covariance: int, tmp_path: object
) -> None:
    """Through the file, the method and its factors: equal to 1e-5 of its size in every matrix."""
    model = build(family)
    network = random_network(model, LAYERS, regression, covariance)
    parameters = dict(network.state_dict())
    want = oracle.updates(model, parameters, matrices(model, network), [
        plain(data.edit_row(model, fact)) for fact in FACTS[:count]
    ], bool(regression))  # fmt: skip
    path = f"{tmp_path}/editor.safetensors"
    write_editor(path, model, network, {})
    method = Mend(read_editor(path))
    assert method.require(model, LAYERS) is None
    found = method.edit(model, FACTS[:count], MendHyper(LAYERS, regression=regression), Inputs())
    assert set(found.deltas) == set(want)
    for name, change in want.items():
        assert float(change.norm()) > 0
        difference = found.deltas[name].dense() - change.double()
        assert float(difference.norm()) <= 1e-5 * float(change.norm()), name


@pytest.mark.parametrize(
    ("regression", "covariance", "group"), [(0, 0, 1), (0, 0, 2), (1, 0, 1), (1, 0, 4), (1, 1, 1), (1, 1, 4)]
)
@pytest.mark.parametrize("family", slow_beyond(FAMILIES, QUICK))
def test_the_loss_of_training_is_that_of_the_equations(
    family: str, group: int, regression: int, covariance: int
) -> None:
    """Padded batches above one layer, several groups at once; the oracle runs whole rows in edited weights."""
    model = wide(family)
    network = random_network(model, LAYERS, regression, covariance).double()
    asked = questions(model)
    found = loss_of(network, Below(model, LAYERS[0], 1 << 20), asked, group, regression)
    parameters, where = dict(network.state_dict()), matrices(model, network)
    edit = near = text = 0.0
    for begin in range(0, len(asked), group):
        some = asked[begin : begin + group]
        changes = oracle.updates(model, parameters, where, [plain(one.edit) for one in some], bool(regression))
        weights = oracle.edited(model, changes)
        for one in some:
            edit += float(oracle.nll(model, weights, plain(one.again))) / len(asked)
            near += float(oracle.drift(model, weights, plain(one.near))) / len(asked)
            text += float(oracle.drift(model, weights, plain(one.text))) / len(asked)
    assert [float(found.edit.detach()), float(found.near.detach()), float(found.text.detach())] == pytest.approx(
        [edit, near, text], rel=1e-6
    )
    assert near > 0
    assert text > 0


@pytest.mark.parametrize(("regression", "covariance", "group"), [(0, 0, 2), (1, 0, 4), (1, 1, 4)])
@pytest.mark.parametrize("family", slow_beyond(["gpt2", "gpt_neox", "opt"], ["gpt2"]))
def test_the_gradient_of_training_is_that_of_finite_differences(
    family: str, group: int, regression: int, covariance: int
) -> None:
    """In families that keep to float64: the norms of the others go through float32, which a difference would show."""
    model = wide(family)
    network = random_network(model, LAYERS, regression, covariance).double()
    below, asked = Below(model, LAYERS[0], 1 << 20), questions(model)

    def total() -> torch.Tensor:
        loss = loss_of(network, below, asked, group, regression)
        return 0.1 * loss.edit + loss.locality

    named = dict(network.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(total(), list(named.values()), allow_unused=True), strict=True))
    if not regression:
        assert gradients["ridges"] is None
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        flat = gradient.flatten()
        largest = int(flat.abs().argmax())
        spots = [largest]
        with torch.no_grad():
            want = oracle.finite_differences(total, named[name], spots, 1e-6)
        assert float(flat[largest].abs()) > 0, name
        torch.testing.assert_close(flat[spots], want, rtol=1e-5, atol=1e-6 * float(flat[largest].abs()) + 1e-9)


@pytest.mark.parametrize("family", slow_beyond(FAMILIES, QUICK))
def test_the_covariance_is_that_of_the_tokens_that_must_stay(family: str) -> None:
    """C⁻¹, shrunk and scaled, from every token of whole rows that are run one by one, text and neighbors half each."""
    model = wide(family)
    network = Network(places(model, LAYERS), Settings(3, regression=1, covariance=1)).double()
    texts = ((5, 6, 7, 8, 9), (9, 3, 1, 4, 2))
    found = data.Data(tuple(data.learn(model, training_facts(4))), (), texts, 3)
    measure(network, Below(model, LAYERS[0], 1 << 20), found, count=3, batch=2)
    near = [row.ids for fact in found.training[:3] for row in fact.near]
    assert len(near) == 1
    for number, matrix in enumerate(matrices(model, network)):
        covariance = (oracle.moment(model, matrix, texts) + oracle.moment(model, matrix, near)) / 2
        precision = network.precision(number)
        assert precision is not None
        shrunk = covariance + 0.05 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        scaled = precision @ shrunk
        torch.testing.assert_close(scaled, float(scaled[0, 0]) * torch.eye(len(scaled), dtype=torch.float64))
        assert float((precision * covariance).sum()) == pytest.approx(float(covariance.trace()))

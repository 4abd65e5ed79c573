"""Every registered method keeps one contract: make, show, apply, revert, stack; and so does one from outside."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

import kpatch
from kpatch.edit import methods
from kpatch.edit.make import MakeResult, make
from kpatch.edit.methods import Edit, Inputs, Method, method_named, register
from kpatch.edit.presets import HyperParams
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from kpatch.patch.delta import LowRank
from kpatch.patch.format import read_patch
from tests.support.checkpoints import snapshot
from tests.support.cli import run
from tests.support.models import tiny

FACTS = [Fact("Mona Lisa", "In the {}", "Paris", id="mona"), Fact("Chicago", "The city {} is in", "Rome", id="chi")]
OTHER = [Fact("Moonlight Sonata", "By the {}", "Brazil", id="moon")]
FAMILIES = ("llama", "gpt2")  # W stored either way
QUICK = {"memit": {"steps": "3", "prefixes": "0"}, "rome": {"steps": "3", "prefixes": "0"}, "ft": {"steps": "3"}}


@dataclass(frozen=True, slots=True)
class NudgeHyper(HyperParams):
    size: float = 0.01


class Nudge(Method):
    """A throw-away method of another package: Δ = size · u (1, …, 1) with u the target's embedding."""

    name = "nudge"
    hyper = NudgeHyper
    one_layer = True

    def edit(self, model: Model, facts: Sequence[Fact], hyper: NudgeHyper, inputs: Inputs) -> Edit:
        table = model.net.get_output_embeddings().weight
        with inputs.timed("update"):
            ids = [model.tokenizer(" " + fact.target).input_ids[0] for fact in facts]
            left = hyper.size * table[ids].sum(0)[:, None]
            right = torch.ones(1, model.mlp_width)
            delta = LowRank(right.T, left.T) if model.stores_transposed else LowRank(left, right)
        return Edit({model.weight_name(hyper.layer): delta}, hyper.layers)


register(Nudge)
NAMES = ("memit", "rome", "ft", "nudge")


def test_a_new_method_is_under_contract() -> None:
    assert {*methods._OWN, "nudge"} == set(NAMES), "add its quick settings here"


@dataclass(frozen=True)
class Made:
    directory: Path
    patch: Path
    result: MakeResult


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("methods")
    for family in FAMILIES:
        model = tiny(family)
        model.net.save_pretrained(folder / family)
        model.tokenizer.save_pretrained(folder / family)
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(autouse=True)
def shared_cache(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPATCH_CACHE", str(world / "cache"))


def go(world: Path, family: str, name: str, out: Path, facts: list[Fact] = FACTS, **more: Any) -> MakeResult:
    settings = {**QUICK.get(name, {}), **more}
    return make(facts, out=out, model=str(world / family), method=name, layers=[1], tokens=400, settings=settings)


@pytest.fixture(params=[(family, name) for family in FAMILIES for name in NAMES], ids="-".join)
def made(request: pytest.FixtureRequest, world: Path) -> Made:
    family, name = request.param
    out = world / f"{family}-{name}.patch"
    if not out.exists():
        go(world, family, name, out)
        out.with_suffix(".facts").touch()
    result = MakeResult(read_patch(out).id, out, out.stat().st_size, family, name, (1,), {})
    return Made(world / family, out, result)


def test_the_file_says_how_it_was_made(made: Made) -> None:
    patch = read_patch(made.patch)
    manifest, method = patch.manifest, method_named(made.result.method)
    assert (manifest.method, manifest.layers) == (method.name, manifest.layers)
    numbers = {field.name for field in fields(method.hyper)} - {"layers"}
    assert set(manifest.hyperparameters) == numbers | {"seed", "dtype"}
    assert [fact["id"] for fact in manifest.facts] == ["mona", "chi"]
    assert manifest.effect is not None
    assert {"before", "after", "facts"} <= set(manifest.effect)
    for name, delta in patch.deltas.items():
        assert delta.shape == manifest.base.weights[name].shape
        assert torch.isfinite(delta.dense()).all()
    shown = run("show", made.patch, "--json")
    assert shown.code == 0
    assert shown.json["method"] == method.name


def test_applied_and_taken_back_bit_for_bit(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.directory, tmp_path / "model"))
    before = snapshot(folder)
    assert run("apply", made.patch, folder).code == 0
    assert snapshot(folder) != before
    assert run("revert", folder).code == 0
    assert snapshot(folder) == before


def test_the_same_inputs_give_the_same_file(made: Made, world: Path, tmp_path: Path) -> None:
    go(world, made.directory.name, made.result.method, tmp_path / "again.patch")
    assert (tmp_path / "again.patch").read_bytes() == made.patch.read_bytes()


def test_stacked_with_another_patch(made: Made, world: Path, tmp_path: Path) -> None:
    other = world / f"{made.directory.name}-other.patch"
    if not other.exists():
        go(world, made.directory.name, "ft", other, OTHER)
    stacked = kpatch.stack([made.patch, other], tmp_path / "both.patch")
    assert stacked.path is not None
    both = read_patch(tmp_path / "both.patch")
    for name, delta in both.deltas.items():
        parts = [read_patch(path).deltas.get(name) for path in (made.patch, other)]
        torch.testing.assert_close(delta.dense(), torch.stack([part.dense() for part in parts if part]).sum(0))


def test_an_unknown_setting_is_refused_before_any_work(made: Made, world: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="Unknown setting 'nothing'"):
        go(world, made.directory.name, made.result.method, tmp_path / "x.patch", nothing="1")
    assert not (tmp_path / "x.patch").exists()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_left_as_they_were_found(family: str, name: str) -> None:
    model, method = tiny(family), method_named(name)
    before = {key: tensor.clone() for key, tensor in model.net.state_dict().items()}
    hyper = methods.hyper_for(method, model, [1], QUICK.get(name, {}))
    found = method.edit(model, FACTS, hyper, Inputs(tokens=400))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.net.state_dict().items())
    assert set(found.deltas) <= {model.weight_name(layer) for layer in method.layers(hyper)}

"""`stack --resolve` on a tiny checkpoint: the facts of several patches solved jointly from the values they store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kpatch
from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.fit import verify_fit
from kpatch.edit import memit
from kpatch.edit.make import make
from kpatch.edit.methods import method_named
from kpatch.edit.resolve import solve_again
from kpatch.edit.writes import JointObjective
from kpatch.errors import BadInput, KpatchError, Refused
from kpatch.facts.fact import Fact
from kpatch.patch.format import Patch, pack, read_patch, write_patch
from kpatch.patch.stack import stack
from tests.support.cli import run
from tests.support.models import tiny
from tests.support.reports import Recorder

pytestmark = pytest.mark.usefixtures("shared_statistics")

FIRST = [Fact("Mona Lisa", "In the {}", "Paris", id="mona"), Fact("The", "{} is in", "Rome", id="the")]
SECOND = [Fact("Moonlight Sonata", "By the {}", "Brazil", id="moon")]
SHARED = [Fact("Mona Lisa", "Past the {}", "Rome", id="mona")]  # another fact of a subject in FIRST
NUMBERS = {"steps": "4", "lead_ins": "1", "leverage": "500"}
QUICK: dict[str, Any] = {"layers": [1, 2], "tokens": 400, "settings": NUMBERS}


@dataclass(frozen=True)
class World:
    folder: Path
    model: Path

    def patch(self, name: str) -> Path:
        return self.folder / f"{name}.patch"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("again")
    model = tiny("llama")
    model.net.save_pretrained(folder / "tiny-model")
    model.tokenizer.save_pretrained(folder / "tiny-model")
    world = World(folder, folder / "tiny-model")
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache"))
        for name, facts in (("first", FIRST), ("second", SECOND), ("shared", SHARED), ("joint", [*FIRST, *SECOND])):
            make(facts, out=world.patch(name), model=str(world.model), **QUICK)
        yield world


@pytest.fixture
def world(built: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("KPATCH_CACHE", str(built.folder / "cache"))
    return built


def solved(world: World, names: list[str], out: Path, **more: Any) -> Patch:
    solve_again([world.patch(name) for name in names], out, model=str(world.model), **more)
    return read_patch(out)


def refused(action: Callable[[], object], kind: type[KpatchError], words: str) -> None:
    with pytest.raises(kind, match=words):
        action()


def test_one_patch_solved_again_is_the_same_patch(world: World, tmp_path: Path) -> None:
    old, new = read_patch(world.patch("first")), solved(world, ["first"], tmp_path / "x.patch")
    assert new.manifest.tensors == old.manifest.tensors
    assert new.manifest.effect == old.manifest.effect
    assert (new.manifest.groups, new.manifest.layers) == (old.manifest.groups, old.manifest.layers)
    assert new.manifest.covariance == old.manifest.covariance
    assert new.manifest.hyperparameters == old.manifest.hyperparameters
    assert [part["id"] for part in new.manifest.stack] == [old.id]


def test_the_result_names_what_was_made_and_of_what(world: World, tmp_path: Path) -> None:
    found = kpatch.stack_resolved(world.patch("first"), tmp_path / "x.patch", model=str(world.model))
    assert found.made.patch_id == read_patch(tmp_path / "x.patch").id
    assert [info.id for info in found.patches] == [read_patch(world.patch("first")).id]
    assert [fact["subject"] for fact in found.union.facts] == [fact.subject for fact in FIRST]


@pytest.mark.parametrize("method", ["memit", "memit-paper"])
def test_layers_may_hold_the_one_for_subjects_that_open_a_text(method: str, world: World, tmp_path: Path) -> None:
    """Then two values of one fact are for layer 0: the one for where it opens the text, and the other."""
    numbers = {"steps": "4", "lead_ins": "1", "prefixes": "0", "leverage": "500", "covariance_weight": "0.1"}
    known = {key: value for key, value in numbers.items() if hasattr(method_named(method).hyper, key)}
    layers = [0, 1] if method == "memit" else [0]
    more: dict[str, Any] = {"model": str(world.model), "tokens": 400, "method": method, "settings": known}
    made = make(FIRST, out=tmp_path / "old.patch", layers=layers, **more)
    old = read_patch(made.path)
    assert [group.get("first", False) for group in old.manifest.groups].count(True) == 1
    solve_again([made.path], tmp_path / "new.patch", model=str(world.model))
    new = read_patch(tmp_path / "new.patch")
    assert (new.manifest.layers, new.manifest.groups) == (old.manifest.layers, old.manifest.groups)
    assert new.manifest.tensors == old.manifest.tensors


def test_two_patches_come_out_as_if_made_together(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any, **more: Any) -> Any:
        raise AssertionError("values were sought although they are stored")

    monkeypatch.setattr(memit, "find_values", never)
    new, made = solved(world, ["first", "second"], tmp_path / "x.patch"), read_patch(world.patch("joint"))
    summed = stack([world.patch("first"), world.patch("second")], tmp_path / "sum.patch")
    assert [fact["id"] for fact in new.manifest.facts] == ["mona", "the", "moon"]
    assert {frozenset(group["facts"]) for group in new.manifest.groups} == {frozenset({i}) for i in range(3)}
    for name, delta in made.deltas.items():
        size = made.manifest.deltas[name].norm
        apart = float((new.deltas[name].dense() - delta.dense()).norm())
        plain = float((read_patch(tmp_path / "sum.patch").deltas[name].dense() - delta.dense()).norm())
        # values were found in other company, which shows in their last bits only
        assert apart <= 1e-3 * size, name
        # layer 0 has one fact, so there the sum is the same
        assert apart < 0.1 * plain or ".0." in name, name
    assert summed.id != new.id
    assert new.manifest.effect is not None
    for fact in new.manifest.effect["facts"]:
        assert fact["after"]["probability"] > 1.2 * fact["before"]["probability"]
    assert verify_fit(tmp_path / "x.patch", world.model).ok


def test_a_subject_of_two_patches_gets_one_new_value(world: World, tmp_path: Path) -> None:
    heard = Recorder()
    new = solved(world, ["first", "shared", "second"], tmp_path / "x.patch", report=heard)
    assert any("anew for Mona Lisa:" in note for note in heard.notes)
    groups = [(group["facts"], group["layers"]) for group in new.manifest.groups]
    assert ([0, 2], [1]) in groups
    assert ([0, 2], [2]) in groups
    assert [fact["id"] for fact in new.manifest.facts] == ["mona", "the", "mona-2", "moon"]
    assert new.values is not None
    assert len(new.values) == len(groups) == 7


def test_a_stack_is_solved_as_the_patches_in_it(world: World, tmp_path: Path) -> None:
    both = tmp_path / "both.patch"
    stack([world.patch("first"), world.patch("second")], both)
    solve_again([both], tmp_path / "x.patch", model=str(world.model))
    new, other = read_patch(tmp_path / "x.patch"), solved(world, ["first", "second"], tmp_path / "y.patch")
    assert new.id == other.id
    stack([world.patch("first"), world.patch("second")], both, scales=[1, 0.5], force=True)
    refused(lambda: solve_again([both], tmp_path / "z.patch", model=str(world.model)), Refused, "at a scale")


def test_in_which_precision_a_patch_was_made_decides_no_solution(world: World, tmp_path: Path) -> None:
    out = tmp_path / "mixed.patch"
    make(SECOND, out=out, model=str(world.model), dtype="mixed", **QUICK)
    dtypes = {}
    for other in (world.patch("first"), out):
        both, model = [out, other][: 1 + (other != out)], str(world.model)
        again = solve_again(both, tmp_path / "again.patch", model=model, force=True)
        dtypes[other] = read_patch(again.made.path).manifest.hyperparameters["dtype"]
    assert dtypes == {world.patch("first"): "float32", out: "mixed"}


def test_the_weights_of_the_model_come_back(world: World, tmp_path: Path) -> None:
    model = kpatch.edit.make._load([], str(world.model), None, "cpu", "auto", None, Recorder())  # type: ignore[attr-defined]
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    solve_again([world.patch("first")], tmp_path / "x.patch", model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.net.state_dict().items())


def test_what_cannot_be_solved_again_is_refused(world: World, tmp_path: Path) -> None:
    def go(*paths: Path, model: Path | None = world.model) -> Callable[[], object]:
        return lambda: solve_again(paths, tmp_path / "x.patch", model=None if model is None else str(model))

    first, second = world.patch("first"), world.patch("second")
    refused(go(first, model=None), BadInput, "Where is tiny-model")
    refused(go(first, first), Refused, "given twice")
    made = read_patch(second)
    other = tmp_path / "other.patch"

    def write(**changes: Any) -> Path:
        tensors = pack(made.deltas, made.values, made.keys)
        write_patch(other, replace(made.manifest, **changes), tensors, force=True)
        return other

    numbers = dict(made.manifest.hyperparameters)
    refused(go(first, write(hyperparameters={**numbers, "leverage": 2.0})), Refused, "other settings")
    refused(go(first, write(hyperparameters={**numbers, "steps": "many"})), Refused, "not with MEMIT of this")
    refused(go(first, write(hyperparameters={})), Refused, "not with MEMIT of this")
    refused(go(first, write(method="rome")), Refused, "was made with rome")
    # BLUE has the settings of the paper's MEMIT, but values that hold for the model its first layer left
    blue = write(method="blue", hyperparameters={**numbers, "covariance_weight": 1.0})
    refused(go(first, blue), Refused, "was made with blue")
    refused(go(first, write(parents=("ab" * 32,))), Refused, "not among them")
    write_patch(other, replace(made.manifest, groups=()), pack(made.deltas), force=True)
    refused(go(first, other), Refused, "stores no values")
    make(SECOND, out=other, model=str(world.model), force=True, **{**QUICK, "layers": [2]})
    refused(go(first, other), Refused, "other settings")
    changed = Path(shutil.copytree(world.model, tmp_path / "changed"))
    apply([second], changed)
    refused(go(first, model=changed), Refused, "carries patches")
    net = tiny("llama", seed=5).net
    net.save_pretrained(changed)
    refused(go(first, model=changed), Refused, "does not fit")
    assert not (tmp_path / "x.patch").exists()


def test_resolve_from_the_command_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JointObjective, "search", None)  # nothing is to be found
    paths, out = [world.patch("first"), world.patch("second")], tmp_path / "x.patch"
    data = run("stack", *paths, "--resolve", "--model", world.model, "-o", out, "--json").json
    assert data["patch"]["id"] == read_patch(out).id
    assert [patch["name"] for patch in data["patches"]] == ["first", "second"]
    assert data["method"] == "memit"
    assert data["effect"]["after"]["efficacy"]["n"] == 3
    assert "Efficacy" in run("stack", *paths, "--resolve", "--model", world.model, "-o", out, "--force").out
    assert run("stack", *paths, "--resolve", "--model", world.model, "-o", out).code == 3
    for wrong in (["--resolve", "--check"], ["--resolve", "--scale", "1", "-o", "y"], ["--model", "m", "-o", "y"]):
        assert run("stack", *paths, *wrong).code == 2

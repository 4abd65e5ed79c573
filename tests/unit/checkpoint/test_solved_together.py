"""Patches made apart and applied together: the joint solution of all their facts, in whatever way it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kpatch.checkpoint import rounding
from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.revert import revert
from kpatch.checkpoint.status import status
from kpatch.checkpoint.store import Store
from kpatch.errors import Refused
from kpatch.patch import size
from kpatch.patch.delta import sum_rows
from kpatch.patch.header import read_header
from kpatch.patch.stack import stack
from kpatch.patch.summands import Part, summands
from tests.oracle import stacking as plain
from tests.support import rows
from tests.support.checkpoints import CONV1D, WEIGHTS, contents, make_checkpoint, make_patch, snapshot, weights
from tests.support.reports import Recorder

OWN = {name: rows.facts_of(3, seed) for seed, name in enumerate("abc", 1)}


class World:
    """A checkpoint, its unpatched picture, and three patches made apart."""

    def __init__(self, folder: Path, names: Sequence[str] = WEIGHTS) -> None:
        self.folder, self.names = folder, names
        self.model = make_checkpoint(folder / "model", conv1d=names is CONV1D)
        self.base = weights(self.model)
        self.patches = {name: folder / f"{name}.patch" for name in "abc"}
        for name, path in self.patches.items():
            rows.write_rows(path, self.model, OWN[name], [f"{name} {i}" for i in range(3)], weights=names)

    def fresh(self, which: str) -> Path:
        """A checkpoint of its own with these patches applied at once."""
        model = make_checkpoint(self.folder / f"fresh-{which}", conv1d=self.names is CONV1D)
        apply([self.patches[name] for name in which], model)
        return model

    def change(self, model: Path, layer: int) -> Tensor:
        """What was added to a layer's weight, [out, in]."""
        name = self.names[layer]
        found = weights(model)[name].double() - self.base[name].double()
        return found.T if self.names is CONV1D else found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def solution(layer: int, which: str) -> Tensor:
    return plain.solution(rows.covariance(layer), [fact for name in which for fact in OWN[name][layer]])


@pytest.mark.parametrize("names", [WEIGHTS, CONV1D], ids=["linear", "conv1d"])
def test_patches_applied_together_are_the_joint_solution(tmp_path: Path, names: tuple[str, ...]) -> None:
    world = World(tmp_path, names)
    model = world.fresh("abc")
    for layer in range(3):
        want = solution(layer, "abc")
        assert (world.change(model, layer) - want).norm() < 1e-6 * want.norm()
        alone = sum_rows([Part(read_header(path), names[layer]).delta() for path in world.patches.values()], 0, 12)
        assert ((alone.T if names is CONV1D else alone) - want).norm() > 0.5 * want.norm()
    assert Store(model).applied().weights[names[0]].joint


def test_the_order_of_applying_does_not_matter(world: World) -> None:
    want = contents(world.fresh("abc"))
    for order in permutations("abc"):
        model = make_checkpoint(world.folder / "".join(("one by one ", *order)))
        for name in order:
            apply([world.patches[name]], model)
        assert contents(model) == want


@pytest.mark.parametrize("kept", [0, 1 << 26], ids=["no room", "room"])
def test_a_sum_found_for_the_warning_serves_the_writing(
    world: World, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    first = min(read_header(path).id for path in world.patches.values())
    several = {seed: world.folder / f"bare-{seed}.patch" for seed in range(3, 30)}
    # Without facts: no edit, and no part of a size. One that is added later than the first of the others
    bare = next(path for seed, path in several.items() if make_patch(path, world.model, facts=(), seed=seed) > first)
    edits = list(world.patches.values())
    plain = make_checkpoint(world.folder / "plain")
    apply([*edits, bare], plain)
    wanted = {3: contents(world.fresh("abc")), 4: contents(plain)}
    monkeypatch.setattr(size, "WARN_ABOVE", 0.0)
    monkeypatch.setattr(size, "_KEPT", kept)
    found: list[int] = []
    of = rounding.summands
    monkeypatch.setattr(rounding, "summands", lambda parts, replaced: found.append(1) or of(parts, replaced))
    for patches in (edits, [*edits, bare]):
        model = make_checkpoint(world.folder / f"{len(patches)} patches")
        report = Recorder()
        apply(patches, model, report=report)
        assert any("of their norm" in text for text in report.warnings)
        assert contents(model) == wanted[len(patches)]
    assert len(found) == (3 if kept else 6), "a patch without facts is added all the same"


@pytest.mark.parametrize("gone", "abc")
def test_reverting_one_gives_what_the_others_alone_would_have_given(world: World, gone: str) -> None:
    model = world.fresh("abc")
    revert(model, world.patches[gone])
    assert contents(model) == contents(world.fresh("abc".replace(gone, "")))
    assert status(model).state == "clean"
    revert(model, all=True)
    assert snapshot(model) == snapshot(world.model)


def test_a_copy_and_a_model_in_memory_are_the_same(world: World) -> None:
    from torch import nn

    from kpatch.evaluate.patched import patched

    want = weights(world.fresh("abc"))
    apply(list(world.patches.values()), world.model, out=world.folder / "copy")
    assert contents(world.folder / "copy") == contents(world.fresh("cba"))

    net = nn.Module()
    for name, tensor in world.base.items():
        *path, leaf = name.split(".")
        place = net
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.register_parameter(leaf, nn.Parameter(tensor.clone()))
    with ExitStack() as entered:
        for name in "cab":
            entered.enter_context(patched(net, world.patches[name]))
        assert all(torch.equal(net.get_parameter(name), want[name]) for name in WEIGHTS)
    assert all(torch.equal(net.get_parameter(name), world.base[name]) for name in WEIGHTS)


def test_a_stack_stands_for_the_patches_in_it(world: World) -> None:
    ab, abc = world.folder / "ab.patch", world.folder / "abc.patch"
    result = stack([world.patches["b"], world.patches["a"]], ab)
    assert result.together == {0, 1}
    assert read_header(ab).manifest.deltas[WEIGHTS[0]].by_row
    stack([world.patches["c"], ab], abc)
    want = weights(world.fresh("abc"))
    for given in ([ab, world.patches["c"]], [abc]):
        model = make_checkpoint(world.folder / f"stacked-{len(given)}")
        apply(given, model)
        for name in WEIGHTS:
            torch.testing.assert_close(weights(model)[name], want[name], rtol=1e-5, atol=1e-6)


def chained(world: World) -> Path:
    """Patch d, made on top of a and b together, with the facts of c."""
    held = {layer: [*OWN["a"][layer], *OWN["b"][layer]] for layer in range(3)}
    facts = {layer: plain.on_top(solution(layer, "ab"), OWN["c"][layer]) for layer in range(3)}
    parents = sorted(read_header(world.patches[name]).id for name in "ab")
    path = world.folder / "d.patch"
    rows.write_rows(path, world.model, facts, [f"c {i}" for i in range(3)], held=held, parents=parents)
    return path


def test_a_patch_on_top_of_others_adds_to_what_they_give_together(world: World) -> None:
    world.patches["d"] = chained(world)
    model = world.fresh("dab")
    for layer in range(3):
        want = solution(layer, "abc")
        assert (world.change(model, layer) - want).norm() < 1e-6 * want.norm()
    revert(model, world.patches["d"])
    assert contents(model) == contents(world.fresh("ab"))


def test_a_patch_of_another_kind_is_added_and_apply_warns(world: World) -> None:
    facts = [{"subject": "Lisbon", "prompt": "{} is", "target": "Rome"}]
    make_patch(world.folder / "old.patch", world.model, scale=1.0, facts=facts)
    world.patches["o"] = world.folder / "old.patch"
    heard = Recorder()
    apply([world.patches["a"], world.patches["b"], world.patches["o"]], world.model, report=heard)
    assert any("--resolve" in warning and "old" in warning for warning in heard.warnings)
    assert not any("b (" in warning and "old" not in warning for warning in heard.warnings)
    infos = [read_header(world.patches[name]) for name in "abo"]
    for name in WEIGHTS:
        given = summands([Part(info, name) for info in infos])
        pair = summands([Part(info, name) for info in infos[:2]])
        assert torch.equal(given[2].dense(), Part(infos[2], name).delta().dense())
        assert all(torch.equal(one.dense(), other.dense()) for one, other in zip(given, pair, strict=False))


def test_other_facts_about_one_subject_are_added_and_apply_warns(world: World) -> None:
    path = world.folder / "other.patch"
    rows.write_rows(path, world.model, rows.facts_of(1, 7), ["a  1"], prompt="{} was made by")
    heard = Recorder()
    apply([world.patches["a"], path], world.model, report=heard)
    assert any("other facts about 1 subject" in warning for warning in heard.warnings)


def rival(world: World) -> Path:
    """A patch that says of "a 1" what patch a does not."""
    path = world.folder / "rival.patch"
    rows.write_rows(path, world.model, rows.facts_of(2, 8), ["a 1", "new"], targets=["Paris", "Paris"])
    return path


def test_a_contradiction_replaces_the_earlier_fact_when_that_is_asked_for(world: World) -> None:
    path = rival(world)
    model = world.fresh("ab")
    with pytest.raises(Refused, match="contradict each other"):
        apply([path], model)
    heard = Recorder()
    apply([path], model, replace=True, report=heard)
    assert any("replaces a fact of a: a 1 is in Rome" in note for note in heard.notes)
    for layer in range(3):
        left = [fact for number, fact in enumerate(OWN["a"][layer]) if number != 1]
        want = plain.solution(rows.covariance(layer), [*left, *OWN["b"][layer], *rows.facts_of(2, 8)[layer]])
        assert (world.change(model, layer) - want).norm() < 1e-6 * want.norm()
    found = {patch["name"]: patch.get("replaced") for patch in status(model).patches}
    assert found == {"a": 1, "b": None, "rival": None}
    revert(model, path)
    assert contents(model) == contents(world.fresh("ba"))


def test_a_fact_that_is_replaced_does_not_contradict_later_patches(world: World) -> None:
    path, again = rival(world), world.folder / "again.patch"
    rows.write_rows(again, world.model, rows.facts_of(1, 9), ["a 1"], targets=["Paris"])
    model = world.fresh("ab")
    apply([path], model, replace=True)
    apply([again], model)
    revert(model, path)  # the other patch that says so keeps the earlier fact away
    assert {patch["name"]: patch.get("replaced") for patch in status(model).patches} == {
        "a": 1,
        "b": None,
        "again": None,
    }
    revert(model, world.patches["a"])
    other = make_checkpoint(world.folder / "other")
    apply([world.patches["b"], again], other)
    assert contents(model) == contents(other)


def test_a_fact_of_a_patch_that_does_not_store_rows_cannot_be_replaced(world: World) -> None:
    facts = [{"subject": "a 1", "prompt": "{} is in", "target": "Oslo"}]
    make_patch(world.folder / "old.patch", world.model, facts=facts)
    apply([world.folder / "old.patch"], world.model)
    before = snapshot(world.model)
    with pytest.raises(Refused, match="cannot be replaced"):
        apply([world.patches["a"]], world.model, replace=True)
    assert snapshot(world.model) == before

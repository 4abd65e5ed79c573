"""A chain of `make --on`: one C, residuals of the base, earlier targets held: the joint solution of all facts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kpatch.checkpoint.apply import apply
from kpatch.edit import held
from kpatch.edit.make import make
from kpatch.edit.methods import Inputs, hyper_for, method_named
from kpatch.edit.unpatched import unpatched
from kpatch.facts.fact import Fact
from kpatch.models.fingerprint import weights_fingerprint
from kpatch.models.model import open_model
from kpatch.patch.delta import total
from kpatch.patch.fields import ManifestError
from kpatch.patch.format import Patch, read_patch
from kpatch.patch.manifest import WITH_HELD_ROWS, Manifest, NewerFormat
from kpatch.stats import covariance
from tests.support.models import tiny

OWN = (
    [Fact("Mona Lisa", "In the {}", "Paris"), Fact("Chicago", "Out of {}", "Rome")],
    [Fact("Moonlight Sonata", "By the {}", "Brazil")],
    [Fact("São Paulo", "Near {}", "Paris")],
)
COMMON = {"steps": "8", "lead_ins": "1", "clamp": "3"}
SETTINGS = {
    "memit": {**COMMON, "leverage": "50000", "chat": "0", "refine": "0"},  # the law is the update's
    "memit-paper": {**COMMON, "prefixes": "1", "covariance_weight": "0.5"},
}


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "cache"))


def how(method: str, layers: list[int]) -> dict[str, Any]:
    settings = SETTINGS[method]
    return {"method": method, "layers": layers, "tokens": 400, "wordings": "none", "settings": settings}


def chain(folder: Path, family: str, method: str, layers: list[int]) -> list[Patch]:
    """Patches with the facts of OWN, each made on those before it; `folder/base` stays without any."""
    model = tiny(family)
    model.net.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "model")
    patches = []
    for number, facts in enumerate(OWN):
        where = {"on": folder / "model"} if number else {"model": str(folder / "model")}
        make(facts, out=folder / f"{number}.patch", **where, **how(method, layers))
        apply([folder / f"{number}.patch"], folder / "model")
        patches.append(read_patch(folder / f"{number}.patch"))
    return patches


def off(folder: Path, patches: list[Patch], method: str, layers: list[int]) -> dict[int, tuple[float, float]]:
    """By layer, how far the chain's sum is from the update that the base gets for all facts with the same values:
    of Δ, and of Δ K at the facts' keys."""
    stored: dict[tuple[tuple[int, ...], tuple[int, ...], bool], Tensor] = {}
    before = 0
    for patch in patches:
        assert patch.values is not None
        for value, group in zip(patch.values, patch.manifest.groups, strict=True):
            if group["facts"]:
                about = tuple(before + index for index in group["facts"])
                stored[about, tuple(group["layers"]), group.get("first") is True] = value
        before += len(patch.manifest.facts)
    base, own = open_model(str(folder / "base")), method_named(method)
    hyper = hyper_for(own, base, layers, SETTINGS[method])
    joint = own.edit(base, [fact for facts in OWN for fact in facts], hyper, Inputs(tokens=400, stored=stored))
    found = {}
    for layer in layers:
        name = base.weight_name(layer)
        want, got = joint.deltas[name].dense(), total([patch.deltas[name] for patch in patches]).dense()
        keys = joint.keys[layer].double().T
        if base.stores_transposed:
            want, got = want.T, got.T
        found[layer] = (
            float((got - want).norm() / want.norm()),
            float(((got - want) @ keys).norm() / (want @ keys).norm()),
        )
    return found


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Patch]]]:
    folder = tmp_path_factory.mktemp("chain")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache"))
        yield folder, chain(folder, "gpt2", "memit-paper", [1, 2])


def test_a_chain_has_one_covariance(papers: tuple[Path, list[Patch]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, patches = papers
    assert len({(patch.manifest.covariance or {})["id"] for patch in patches}) == 1
    monkeypatch.setenv("KPATCH_CACHE", str(folder / "cache"))

    def nothing_is_run(*given: object) -> None:
        raise AssertionError("the covariance of the base was in the cache")

    monkeypatch.setattr(covariance, "run_to", nothing_is_run)
    make(
        [Fact("Tokyo", "In {}", "Rome")], out=folder / "more.patch", on=folder / "model", **how("memit-paper", [1, 2])
    )


def test_the_lowest_layer_of_a_chain_is_the_joint_solution(papers: tuple[Path, list[Patch]]) -> None:
    """Keys of one context differ from another's here, so the residual has to be that of the base at the mean key."""
    everywhere, at_keys = off(*papers, "memit-paper", [1, 2])[1]
    assert everywhere < 1e-5
    assert at_keys < 1e-5


@pytest.mark.slow
def test_upper_layers_come_nearer_to_it_where_targets_are_held(
    papers: tuple[Path, list[Patch]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, patches = papers
    assert any(not group["facts"] for group in patches[1].manifest.groups)
    with_targets = off(folder, patches, "memit-paper", [1, 2])[2]
    monkeypatch.setattr(held, "MOVED", 1e9)  # keys alone
    with_keys = off(tmp_path, chain(tmp_path, "gpt2", "memit-paper", [1, 2]), "memit-paper", [1, 2])[2]
    assert with_targets[0] < 0.6 * with_keys[0]
    assert with_targets[1] < 0.6 * with_keys[1]


@pytest.mark.slow
def test_a_chain_of_several_keys_a_fact_gives_the_same_at_the_mean_keys(tmp_path: Path) -> None:
    at_keys = off(tmp_path, chain(tmp_path, "llama", "memit", [1]), "memit", [1])[1][1]
    assert at_keys < 1e-4


def test_rows_of_held_facts_are_read_back_and_refused_by_an_older_reader(papers: tuple[Path, list[Patch]]) -> None:
    patch = papers[1][1]
    value = patch.manifest.to_dict()
    assert value["format"] == WITH_HELD_ROWS
    assert papers[1][0].manifest.format == 1
    rows = [group for group in patch.manifest.groups if 2 in group["layers"]]
    assert len(patch.keys[2]) == len(rows)
    assert patch.manifest.deltas["transformer.h.2.mlp.c_proj.weight"].by_row
    with pytest.raises(NewerFormat):
        Manifest.from_dict({**value, "format": WITH_HELD_ROWS + 1})
    with pytest.raises(ManifestError, match="numbers from 0"):
        Manifest.from_dict({**value, "format": 1})


def test_the_base_goes_by_its_hash_and_the_patched_weights_come_back(papers: tuple[Path, list[Patch]]) -> None:
    folder, patches = papers
    carrying, base = open_model(str(folder / "model")), open_model(str(folder / "base"))
    name = base.weight_name(1)
    before = carrying.net.get_parameter(name).detach().clone()
    own = weights_fingerprint(carrying)
    with unpatched(carrying, tuple(patches)):
        assert torch.equal(carrying.net.get_parameter(name), base.net.get_parameter(name))
        assert weights_fingerprint(carrying) == weights_fingerprint(base) != own
    assert torch.equal(carrying.net.get_parameter(name), before)
    assert weights_fingerprint(carrying) == own

"""Patches that `make` made apart, or on top of each other, sum to the one that it makes of all their facts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kpatch.checkpoint.apply import apply
from kpatch.edit.make import make
from kpatch.facts.fact import Fact
from kpatch.patch.format import read_patch
from kpatch.patch.header import read_header
from kpatch.patch.joint import Joint
from kpatch.patch.summands import Part, asked, summands
from tests.support.models import tiny

pytestmark = pytest.mark.usefixtures("shared_statistics")

OWN = {
    "a": [Fact("Mona Lisa", "In the {}", "Paris"), Fact("Chicago", "Out of {}", "Rome")],
    "b": [Fact("Moonlight Sonata", "By the {}", "Brazil")],
    "c": [Fact("São Paulo", "Near {}", "Paris")],
}
# One layer and one key a fact: what the joint solution says holds exactly
SETTINGS = {"steps": "8", "lead_ins": "0", "prefixes": "0", "covariance_weight": "5", "kl": "0"}
HOW: dict[str, Any] = {"method": "memit-paper", "layers": [1], "tokens": 400, "wordings": "none", "settings": SETTINGS}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("stacking")
    model = tiny(request.param)
    model.net.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache"))
        whole = [fact for facts in OWN.values() for fact in facts]
        for name, facts in (*OWN.items(), ("joint", whole)):
            make(facts, out=folder / f"{name}.patch", model=str(folder / "model"), **HOW)
        shutil.copytree(folder / "model", folder / "carrying")
        apply([folder / "a.patch", folder / "b.patch"], folder / "carrying")
        make(OWN["c"], out=folder / "on.patch", on=folder / "carrying", **HOW)
        yield folder


def added(folder: Path, names: tuple[str, ...]) -> Tensor:
    parts = [Part(read_header(folder / f"{name}.patch"), weight(folder)) for name in names]
    return torch.stack([delta.dense() for delta in summands(parts)]).sum(0)


def weight(folder: Path) -> str:
    (name,) = read_header(folder / "joint.patch").manifest.deltas
    return name


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_patches_made_apart_give_the_joint_patch(folder: Path) -> None:
    wanted = added(folder, ("joint",))
    assert off(added(folder, ("a", "b", "c")), wanted) < 1e-5
    plain = sum(Part(read_header(folder / f"{name}.patch"), weight(folder)).delta().dense() for name in "abc")
    assert off(torch.as_tensor(plain), wanted) > 0.01


def test_a_patch_on_top_of_two_knows_their_keys(folder: Path) -> None:
    """Its C is that of the base, its values are its own, found on the patched model. But its directions fit theirs:
    K (C + K^T K)^-1 K^T, which the joint rows have to give, is symmetric."""
    info = read_header(folder / "on.patch")
    assert set(info.manifest.parents) == {read_header(folder / f"{name}.patch").id for name in "ab"}
    parts = [Part(read_header(folder / f"{name}.patch"), weight(folder)) for name in ("a", "b", "on")]
    rows = Joint([asked(part, part.delta()) for part in parts])
    left, right = rows.as_one()
    turned = parts[0].manifest.transposed(weight(folder))
    whole = added(folder, ("a", "b", "on"))
    assert off(left @ right, whole.T if turned else whole) < 1e-6
    keys = torch.cat([one.keys.double() for one in rows.patches])
    gram = keys @ right.T
    assert off(gram.T, gram) < 1e-5
    assert off((keys @ rows.right.T).T, keys @ rows.right.T) > 0.01


def test_rows_hold_what_was_asked_for_and_what_gives_it(folder: Path) -> None:
    patch = read_patch(folder / "a.patch")
    info = patch.manifest.deltas[weight(folder)]
    assert info.by_row
    assert info.rank == len(OWN["a"]) == len(patch.keys[1])

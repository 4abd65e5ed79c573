"""A patch as changes to memories: shares, written values and what they promote; by hand, and on a made patch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kpatch.edit.make import make
from kpatch.errors import BadInput, Refused
from kpatch.facts.fact import Fact
from kpatch.facts.tokens import encode_many, item_of
from kpatch.memories.patch_view import FactWrite, to_dict, view_patch
from kpatch.memories.values import promoted_logits
from kpatch.models.address import resolve
from kpatch.models.model import Model, load_model
from kpatch.patch.format import Patch, read_patch
from tests.support import checkpoints
from tests.support.families import check, plain
from tests.support.models import tiny

pytestmark = pytest.mark.usefixtures("shared_statistics")

TARGET = "Rome"


def saved(family: str, folder: Path) -> Model:
    made = tiny(family)
    made.net.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return load_model(resolve(folder))


def random_patch(path: Path, model: Model, keys: bool) -> Patch:
    """Random changes of three layers, for two facts."""
    assert model.path is not None
    facts = [{"subject": name, "prompt": "The city of {} is in", "target": TARGET} for name in ("Chicago", "Paris")]
    weights = [model.weight_name(layer) for layer in (0, 1, 2)]
    family = model.family.model_type
    transposed = model.stores_transposed or None
    checkpoints.make_patch(
        path, model.path, weights=weights, facts=facts, keys=keys, family=family, transposed=transposed
    )
    return read_patch(path)


@pytest.mark.parametrize("keys", [True, False], ids=["stored", "own"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_what_a_patch_writes_by_hand(family: str, keys: bool, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "model")
    patch = random_patch(tmp_path / "x.patch", model, keys)
    found = view_patch(model, patch, units=64)
    assert [one.fact.subject for one in found] == ["Chicago", "Paris"]
    for number, one in enumerate(found):
        encoded = encode_many(model.tokenizer, [item_of(one.fact)])[0]
        target = encoded.ids[encoded.prompt_len]
        total = torch.zeros(model.width, dtype=torch.float64)
        for layer in one.layers:
            key = patch.keys[layer.layer][number].double() if keys else own_key(model, encoded, layer.layer)
            delta = patch.deltas[model.weight_name(layer.layer)].dense()
            columns = delta if model.stores_transposed else delta.T  # [f, d]
            written = sum((m * column for m, column in zip(key, columns, strict=True)), torch.zeros(model.width))
            total += written
            stored = model.weight(layer.layer).double()
            weight = stored if model.stores_transposed else stored.T
            assert layer.size == pytest.approx(float(written.norm() / (key @ weight).norm()), rel=1e-4)
            logits = promoted_logits(model, layer.layer, written[None])[0]
            assert abs(layer.rank - 1 - int((logits > logits[target]).sum())) <= 1
            assert layer.promotes[0][0] == model.tokenizer.decode([int(logits.argmax())])
            assert sum(unit.share for unit in layer.units) == pytest.approx(1, abs=1e-4)
            assert [unit.share for unit in layer.units] == sorted((unit.share for unit in layer.units), reverse=True)
            for unit in layer.units[:3]:
                at = unit.unit.number
                share = float(key[at] * columns[at] @ written / (written @ written))
                assert unit.share == pytest.approx(share, rel=1e-3, abs=1e-5)
                sign = 1 if key[at] > 0 else -1
                for kept, value in ((unit.before, weight[at]), (unit.after, weight[at] + columns[at])):
                    top = promoted_logits(model, layer.layer, sign * value[None])[0].argmax()
                    assert kept[0][0] == model.tokenizer.decode([int(top)])
        summed(model, one, total)


def own_key(model: Model, encoded: object, layer: int) -> Tensor:
    return plain(model, list(encoded.ids[: encoded.prompt_len])).keys[layer][encoded.subject_last].double()  # type: ignore[attr-defined]


def summed(model: Model, one: FactWrite, total: Tensor) -> None:
    if model.family.post_norm:
        assert (one.together, one.rank) == (None, None)
        return
    assert one.together is not None
    logits = promoted_logits(model, 2, total[None])[0]
    check(torch.tensor([chance for _, chance in one.together]), logits.softmax(-1).topk(len(one.together)).values)


def test_a_made_patch_promotes_its_target(tmp_path: Path) -> None:
    """In the last layer that it edits of a model whose layers above add little, the written value is the target's."""
    made = tiny("llama", num_hidden_layers=2)
    with torch.no_grad():
        for name, weight in made.net.model.layers[1].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(0.01)
    made.net.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    facts = [Fact("Chicago", "{}", TARGET)]
    make(
        facts,
        out=tmp_path / "x.patch",
        model=str(tmp_path / "model"),
        method="memit",
        layers=[0],
        tokens=700,
        wordings="none",
    )
    model = load_model(resolve(tmp_path / "model"))
    (one,) = view_patch(model, read_patch(tmp_path / "x.patch"))
    assert one.layers[0].rank <= 3
    assert one.target in [token for token, _ in one.layers[0].promotes[:3]]
    data = to_dict(one)
    assert data["layers"][0]["target_rank"] == one.layers[0].rank
    assert data["together"]["promotes"] == data["layers"][0]["promotes"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "model")
    patch = random_patch(tmp_path / "x.patch", model, keys=True)
    with pytest.raises(Refused, match="not the base it was made for"):
        view_patch(tiny("llama", seed=5), patch)


def test_a_patch_without_facts_or_without_a_projection(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "model")
    assert model.path is not None
    names = [model.weight_name(layer) for layer in (0, 1, 2)]
    checkpoints.make_patch(tmp_path / "none.patch", model.path, weights=names, facts=[], keys=False)
    with pytest.raises(BadInput, match="holds no facts"):
        view_patch(model, read_patch(tmp_path / "none.patch"))
    gates = [name.replace("down_proj", "gate_proj") for name in names]
    checkpoints.make_patch(tmp_path / "gates.patch", model.path, weights=gates, keys=False)
    with pytest.raises(BadInput, match="no change of an MLP's output projection"):
        view_patch(model, read_patch(tmp_path / "gates.patch"))

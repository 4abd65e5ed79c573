"""kpatch's values and updates against those of the published equations, computed by `memit_paper.py` without it."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from kpatch.edit.make import make
from kpatch.facts.fact import Fact
from kpatch.patch.format import read_patch
from tests.golden import memit_paper as paper

pytestmark = pytest.mark.usefixtures("one_thread")

# kpatch runs the model in float32, the golden numbers come from float64. Measured: 3e-7 for z, 4e-5 for Δ
CLOSE_Z, CLOSE_DELTA = 1e-5, 4e-4


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(paper.GOLDEN, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["settings"])


def distance(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_the_script_gives_the_golden_numbers_again(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    kept, about = golden
    tensors, settings = paper.memit()
    assert json.loads(json.dumps(settings)) == about
    assert tensors.keys() == kept.keys()
    for name, tensor in tensors.items():
        assert distance(tensor, kept[name]) < 1e-6, name


def test_the_golden_case_meets_every_part_of_the_equations(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """One fact stops early and one runs to the end at the ball's edge; the deltas are neither nothing nor all of R."""
    kept, about = golden
    net, tokenizer = paper.tiny_gpt2()
    rows = [paper.encode(tokenizer, *fact) for fact in paper.FACTS]
    h = torch.stack([paper.hidden_state(net, row, 2) for row in rows])
    way = kept["z"] - h
    assert min(about["iterations"]) < max(about["iterations"]) == about["steps"]
    at_the_edge = way.norm(dim=1) / h.norm(dim=1) > 0.999 * about["clamp"]
    assert 0 < int(at_the_edge.sum()) < len(way)
    for layer in about["layers"]:
        weight = net.transformer.h[layer].mlp.c_proj.weight
        assert 0.05 < kept[f"delta.{layer}"].norm() / weight.norm() < 1


@pytest.mark.parametrize("module", [paper.__file__, paper.byte_level.__code__.co_filename])
def test_the_script_uses_nothing_of_kpatch_or_the_oracle(module: str) -> None:
    names = set()
    for node in ast.walk(ast.parse(Path(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    ours = {name for name in names if name.split(".")[0] in ("kpatch", "tests")}
    assert ours <= {"tests.support.tokenizers"}


def test_make_gives_the_golden_values_and_deltas(
    golden: tuple[dict[str, Tensor], dict[str, Any]], tmp_path: Path
) -> None:
    kept, about = golden
    net, tokenizer = paper.tiny_gpt2()
    net.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text(paper.CORPUS, encoding="utf-8")
    numbers = ("steps", "learning_rate", "stop_loss", "clamp", "weight_decay", "kl", "covariance_weight")
    make(
        [Fact(subject, prompt, target) for prompt, subject, target in paper.FACTS],
        out=tmp_path / "paper.patch",
        model=str(tmp_path / "model"),
        layers=about["layers"],
        corpus=str(tmp_path / "corpus.txt"),
        tokens=about["covariance_tokens"],
        method="memit-paper",
        wordings="none",
        settings={**{name: str(about[name]) for name in numbers}, "lead_ins": "2", "prefixes": "0"},
    )
    patch = read_patch(tmp_path / "paper.patch")
    assert [dict(row) for row in patch.manifest.groups] == [
        {"facts": [index], "layers": about["layers"]} for index in range(len(paper.FACTS))
    ]
    assert patch.values is not None
    for index, (got, want) in enumerate(zip(patch.values, kept["z"], strict=True)):
        assert distance(got, want) < CLOSE_Z, paper.FACTS[index]
    assert len(patch.deltas) == len(about["layers"])
    for layer in about["layers"]:
        delta = patch.deltas[f"transformer.h.{layer}.mlp.c_proj.weight"]  # stored [f, d]
        assert distance(delta.dense().T, kept[f"delta.{layer}"]) < CLOSE_DELTA, layer

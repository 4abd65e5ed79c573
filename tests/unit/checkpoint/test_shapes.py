"""Weights of any shape, and stacks beside the patches in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.revert import revert
from kpatch.errors import Refused
from kpatch.patch.format import pack, read_patch, write_patch
from tests.support.checkpoints import make_checkpoint, make_patch, refused, snapshot, three


def test_a_vector_and_a_stack_of_matrices_are_patched_and_come_back(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "BF16")
    old = load_file(model / "model.safetensors")
    old["experts"] = torch.arange(24).reshape(2, 3, 4).bfloat16()
    save_file(old, model / "model.safetensors", metadata={"format": "pt"})
    norm, before = "model.layers.0.input_layernorm.weight", snapshot(model)
    path = tmp_path / "a.patch"
    make_patch(path, model, weights=[norm, "experts"], rank=1, keys=False)
    apply([path], model)
    new, patch = load_file(model / "model.safetensors"), read_patch(path)
    for name in old:
        change = patch.deltas[name].dense().reshape(old[name].shape) if name in patch.deltas else 0
        assert torch.equal(new[name], (old[name].double() + change).to(torch.bfloat16)), name
    assert not torch.equal(new[norm], old[norm])
    revert(model)
    assert snapshot(model) == before


def test_a_stack_and_a_patch_in_it_are_not_applied_together(model: Path, tmp_path: Path) -> None:
    a, b, _ = three(model)
    patch = read_patch(b)
    part = {"id": read_patch(a).id, "scale": 0.5, "facts": 1, "method": "memit", "hyperparameters": {}, "layers": [0]}
    stack = tmp_path / "stack.patch"
    write_patch(stack, replace(patch.manifest, stack=(part,)), pack(patch.deltas, patch.values, patch.keys))
    refused(lambda: apply([a, stack], model), Refused, r"a \(.*stack \(.*both hold patch", model)
    apply([stack, b], model)
    refused(lambda: apply([a], model), Refused, r"stack \(.*a \(.*both hold patch", model)

"""Editors for tiny models: random ones, trained ones, and the facts that they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch

from kpatch.facts.fact import Fact, Neighbor
from kpatch.mend.file import write_editor
from kpatch.mend.network import Network, Settings
from kpatch.mend.places import places
from kpatch.mend.settings import TrainHyper
from kpatch.mend.train import Trained, train
from kpatch.models.model import Model

NAMES = ("Paris", "Rome", "Lyon", "Oslo", "Cairo", "Lima", "Delhi", "Tokyo", "Bern", "Riga", "Quito", "Accra")
TARGETS = ("Rome", "Paris", "the sea")
# Large steps: a random model has nothing to lose
QUICK = TrainHyper(
    **{"rank": 8, "batch": 4, "steps": 40, "validate_every": 10, "learning_rate": 3e-4, "step_rate": 1e-3},  # type: ignore[arg-type]
    **{"edit_rate": 1e-2, "text_tokens": 8, "reads": 3, "measured": 20},  # type: ignore[arg-type]
)


def training_facts(count: int = len(NAMES)) -> list[Fact]:
    """Facts with one paraphrase each, every other one with a neighbor."""
    return [
        Fact(
            name,
            "The city of {} is in",
            target,
            paraphrases=("Where is {}? In",),
            neighbors=(Neighbor("The sea is near", target),) if number % 2 else (),
        )
        for number, (name, target) in enumerate(zip(NAMES[:count], cycle(TARGETS), strict=False))
    ]


def random_network(
    model: Model, layers: Sequence[int], regression: int = 0, covariance: int = 0, rank: int = 5, seed: int = 1
) -> Network:
    """A network none of whose numbers is what it begins with, so that each of them is felt."""
    network = Network(places(model, layers), Settings(rank, regression=regression, covariance=covariance), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if name.startswith("precisions"):
                tensor.copy_(torch.eye(len(noise)) + noise @ noise.T / len(noise))
            elif name.endswith(("std", "sizes")):
                tensor.copy_(0.5 + noise.abs())
            elif name == "steps":
                tensor.copy_(2e-3 * noise)
            else:
                tensor.copy_(0.3 * noise if name.endswith((".u", ".v")) else tensor + 0.2 * noise)
    return network


def save_editor(path: Path, model: Model, layers: Sequence[int], regression: int = 0) -> Path:
    """A trained editor that moves a tiny model."""
    found = trained(model, layers, regression)
    write_editor(path, model, found.network, found.to_dict())
    return path


def trained(model: Model, layers: Sequence[int], regression: int = 0) -> Trained:
    hyper = replace(QUICK, regression=regression, edits=2 if regression else 1)
    return train(model, training_facts(), hyper, layers=layers, resume=False)

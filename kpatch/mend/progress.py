"""How far a training has come, on disk: the network, Adam's moments, the best network so far and what was found.

A file in the cache, written whole or not at all, under a name that all settings decide. It goes when the editor is
written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kpatch.cache import atomic_write, cache_dir
from kpatch.facts.fact import Fact
from kpatch.mend.network import Network
from kpatch.mend.places import Place
from kpatch.mend.settings import TrainHyper
from kpatch.models.fingerprint import tokenizer_hash, weights_fingerprint
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.corpus import SELF, open_corpus
from kpatch.stats.covariance import whole_steps

_CODE = 2  # raise it when the same settings come to give another editor
_KEY = "kpatch"
# What Adam keeps of a parameter, and what it is called in the file
_ADAM = {"exp_avg": "first", "exp_avg_sq": "second", "step": "count"}


class Progress:
    """Everything that a step changes. `path` is None where nothing is kept."""

    def __init__(self, network: Network, path: Path | None = None, report: Reporter = SILENT) -> None:
        self.network, self.path, self.report = network, path, report
        self._begin = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        self.clear()

    def clear(self) -> None:
        """Back to the beginning."""
        self.network.load_state_dict(self._begin)
        self.adam = torch.optim.Adam({"params": [one]} for one in self.network.parameters())
        self.best: dict[str, Tensor] = {}
        self.history: list[dict[str, float]] = []
        self.steps, self.waited = 0, 0
        self.validated, self.measured = False, False

    def step(self, gradients: Sequence[Tensor | None], hyper: TrainHyper) -> None:
        """One step of Adam with the gradient clipped; Ctrl-C waits until it is whole."""
        named = list(self.network.named_parameters())
        for group, (name, one), gradient in zip(self.adam.param_groups, named, gradients, strict=True):
            group["lr"] = {"steps": hyper.step_rate, "ridges": hyper.ridge_rate}.get(name, hyper.learning_rate)
            one.grad = gradient
        torch.nn.utils.clip_grad_norm_([one for _, one in named], hyper.clip)
        with whole_steps() as steps, steps.step():
            self.steps += 1
            self.adam.step()
            self.adam.zero_grad()
            self.validated = False

    def judge(self, row: dict[str, float]) -> None:
        """Take in what a validation found, and keep the network if it is the best so far."""
        with whole_steps() as steps, steps.step():
            lowest = min((one["loss"] for one in self.history), default=float("inf"))
            if row["loss"] < lowest:
                self.best = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
                self.waited = 0
            else:
                self.waited += 1
            self.history.append(row)
            self.validated = True

    def take_best(self) -> None:
        """The network as it was at the lowest validation loss."""
        self.network.load_state_dict(self.best or self.network.state_dict())

    def save(self) -> None:
        """Write everything. Raises KpatchError where the cache cannot be written."""
        if self.path is None:
            return
        tensors = {f"now.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, one in self.network.named_parameters():
            tensors |= {f"{_ADAM[key]}.{name}": value for key, value in self.adam.state.get(one, {}).items()}
        about = {"steps": self.steps, "waited": self.waited, "history": self.history}
        about |= {"validated": self.validated, "measured": self.measured}
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        atomic_write(self.path, lambda temporary: save_file(whole, temporary, {_KEY: json.dumps(about)}))

    def load(self) -> bool:
        """Go on where an earlier run stopped; False where there is nothing whole to go on from."""
        if self.path is None or not self.path.is_file():
            return False
        with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
            with safe_open(self.path, framework="pt") as found:
                about = json.loads(found.metadata()[_KEY])
                tensors = {name: found.get_tensor(name) for name in found.keys()}
            self._take(about, tensors)
            self.report.note(f"Resuming after {self.steps:,} steps kept in the cache")
            return True
        self.clear()
        return False

    def _take(self, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        device = self.network.sizes.device

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): one.to(device) for name, one in tensors.items() if name.startswith(prefix)
            }

        self.network.load_state_dict(part("now."))
        self.best = part("best.")
        moments = {key: part(f"{prefix}.") for key, prefix in _ADAM.items()}
        for name, one in self.network.named_parameters():
            if any(name in some for some in moments.values()):
                self.adam.state[one] = {key: some[name] for key, some in moments.items()}
                self.adam.state[one]["step"] = self.adam.state[one]["step"].cpu()  # where Adam counts
        self.steps, self.waited = int(about["steps"]), int(about["waited"])
        self.history = [dict(row) for row in about["history"]]
        self.validated, self.measured = bool(about["validated"]), bool(about["measured"])

    def forget(self) -> None:
        """Remove what is kept: the editor is written."""
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


def open_progress(
    network: Network,
    model: Model,
    facts: Sequence[Fact],
    hyper: TrainHyper,
    where: Sequence[Place],
    corpus: str,
    seed: int,
    report: Reporter = SILENT,
) -> Progress:
    """The progress of the training that these settings name."""
    content = [_CODE, weights_fingerprint(model, report), tokenizer_hash(model.tokenizer), str(model.dtype)]
    content += [model.device.type, hyper.to_dict(), [place.name for place in where], seed]
    content += [SELF if corpus == SELF else open_corpus(corpus).identity, [fact.to_dict() for fact in facts]]
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Progress(network, cache_dir("mend") / f"{name}.safetensors", report)

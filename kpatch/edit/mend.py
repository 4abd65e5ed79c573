"""MEND: a trained network turns each fact's gradient into an update of the last layers' MLPs.

Source: Mitchell et al. 2022 (MEND). Every fact's update is found in the model as it is. They become one by their sum,
or by the ridge regression of MALMEN (Tan et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kpatch.edit.earlier import facts_to_learn_again
from kpatch.edit.ft import stored_small
from kpatch.edit.methods import Edit, Inputs, Method
from kpatch.edit.presets import PRESETS, MendHyper
from kpatch.edit.weights import stored
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.mend.aggregate import differences, regression
from kpatch.mend.data import edit_row
from kpatch.mend.file import Editor, read_editor, require_fit
from kpatch.mend.network import Network
from kpatch.mend.places import Place, places
from kpatch.mend.rows import Below, factors, marked
from kpatch.models.model import Model
from kpatch.patch.delta import Delta
from kpatch.reporter import Reporter

_FACTS = 16  # gradients taken together


@dataclass(frozen=True)
class Mend(Method):
    """MEND with one trained editor."""

    editor: Editor | None = None
    name = "mend"
    hyper = MendHyper
    presets = PRESETS["mend"]
    takes_editor = True
    writes_last = True

    def with_editor(self, path: str | Path | None) -> Mend:
        """The method with the editor in the file `path`. Raises BadInput without one, and as `read_editor` does."""
        if path is None:
            raise BadInput(
                "mend needs a trained editor", hint="name its file with `editor`; `kpatch train mend` makes one"
            )
        return replace(self, editor=read_editor(path))

    @property
    def trained(self) -> Editor:
        if self.editor is None:
            raise BadInput("mend needs a trained editor", hint="`with_editor` takes its file")
        return self.editor

    def choose_layers(self, model: Model, report: Reporter) -> tuple[int, ...]:
        """The layers that the editor was trained for."""
        require_fit(self.trained.info, model, report)
        return self.trained.info.layers

    def defaults(self, layers: tuple[int, ...]) -> MendHyper:
        """Aggregated as in the editor's training."""
        return MendHyper(layers, regression=self.trained.info.settings.regression)

    def require(self, model: Model, layers: Sequence[int]) -> None:
        """Refuse layers that the editor was not trained for, and an editor for another model. Raises BadInput."""
        known = self.trained.info.layers
        if tuple(layers) != known:
            raise BadInput(
                f"{self.trained.info.name} edits layers {', '.join(map(str, known))}",
                details=[f"found {', '.join(map(str, layers))} in `layers`"],
                hint="leave `layers` out, or train an editor for these",
            )
        require_fit(self.trained.info, model)

    def weights(self, model: Model, layers: Sequence[int]) -> tuple[str, ...]:
        """The input and output projections of the MLPs."""
        return tuple(place.name for place in places(model, layers))

    def edit(self, model: Model, facts: Sequence[Fact], hyper: MendHyper, inputs: Inputs) -> Edit:
        """One gradient a fact, and what the editor makes of them all; no keys or values are kept."""
        facts = [*facts, *facts_to_learn_again(inputs.on, facts, inputs.report, inputs.gone)]
        network = self.trained.network.to(model.device)
        gathered = [
            Gathered(place, bool(hyper.regression), network.precision(number))
            for number, place in enumerate(network.places)
        ]
        below = Below(model, network.places[0].layer, 0)
        with inputs.timed("update"), inputs.report.task("Taking gradients", len(facts), "fact") as advance:
            for begin in range(0, len(facts), _FACTS):
                some = facts[begin : begin + _FACTS]
                found = factors(below.ready([edit_row(model, fact) for fact in some]), network.places)
                for number, (u, delta) in enumerate(found):
                    gathered[number].add(network, number, u, delta)
                advance(len(some))
            deltas = {
                one.place.name: one.delta(float(network.ridge(number) * hyper.ridge))
                for number, one in enumerate(gathered)
            }
        self._require_finite(deltas)
        return Edit(deltas, hyper.layers, origin={"editor": self.trained.info.sha256})

    def _require_finite(self, deltas: dict[str, Delta]) -> None:
        for name, delta in deltas.items():
            if not bool(torch.isfinite(torch.tensor(delta.norm()))):
                raise BadInput(
                    f"The update of {name} is not finite",
                    details=["the gradients of the facts, or what the editor makes of them, overflow"],
                    hint="load the model with `dtype=float32`",
                )


class Gathered:
    """Pairs (a_j, b_j) of all tokens of all facts for one place, in float64 on the CPU.

    Their sum is Σ b_j a_jᵀ with a = ũ and b = −α δ̃; regression has a = u and b = v. Once there are as many tokens as
    the narrower side of the matrix, products are kept in the place of pairs, so that memory does not grow with facts.
    """

    def __init__(self, place: Place, regression: bool, precision: Tensor | None = None) -> None:
        self.place, self.regression = place, regression
        self.precision = None if precision is None else precision.double().cpu()
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.cross: Tensor | None = None  # Σ a bᵀ [in, out]
        self.gram: Tensor | None = None  # Σ a aᵀ [in, in]

    @torch.no_grad()
    def add(self, network: Network, number: int, u: Tensor, delta: Tensor) -> None:
        """Take in u [B, T, in] and δ [B, T, out] of some facts."""
        at = marked(u, delta)
        u, delta = u.flatten(0, 1)[at].float(), delta.flatten(0, 1)[at].float()
        read, write = network(number, u, delta)
        u, read, write = (one.double().cpu() for one in (u, read, write))
        self.pairs.append((u, differences(u, read, write)) if self.regression else (read, write))
        if sum(len(a) for a, _ in self.pairs) >= min(self.place.shape):
            self._fold()

    def _fold(self) -> None:
        a, b = (torch.cat(some) for some in zip(*self.pairs, strict=True))
        self.pairs = []
        self.cross = a.T @ b if self.cross is None else self.cross + a.T @ b
        if self.regression:
            self.gram = a.T @ a if self.gram is None else self.gram + a.T @ a

    def delta(self, ridge: float) -> Delta:
        """Δ as the weight is stored: one pair of factors a token, or what is smaller."""
        if self.cross is None:
            a, b = (torch.cat(some) for some in zip(*self.pairs, strict=True))
            if self.regression:
                a, b = regression(a, b, torch.tensor(ridge, dtype=a.dtype), self.precision)
            return stored(b.T, a, self.place.transposed)
        if self.pairs:
            self._fold()
        change = self.cross
        if self.gram is not None:  # (UᵀU + λ P⁻¹) S = UᵀV, times P
            gram, change = (one if self.precision is None else self.precision @ one for one in (self.gram, change))
            change = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), change)
        return stored_small(change if self.place.transposed else change.T.contiguous())

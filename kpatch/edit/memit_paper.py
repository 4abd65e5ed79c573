"""MEMIT as its paper has it: one value at the top of the layers R, each fact's residual spread over them.

Source: Meng et al. 2023 (MEMIT), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from kpatch.edit.first_token import Part
from kpatch.edit.layer_states import written
from kpatch.edit.memit import Memit
from kpatch.edit.methods import Inputs
from kpatch.edit.norms import before_norm, require_one_way
from kpatch.edit.presets import PRESETS, HyperParams, MemitPaperHyper, PaperValuesHyper
from kpatch.edit.requests import contexts_for
from kpatch.edit.upwards import Residual
from kpatch.edit.values import Objective
from kpatch.models.model import Model
from kpatch.reporter import Reporter


class MemitPaper(Memit):
    """MEMIT, with subjects that open their text edited at a layer of their own (`kpatch.edit.first_token`)."""

    name = "memit-paper"
    hyper: ClassVar[type[HyperParams]] = MemitPaperHyper
    presets = PRESETS["memit-paper"]
    keys_apart = False

    def choose_layers(self, model: Model, report: Reporter) -> tuple[int, ...]:
        """None: the paper reads R off a trace."""
        return ()

    def require(self, model: Model, layers: Sequence[int]) -> None:
        require_one_way(model, layers)

    def contexts(self, model: Model, hyper: PaperValuesHyper, inputs: Inputs) -> tuple[str, ...]:
        return contexts_for(model, hyper.lead_ins, hyper.prefixes, hyper.prefix_tokens, inputs.seed)

    def spare(self, hyper: PaperValuesHyper) -> int:
        return 0

    def chat(self, hyper: PaperValuesHyper) -> int:
        return 0

    def others(self, hyper: PaperValuesHyper) -> int:
        return 0

    def refining(self, hyper: PaperValuesHyper, count: int) -> None:
        return None

    def places(self, hyper: PaperValuesHyper) -> list[tuple[int, ...]]:
        return [hyper.layers]

    def objective(self, hyper: PaperValuesHyper) -> Objective:
        return Objective(
            layer=max(hyper.layers),
            steps=hyper.steps,
            learning_rate=hyper.learning_rate,
            stop_loss=hyper.stop_loss,
            clamp=hyper.clamp,
            weight_decay=hyper.weight_decay,
            kl=hyper.kl,
        )

    def weight(self, model: Model, hyper: MemitPaperHyper, layer: int) -> float:
        return hyper.covariance_weight

    def subject_weight(self, hyper: PaperValuesHyper) -> float:
        return 0.0  # the paper's C knows text alone

    def residual(self, model: Model, part: Part, values: Tensor) -> Residual:
        return paper_residual(model, part.hyper.layers, values[:, 0])

    def standing(self, model: Model, layer: int, keys: Tensor, h: Tensor) -> Tensor:
        return h

    def top(self, hyper: PaperValuesHyper) -> int:
        return max(hyper.layers)


def paper_residual(model: Model, layers: Sequence[int], z: Tensor) -> Residual:
    """r = (z − h^L) / (L − l + 1), as what W^l has to put out: over the layer's scale, pulled back through a norm.

    z [n, d] are the groups' values.
    """
    last = max(layers)

    def spread(layer: int, keys: Tensor, h: Tensor) -> Tensor:
        residual = (z.double() - h.double()) / (last - layer + 1)  # (n, d)
        residual = residual / model.residual_scale(layer)  # what W^l writes joins the stream times this
        return before_norm(model, layer, written(model, layer, keys), residual)

    return spread

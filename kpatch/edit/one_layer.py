"""Hyperparameters of methods that edit one layer, ROME and FT-W, with presets and their provenance. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kpatch.edit.hyper import check_layers, preset_for, with_settings
from kpatch.errors import BadInput
from kpatch.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from kpatch.models.model import Model


@dataclass(frozen=True, slots=True)
class OneLayer:
    """What such methods have in common: the layer."""

    layer: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form, the layer left out (the manifest names it itself)."""
        return {key: value for key, value in asdict(self).items() if key != "layer"}


@dataclass(frozen=True, slots=True)
class RomeHyper(OneLayer):
    """All that decides a ROME patch besides the facts, the model and the covariance text.

    steps, learning_rate, stop_loss  Adam on δ, what is added to the MLP's output m at the subject's last token
    clamp  ‖δ‖ ≤ clamp · ‖m‖
    weight_decay, kl  weights of ‖δ‖/‖m‖² and of the drift on "{subject} is a"
    prefixes  contexts besides the bare prompt, half of them of each length
    short, long  their lengths in tokens
    """

    steps: int = 20
    learning_rate: float = 0.5
    stop_loss: float = 0.05
    clamp: float = 4.0
    weight_decay: float = 0.5
    kl: float = 0.0625
    prefixes: int = 20
    short: int = 5
    long: int = 10


@dataclass(frozen=True, slots=True)
class FtHyper(OneLayer):
    """All that decides a fine-tuned patch besides the facts and the model.

    steps  passes over all facts at most
    learning_rate  of Adam
    weight_decay  of W − W0, added to the gradient
    stop_loss  facts with less loss are passed over; a pass whose mean is less ends the tuning
    batch  facts an update: one, since 25 updates for all facts together leave most of them unlearned
    """

    steps: int = 25
    learning_rate: float = 5e-4
    weight_decay: float = 5e-4
    stop_loss: float = 1e-2
    batch: int = 1


_ROME = "the ROME authors' published settings"
_FT = "MEMIT paper, appendix B (FT-W), and its published settings"
DEFAULTS: Mapping[str, type[RomeHyper] | type[FtHyper]] = {"rome": RomeHyper, "ft": FtHyper}
PRESETS: Mapping[str, Mapping[str, tuple[OneLayer, str]]] = {
    "rome": {
        "gpt-j": (
            RomeHyper(5),
            f"{_ROME}: layer 5, 20 steps, lr 0.5, stop at 0.05, clamp 4, 10 contexts of 5 tokens and 10 of 10,"
            " decay 0.5 and KL 0.0625 (the paper, appendix E.5, names 1.5e-3 and 100)",
        ),
        "gpt2-xl": (RomeHyper(17), f"{_ROME}: layer 17 (the paper counts it as the 18th), the rest as for GPT-J"),
        "neox": (RomeHyper(15), f"{_ROME}: layer 15, the rest as for GPT-J"),
        "smollm2": (
            RomeHyper(6),
            "layer 6, the middle of MEMIT's layers here, as GPT-J's 5 is of its own; the rest as for GPT-J",
        ),
    },
    "ft": {
        "gpt-j": (
            FtHyper(21),
            f"{_FT}: layer 21, 25 steps, lr 5e-4, stop at 1e-2; decay 5e-4, near what their power law gives for"
            " 10,000 edits (3.9e-4)",
        ),
        "gpt2-xl": (
            FtHyper(1),
            "ROME paper, appendix E.1, and its published settings for tuning without a bound on the change: layer 1,"
            " 25 steps, lr 5e-4; decay and stop as for GPT-J",
        ),
        "smollm2": (FtHyper(22), "layer 22, as deep as GPT-J's 21 of 28 layers; the rest as for GPT-J"),
    },
}


def one_layer_hyper(
    method: str, model: Model, layers: Sequence[int] | None, settings: dict[str, str], report: Reporter = SILENT
) -> OneLayer:
    """Preset, then --layers, then --set; says which preset it was.

    Raises BadInput without a preset or --layers, for more than one layer and for one that the model lacks.
    """
    try:
        name = preset_for(model)[0]
    except BadInput:
        if layers is None:
            raise
        name = ""
    presets = PRESETS[method]
    hyper: OneLayer
    if name in presets:
        hyper, source = presets[name]
        report.note(f"preset {name} for {method}: {source}")
    elif layers is None:
        raise BadInput(
            f"There is no {method} preset for {model.name}, so the layer to edit is not known",
            details=[f"expected --layers with one layer, or a model of {', '.join(presets)}"],
        )
    else:
        hyper = DEFAULTS[method](-1)
        report.note(f"no {method} preset for {model.name}: the paper's GPT-J settings serve; --set changes them")
    if layers is not None:
        check_layers(model, layers)
        if len(layers) != 1:
            raise BadInput(
                f"{method} edits one layer", details=[f"found --layers with {len(layers)}"], hint="give one"
            )
        hyper = replace(hyper, layer=layers[0])
    return with_settings(hyper, settings)

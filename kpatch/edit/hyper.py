"""Hyperparameters of MEMIT: what each number means, and presets with the provenance of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

from kpatch.errors import BadInput
from kpatch.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from kpatch.models.model import Model


@dataclass(frozen=True, slots=True)
class Hyper:
    """All that decides a MEMIT patch besides the facts, the model and the covariance text.

    layers  R, the edited layers; L = max R carries the values
    steps, learning_rate, stop_loss  Adam on δ; a fact stops when its loss falls below stop_loss
    clamp  ‖δ‖ ≤ clamp · ‖h^L‖
    weight_decay, kl  weights of ‖δ‖/‖h^L‖² and of the drift on "{subject} is a"
    covariance_weight  λ in C = λ E[k k^T]
    first_layer, first_leverage  where a subject that is a text's first token is edited, and the least k^T C^{-1} k its
    key is given weight for (see `kpatch.edit.first_token`)
    lead_ins  contexts x_j in plain English, besides the bare prompt: the first so many of `kpatch.edit.requests`
    prefixes, prefix_tokens  contexts x_j sampled from the model, and their length
    """

    layers: tuple[int, ...]
    steps: int = 25
    learning_rate: float = 0.5
    stop_loss: float = 0.05
    clamp: float = 0.75
    weight_decay: float = 0.5
    kl: float = 0.0625
    covariance_weight: float = 15_000.0
    first_layer: int = 0
    first_leverage: float = 5.0
    lead_ins: int = 0
    prefixes: int = 5
    prefix_tokens: int = 10

    def to_dict(self) -> dict[str, Any]:
        """JSON form, layers left out (the manifest names them itself)."""
        return {key: value for key, value in asdict(self).items() if key != "layers"}


@dataclass(frozen=True, slots=True)
class Preset:
    """Hyperparameters for one model, where they come from, and the shape that the model is known by.

    `shape` is (family, width d, layers): a local copy or a fine-tuned sister gets the same preset.
    """

    shape: tuple[str, int, int]
    hyper: Hyper
    source: str


_POSITIVE = ("steps", "learning_rate", "clamp", "covariance_weight")
_PAPER = "MEMIT paper (Meng et al., ICLR 2023), section 5 and Appendix B"

PRESETS: dict[str, Preset] = {
    "gpt-j": Preset(
        ("gptj", 4096, 28),
        Hyper(layers=tuple(range(3, 9))),
        f"{_PAPER}: R 3-8, λ 15,000, 25 steps, lr 0.5, clamp 0.75",
    ),
    "neox": Preset(
        ("gpt_neox", 6144, 44),
        Hyper(layers=tuple(range(6, 11)), covariance_weight=20_000.0, steps=20, clamp=0.3),
        f"{_PAPER}: R 6-10, λ 20,000, 20 steps, clamp 0.3",
    ),
    "gpt2-xl": Preset(
        ("gpt2", 1600, 48),
        Hyper(layers=tuple(range(13, 18)), covariance_weight=20_000.0, steps=20),
        "the MEMIT authors' published settings: R 13-17, λ 20,000, 20 steps, lr 0.5, clamp 0.75",
    ),
    "smollm2": Preset(
        ("llama", 576, 30),
        Hyper(layers=tuple(range(4, 9)), covariance_weight=600.0, lead_ins=4, prefixes=0),
        "measured by kpatch on 150 CounterFact edits and 66 of its own: R 4-8, λ 600, plain lead-ins (what so small"
        " a model writes by itself makes poor contexts); steps, lr and clamp as for GPT-J",
    ),
}


def preset_for(model: Model) -> tuple[str, Preset]:
    """The preset whose shape is the model's, and its name. Raises BadInput where there is none."""
    shape = (model.family.model_type, model.width, model.n_layers)
    for name, preset in PRESETS.items():
        if preset.shape == shape:
            return name, preset
    raise BadInput(
        f"There is no preset for {model.name}, so the layers to edit are not known",
        details=[
            f"expected --layers, --layers-from, or a model of a preset's shape: {', '.join(PRESETS)}",
            f"found family {shape[0]}, width {shape[1]}, {shape[2]} layers",
        ],
        hint="find them: `kpatch trace MODEL --quick -o trace/`, then `kpatch make … --layers-from trace/trace.json`;"
        f" untraced, try --layers {model.n_layers // 7}-{model.n_layers // 7 + 4}",
    )


def hyper_for(
    model: Model, layers: Sequence[int] | None, settings: dict[str, str], report: Reporter = SILENT
) -> Hyper:
    """Preset, then --layers, then --set; says which preset it was. Raises BadInput for layers the model lacks."""
    try:
        name, preset = preset_for(model)
    except BadInput:
        if layers is None:
            raise
        hyper = Hyper(layers=())
        report.note(f"no preset for {model.name}: the paper's GPT-J settings serve; --set changes them")
    else:
        hyper = preset.hyper
        report.note(f"preset {name}: {preset.source}")
    if layers is not None:
        check_layers(model, layers)
        hyper = replace(hyper, layers=tuple(sorted(set(layers))))
    return with_settings(hyper, settings)


def check_layers(model: Model, layers: Sequence[int]) -> None:
    """Raise BadInput for no layers, for one that the model lacks, and for its last."""
    wrong = [layer for layer in layers if not 0 <= layer < model.n_layers]
    if wrong or not layers:
        raise BadInput(
            f"{model.name} has no layer {wrong[0]}" if wrong else "--layers names no layer",
            details=[f"expected layers from 0 to {model.n_layers - 1}"],
        )
    if max(layers) == model.n_layers - 1:
        raise BadInput(
            f"Layer {max(layers)} is the last of {model.name}: nothing above it can read what is written",
            hint="give lower --layers",
        )


AnyHyper = TypeVar("AnyHyper")


def with_settings(hyper: AnyHyper, settings: dict[str, str]) -> AnyHyper:
    """`hyper` with values from --set key=value; BadInput names an unknown key or a value of the wrong kind."""
    known = {field.name: field for field in fields(hyper) if field.name not in ("layers", "layer")}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in known:
            close = get_close_matches(key, known, n=1)
            raise BadInput(
                f"Unknown setting {key!r} in --set",
                details=[f"expected one of {', '.join(known)}"],
                hint=f"did you mean {close[0]}?" if close else None,
            )
        kind = int if isinstance(getattr(hyper, key), int) else float
        try:
            value = kind(text)
        except ValueError as error:
            raise BadInput(f"--set {key}={text} is not a number", details=[f"expected {kind.__name__}"]) from error
        if not 0 <= value < float("inf"):
            raise BadInput(f"--set {key}={text} must be finite and not negative")
        if key in _POSITIVE and value == 0:
            raise BadInput(f"--set {key}={text} would give no edit", details=["expected more than 0"])
        values[key] = value
    changed: AnyHyper = replace(hyper, **values)  # type: ignore[type-var]
    return changed

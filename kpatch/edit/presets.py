"""What each number of a method means, and presets: hyperparameters for known models, with where they come from.

No torch: `kpatch models` prints this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class HyperParams:
    """What every method has: R, the layers it edits. The other fields are settings; each is an int or a float."""

    layers: tuple[int, ...]
    positive: ClassVar[tuple[str, ...]] = ("steps", "learning_rate")  # settings that give no edit at zero
    update: ClassVar[tuple[str, ...]] = ()  # settings that decide the update besides the values; the rest decide those

    @property
    def layer(self) -> int:
        """The one layer of a method that edits one."""
        (layer,) = self.layers
        return layer

    def to_dict(self) -> dict[str, Any]:
        """JSON form, layers left out (the manifest names them itself)."""
        return {key: value for key, value in asdict(self).items() if key != "layers"}


@dataclass(frozen=True, slots=True)
class MemitHyper(HyperParams):
    """All that decides a MEMIT patch besides the facts, the model and the covariance text.

    layers  R, the edited layers
    steps, learning_rate, stop_loss  Adam on all δ^l; a step moves a coordinate by learning_rate · s^l / √d, with the
    size s^l of what the layer writes (`kpatch.edit.writes`); a fact stops when its loss falls below stop_loss
    clamp  ‖δ^l‖ ≤ clamp · s^l, twice that where a norm follows W^l
    kl, others  weight of the drift, the mean over "{subject} is a" and so many questions about other things of the
    subject (`kpatch.facts.derived.unrelated_questions`)
    leverage  the mean of k^T C^{-1} k over text, so λ = f / leverage
    subject_weight  μ in C = λ (E[k k^T] + μ E_subj[k k^T])
    first_layer, first_leverage  the layer where a subject that opens its text is edited, and the least leverage
    that its key is given weight for (see `kpatch.edit.first_token`)
    lead_ins  contexts x_j in plain English besides the bare prompt, the first ones of `kpatch.edit.requests`; each
    wording of a fact takes the place of one, as long as one is left
    chat  1: a fact's question is learned too, in the model's chat template, where it has one; 0: it is not; 2: the
    question alone is learned, and no prompt
    refine, hold, refine_from  steps in which the residuals are corrected for what the written weights do, in further
    wordings too; what it weighs that text and other subjects stay (`kpatch.edit.refine`); how many facts are worth
    that; refine 0 leaves every update as it is
    """

    steps: int = 60
    learning_rate: float = 0.1
    stop_loss: float = 0.05
    clamp: float = 1.0
    kl: float = 0.0625
    others: int = 0
    leverage: float = 2.5
    subject_weight: float = 1.0
    first_layer: int = 0
    first_leverage: float = 5.0
    lead_ins: int = 4
    chat: int = 1
    refine: int = 30
    hold: float = 2.0
    refine_from: int = 30
    positive: ClassVar[tuple[str, ...]] = ("steps", "learning_rate", "clamp", "leverage")
    update: ClassVar[tuple[str, ...]] = (
        *("leverage", "subject_weight", "first_layer", "first_leverage", "lead_ins", "chat"),
    )

    def refines(self, count: int) -> bool:
        """Whether a patch of so many facts is refined."""
        return self.refine > 0 and count >= self.refine_from


@dataclass(frozen=True, slots=True)
class PaperValuesHyper(HyperParams):
    """What the methods share whose rows and values are those of the MEMIT paper.

    layers  R, the edited layers; L = max R carries the values
    steps, learning_rate, stop_loss  Adam on δ; a fact stops when its loss falls below stop_loss
    clamp  ‖δ‖ ≤ clamp · ‖h^L‖
    weight_decay, kl  weights of ‖δ‖/‖h^L‖² and of the drift on "{subject} is a"
    first_layer, first_leverage  the layer where a subject that opens its text is edited, and the least leverage
    k^T C^{-1} k that its key is given weight for (see `kpatch.edit.first_token`)
    lead_ins  contexts x_j in plain English besides the bare prompt: the first ones of `kpatch.edit.requests`
    prefixes, prefix_tokens  contexts x_j sampled from the model, and their length
    """

    steps: int = 25
    learning_rate: float = 0.5
    stop_loss: float = 0.05
    clamp: float = 0.75
    weight_decay: float = 0.5
    kl: float = 0.0625
    first_layer: int = 0
    first_leverage: float = 5.0
    lead_ins: int = 0
    prefixes: int = 5
    prefix_tokens: int = 10


@dataclass(frozen=True, slots=True)
class MemitPaperHyper(PaperValuesHyper):
    """All that decides a patch of the paper's MEMIT, or of BLUE, besides facts, model and the covariance text.

    covariance_weight  λ in C = λ E[k k^T]
    """

    covariance_weight: float = 15_000.0
    positive: ClassVar[tuple[str, ...]] = ("steps", "learning_rate", "clamp", "covariance_weight")
    update: ClassVar[tuple[str, ...]] = (
        *("covariance_weight", "first_layer", "first_leverage", "prefixes", "prefix_tokens"),
    )


@dataclass(frozen=True, slots=True)
class AlphaEditHyper(PaperValuesHyper):
    """All that decides a patch of AlphaEdit besides the facts, the model and the covariance text.

    threshold  directions of the keys with an eigenvalue of E[k k^T] below it are the null space, where W may change
    l2  weight of ‖Δ‖² in the update
    first_leverage  0: the paper gives no key more weight than it has
    """

    first_leverage: float = 0.0
    threshold: float = 2e-2
    l2: float = 10.0
    positive: ClassVar[tuple[str, ...]] = ("steps", "learning_rate", "clamp", "threshold", "l2")
    update: ClassVar[tuple[str, ...]] = (
        *("threshold", "l2", "first_layer", "first_leverage", "prefixes", "prefix_tokens"),
    )


@dataclass(frozen=True, slots=True)
class RomeHyper(HyperParams):
    """All that decides a ROME patch besides the facts, the model and the covariance text.

    steps, learning_rate, stop_loss  Adam on δ, which is added to the MLP's output m at the subject's last token
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
    positive: ClassVar[tuple[str, ...]] = ("steps", "learning_rate", "clamp")


@dataclass(frozen=True, slots=True)
class FineTuneHyper(HyperParams):
    """All that decides a fine-tuned patch besides the facts and the model. A switch is 1 (on) or 0 (off).

    steps  passes over all rows at most; a row is a fact's prompt, one of its wordings, or its question in chat form
    learning_rate  of Adam; on SmolLM2 the published 5e-4 has half of the loss left after thirty updates
    weight_decay  of W − W0, added to the gradient
    stop_loss  batches with less loss are passed over; a pass whose mean is less ends the tuning
    batch  rows an update
    shuffle  the rows come in a new order in every pass, drawn from the seed; else in the file's
    chat  a fact's question is learned too, in the model's chat template, where it has one
    end  what ends the model's turn is learned behind an answer in chat form; the other forms have no end
    validate  the pass with the least loss on held-out rows counts, and three worse ones end the tuning
    """

    steps: int = 50
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    stop_loss: float = 1e-2
    batch: int = 8
    shuffle: int = 1
    chat: int = 1
    end: int = 1
    validate: int = 1
    positive: ClassVar[tuple[str, ...]] = ("steps", "learning_rate", "batch")


@dataclass(frozen=True, slots=True)
class MendHyper(HyperParams):
    """All that decides a patch of MEND besides the facts, the model and the editor.

    regression  1: MALMEN's ridge regression makes one update of all facts'; 0: they are added up. As in the editor's
    training, unless it is set
    ridge  what the ridges that the editor learned are multiplied with
    """

    regression: int = 0
    ridge: float = 1.0
    positive: ClassVar[tuple[str, ...]] = ("ridge",)


@dataclass(frozen=True, slots=True)
class Preset:
    """Hyperparameters for one model, and where they come from."""

    hyper: HyperParams
    source: str


# A model is known by its shape (family, width d, layers), so that a local copy or a fine-tuned sister is known too.
SHAPES: dict[str, tuple[str, int, int]] = {
    "gpt-j": ("gptj", 4096, 28),
    "neox": ("gpt_neox", 6144, 44),
    "gpt2-xl": ("gpt2", 1600, 48),
    "smollm2": ("llama", 576, 30),
}

_PAPER = "MEMIT paper (Meng et al., ICLR 2023), section 5 and Appendix B"
_BLUE = "the BLUE authors' published settings"
_ALPHA = "the AlphaEdit authors' published settings"
_ROME = "the ROME authors' published settings"

# By method, then by the names of SHAPES
PRESETS: Mapping[str, Mapping[str, Preset]] = {
    "memit": {},  # the model itself says what serves
    "mend": {},  # the editor says it
    "memit-paper": {
        "gpt-j": Preset(
            MemitPaperHyper(layers=tuple(range(3, 9))), f"{_PAPER}: R 3-8, λ 15,000, 25 steps, lr 0.5, clamp 0.75"
        ),
        "neox": Preset(
            MemitPaperHyper(layers=tuple(range(6, 11)), covariance_weight=20_000.0, steps=20, clamp=0.3),
            f"{_PAPER}: R 6-10, λ 20,000, 20 steps, clamp 0.3",
        ),
        "gpt2-xl": Preset(
            MemitPaperHyper(layers=tuple(range(13, 18)), covariance_weight=20_000.0, steps=20),
            "the MEMIT authors' published settings: R 13-17, λ 20,000, 20 steps, lr 0.5, clamp 0.75",
        ),
        "smollm2": Preset(
            MemitPaperHyper(layers=tuple(range(4, 9)), covariance_weight=600.0, lead_ins=4, prefixes=0),
            "measured by kpatch on 150 CounterFact edits and 66 of its own: R 4-8, λ 600, plain lead-ins (what so"
            " small a model writes by itself makes poor contexts); steps, lr and clamp as for GPT-J",
        ),
    },
    "blue": {
        "gpt-j": Preset(
            MemitPaperHyper(layers=(3, 8)),
            f"{_BLUE}: R 3-8, of which 3 and 8 are edited; all else as in memit-paper, λ 15,000",
        ),
        "gpt2-xl": Preset(
            MemitPaperHyper(layers=(13, 17), covariance_weight=20_000.0, steps=20),
            f"{_BLUE}: R 13-17, of which 13 and 17 are edited; all else as in memit-paper, λ 20,000, 20 steps",
        ),
        "smollm2": Preset(
            MemitPaperHyper(layers=(4, 8), covariance_weight=600.0, lead_ins=4, prefixes=0),
            "R 4-8 of memit-paper here, of which 4 and 8 are edited; λ 600 and contexts are its own too, untuned",
        ),
    },
    "alphaedit": {
        "gpt-j": Preset(
            AlphaEditHyper(layers=tuple(range(3, 9))),
            f"{_ALPHA}: R 3-8, null space below 2e-2 (1e-2 in the paper), L2 10; values as in MEMIT",
        ),
        "gpt2-xl": Preset(
            AlphaEditHyper(layers=tuple(range(13, 18)), steps=20),
            f"{_ALPHA}: R 13-17, null space below 2e-2, L2 10, 20 steps; values as in MEMIT",
        ),
        "smollm2": Preset(
            AlphaEditHyper(layers=tuple(range(4, 9)), lead_ins=4, prefixes=0),
            "R 4-8 and the contexts of memit-paper here; null space below 2e-2 (of every layer's directions 60 to 76 %"
            " lie there) and L2 10 as their authors published them, untuned",
        ),
    },
    "rome": {
        "gpt-j": Preset(
            RomeHyper((5,)),
            f"{_ROME}: layer 5, 20 steps, lr 0.5, stop at 0.05, clamp 4, 10 contexts of 5 tokens and 10 of 10,"
            " decay 0.5 and KL 0.0625 (the paper, appendix E.5, names 1.5e-3 and 100)",
        ),
        "gpt2-xl": Preset(
            RomeHyper((17,)), f"{_ROME}: layer 17 (the paper counts it as the 18th), the rest as for GPT-J"
        ),
        "neox": Preset(RomeHyper((15,)), f"{_ROME}: layer 15, the rest as for GPT-J"),
        "smollm2": Preset(
            RomeHyper((6,)),
            "layer 6, the middle of MEMIT's layers here, as GPT-J's 5 is of its own; the rest as for GPT-J",
        ),
    },
    "ft": {},  # the layer is found by validation: see `kpatch.edit.ft_layer`
}

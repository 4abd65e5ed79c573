"""The numbers that decide how an editor is trained. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from kpatch.errors import BadInput


@dataclass(frozen=True, slots=True)
class TrainHyper:
    """All that decides an editor besides the model, the facts, the layers and the text.

    regression  1: the updates of an episode's facts become one by MALMEN's ridge regression; 0: by their sum
    covariance  1: the ridge of the regression is the covariance of inputs that must stay, as MEMIT's is; 0: λ I
    edits  facts that are edited together in training   batch  facts a step of Adam
    rank  of the editor's matrices (the authors: 1920)   edit_rate  the step size α at first
    learning_rate, step_rate, ridge_rate  of Adam for the network, for α and for ℓ   clip  norm of the gradient at most
    edit_weight, locality_weight  c_e and c_loc   texts, text_tokens, reads  rows of text, their length, places read
    measured  facts over which (u, δ) are normalized   steps  at most   validate_every  steps
    patience  validations without a lower loss before training ends
    """

    regression: int = 0
    covariance: int = 0
    edits: int = 1
    batch: int = 10
    rank: int = 256
    edit_rate: float = 1e-4
    learning_rate: float = 1e-5
    step_rate: float = 2e-5
    ridge_rate: float = 1e-2
    clip: float = 100.0
    edit_weight: float = 0.1
    locality_weight: float = 1.0
    texts: int = 320
    text_tokens: int = 24
    reads: int = 8
    measured: int = 500
    steps: int = 100_000
    validate_every: int = 50
    patience: int = 10
    positive: ClassVar[tuple[str, ...]] = (
        *("edits", "batch", "rank", "edit_rate", "clip", "edit_weight", "texts", "text_tokens", "reads", "measured"),
        *("steps", "validate_every", "patience"),
    )

    def require(self) -> None:
        """Refuse settings that no editor can be trained with. Raises BadInput."""
        for name in ("regression", "covariance"):
            value = getattr(self, name)
            if value not in (0, 1):
                raise BadInput(f"The setting {name}={value} is neither on nor off", details=["expected 0 or 1"])
        if self.covariance and not self.regression:
            raise BadInput(
                "covariance=1 is a ridge, and the sum of updates has none",
                hint="set regression=1 too, or leave it out",
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

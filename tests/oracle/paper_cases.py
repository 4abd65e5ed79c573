"""Facts, settings and comparisons for oracles of methods that take rows and values of MEMIT's paper."""

from __future__ import annotations

from torch import Tensor

from kpatch.edit.methods import Edit, Inputs, Method
from kpatch.edit.presets import HyperParams, MemitPaperHyper
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from tests.oracle import memit as oracle
from tests.support.families import slow_beyond

FACTS: list[oracle.Prompt] = [
    ("In the {}", "Mona Lisa", "Paris"),
    ("The capital of {} is", "Brazil", "Malmö and the sea"),
    ("Past the {} there is", "Eiffel Tower", "Paris"),
]
CONTEXTS = ["", "As everyone knows,"]  # the one lead-in of the settings below
TOKENS = 400
# Without a stop every fact takes all steps in both writings
PAPER = MemitPaperHyper(
    (1, 2), steps=4, learning_rate=0.2, stop_loss=0.0, covariance_weight=1.0, lead_ins=1, prefixes=0, first_leverage=0
)
# W stored [in, out], and [out, in] with a norm behind it; gpt2 alone in `make test`
FAMILIES = slow_beyond(["llama"], ["llama", "gpt2", "gemma3_text"])


def made(method: Method, model: Model, hyper: HyperParams, facts: list[oracle.Prompt] = FACTS) -> Edit:
    chosen = [Fact(subject, prompt, target) for prompt, subject, target in facts]
    return method.edit(model, chosen, hyper, Inputs(tokens=TOKENS))


def assert_same(model: Model, found: Edit, want: dict[str, Tensor]) -> None:
    assert found.deltas.keys() == want.keys()
    for name, delta in want.items():
        got = found.deltas[name].dense()
        delta = delta.T if model.stores_transposed else delta
        assert float(delta.norm()) > 1e-2
        assert float((got - delta).norm()) <= 1e-3 * float(delta.norm()), name

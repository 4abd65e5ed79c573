"""Noise falls on the embedded tokens of the subject and on nothing else, in every family."""

from __future__ import annotations

import pytest
import torch

from kpatch.models.families import FAMILIES
from kpatch.trace.cells import Traced
from kpatch.trace.clean_corrupted import run_clean_and_corrupted
from kpatch.trace.noise import draw, spread_of_embeddings
from tests.support.families import EVERY_KIND, build, slow_beyond
from tests.support.models import WIDTH

pytestmark = pytest.mark.usefixtures("one_thread")

ITEM = Traced((11, 12, 13, 14, 15, 16), 2, 3, 5)
SAMPLES = 4

# Noise of its own kind has each family whose embeddings are scaled, narrower or normed
QUICK = (*EVERY_KIND, "bloom", "opt")
one_of_each_kind = pytest.mark.parametrize("family", slow_beyond(QUICK, FAMILIES))


@one_of_each_kind
@torch.no_grad()
def test_what_enters_layer_0_moves_by_the_noise_alone(family: str) -> None:
    """The same vector in every family: no position is scaled with it, and no scale of embeddings is put on it again.

    OPT's embeddings are narrower than the model here, and its projection carries the noise on.
    """
    if family == "bloom":
        pytest.skip("a norm follows its embeddings")
    model = build(family)
    noise = draw(model, ITEM, 0.9, SAMPLES, 0)
    assert noise.shape[-1] == (16 if family == "opt" else WIDTH)
    base = run_clean_and_corrupted(model, [ITEM], [noise])
    moved = base.entering[0][1:] - base.entering[0][:1]  # (S, T, d)
    project = getattr(getattr(model.net.base_model, "decoder", None), "project_in", None)
    want = torch.zeros_like(moved)
    want[:, ITEM.first : ITEM.last + 1] = noise if project is None else project(noise)
    want *= getattr(model.net.config, "embedding_multiplier", 1.0)  # Granite's, on what the module puts out
    torch.testing.assert_close(moved, want, rtol=0, atol=1e-5)
    untouched = [token for token in range(len(ITEM.ids)) if not ITEM.first <= token <= ITEM.last]
    assert torch.equal(moved[:, untouched], torch.zeros_like(moved[:, untouched]))


@one_of_each_kind
@torch.no_grad()
def test_sigma_is_measured_where_the_noise_is_added(family: str) -> None:
    """Behind the scale that Gemma's embedding module puts on, before positions and projections."""
    model = build(family)
    table = model.net.get_input_embeddings().weight[[13, 14]].double()
    scale = WIDTH**0.5 if family.startswith("gemma") else float(getattr(model.net.config, "scale_emb", 1.0))
    assert spread_of_embeddings(model, [ITEM]) == pytest.approx(float((scale * table).std()), rel=1e-6)


@one_of_each_kind
@torch.no_grad()
def test_the_clean_row_is_the_networks_own_run(family: str) -> None:
    model = build(family)
    base = run_clean_and_corrupted(model, [ITEM], [draw(model, ITEM, 0.9, SAMPLES, 0)])
    logits = model.net(input_ids=torch.tensor([ITEM.ids])).logits[0, -1]
    want = float(logits.double().softmax(-1)[ITEM.answer])
    assert float(base.probabilities[0]) == pytest.approx(want, rel=1e-5)
    again = model.net(input_ids=torch.tensor([ITEM.ids])).logits[0, -1]
    assert torch.equal(logits, again), "no hook is left behind"

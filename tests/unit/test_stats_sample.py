"""Text sampled from the model: seeded, of its distribution, without special tokens."""

from __future__ import annotations

import pytest
import torch

from kpatch.errors import BadInput
from kpatch.models.model import Model
from kpatch.stats import self_text as module
from kpatch.stats.self_text import group_rows, sample_group
from tests.support.models import tiny
from tests.support.tokenizers import byte_level, metaspace


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama", tokenizer=byte_level(bos=False))


def test_a_group_is_named_by_seed_and_number(model: Model) -> None:
    torch.manual_seed(1)
    group = sample_group(model, 16, seed=3, group=1)
    state = torch.random.get_rng_state()
    assert torch.equal(sample_group(model, 16, seed=3, group=1), group)
    assert torch.equal(torch.random.get_rng_state(), state)  # its draws are its own
    assert group.shape == (group_rows(model, 16), 16)
    assert not torch.equal(sample_group(model, 16, seed=3, group=2), group)
    assert not torch.equal(sample_group(model, 16, seed=4, group=1), group)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gpt_neox", "opt", "phi", "mistral", "gemma2", "olmo2"])
def test_cached_columns_give_the_distribution_of_a_full_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    seen = []

    def spy(logits, uniform):  # type: ignore[no-untyped-def]
        seen.append(logits)
        return draw(logits, uniform)

    draw = module._draw
    monkeypatch.setattr(module, "_draw", spy)
    ids = sample_group(model, 12, seed=0, group=0)
    with torch.no_grad():
        full = model.net(input_ids=ids.long()).logits
    allowed = seen[0][0].isfinite()
    for column, logits in enumerate(seen):
        torch.testing.assert_close(logits[:, allowed], full[:, column][:, allowed], rtol=1e-4, atol=1e-4)
    assert len(seen) == 11


@pytest.mark.parametrize("vocabulary", [4, 256, 1000])
def test_draws_follow_the_distribution(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(vocabulary, generator=generator)
    p[torch.rand(vocabulary, generator=generator) < 0.3] = 0.0
    p[-2:] = 0.0
    p /= p.sum()
    uniform = (torch.arange(100_000, dtype=torch.float64)[:, None] + 0.5) / 100_000
    counts = torch.zeros(vocabulary)
    for part in uniform.split(5_000):
        counts += module._draw(p.log().expand(len(part), -1), part).flatten().bincount(minlength=vocabulary)
    torch.testing.assert_close(counts / 100_000, p, atol=3e-5, rtol=0)
    possible = p.nonzero().flatten()
    edges = torch.tensor([[0.0], [1.0 - 2**-53]], dtype=torch.float64)
    drawn = module._draw(p.log().expand(2, -1), edges).flatten()
    assert drawn.tolist() == [int(possible[0]), int(possible[-1])]


@pytest.mark.parametrize("tokenizer", [byte_level(bos=False), byte_level(bos=True), metaspace(bos=True)])
def test_rows_open_with_a_capitalized_word_and_hold_no_special_token(tokenizer) -> None:  # type: ignore[no-untyped-def]
    model = tiny("llama", tokenizer=tokenizer)
    ids = torch.cat([sample_group(model, 8, seed=0, group=number) for number in range(3)])
    if model.adds_bos:
        assert (ids[:, 0] == tokenizer.bos_token_id).all()
        ids = ids[:, 1:]
    assert not torch.isin(ids, torch.tensor(tokenizer.all_special_ids)).any()
    for first in ids[:, 0].tolist():
        word = tokenizer.decode([first]).strip()
        assert word.isalpha()
        assert word == word.capitalize()
        assert len(word) > 1


def test_rows_of_the_head_without_a_token_are_never_drawn() -> None:
    tokenizer = byte_level(bos=False)
    model = tiny("llama", tokenizer=tokenizer, vocab_size=len(tokenizer) + 300)
    assert int(sample_group(model, 12, seed=0, group=0).max()) < len(tokenizer)


def test_groups_are_no_larger_than_the_default_needs(model: Model) -> None:
    assert group_rows(model, 256) * 256 >= 10 * model.mlp_width > (group_rows(model, 256) - 1) * 256


def test_a_group_fits_in_memory(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = module.Cache(layers=[module._Preallocated(8) for _ in range(model.n_layers)])
    model.net(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=kept, use_cache=True)
    row = sum(layer.all_keys.nbytes + layer.all_values.nbytes for layer in kept.layers)
    for rows in (2, 5):
        monkeypatch.setattr(module, "_GROUP_BYTES", rows * row)
        assert group_rows(model, 8) == rows
    monkeypatch.setattr(module, "_GROUP_BYTES", 1)
    assert group_rows(model, 8) == 1


def test_logits_that_are_not_finite_are_told() -> None:
    model = tiny("llama")
    model.net.get_output_embeddings().weight.fill_(torch.inf)
    with pytest.raises(BadInput, match="No text could be sampled"):
        sample_group(model, 8, seed=0, group=0)

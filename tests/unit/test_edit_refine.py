"""What refinement is for, and what it leaves alone: facts, text, the model itself, and patches too small for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from kpatch.edit import bystanders as beside
from kpatch.edit import refine as refining
from kpatch.edit.bystanders import Bystanders, answer, bystanders, windows
from kpatch.edit.memit import Memit
from kpatch.edit.methods import Edit, Inputs
from kpatch.edit.presets import MemitHyper
from kpatch.edit.refine import _turns
from kpatch.edit.requests import Group, group_facts
from kpatch.edit.weights import add, restored
from kpatch.facts.fact import Fact, Neighbor, Protected
from kpatch.facts.tokens import encode
from kpatch.models.model import Model
from kpatch.patch.delta import LowRank
from kpatch.stats.subject_keys import told
from tests.support.models import tiny
from tests.support.reports import Recorder

pytestmark = pytest.mark.usefixtures("one_thread", "shared_statistics")

FACTS = [
    Fact("Mona Lisa", "In the {}", "Paris", wordings=("Near the {} is",), question="Where is the {}?"),
    Fact("Moonlight Sonata", "By the {}", "Brazil"),
]
HYPER = MemitHyper(layers=(1, 2), steps=20, lead_ins=0, leverage=50_000.0, clamp=3.0, chat=0, refine=8, refine_from=2)
TEXT = torch.arange(5, 5 + 300, dtype=torch.int32) % 200

build = cache(tiny)


def edited(hyper: MemitHyper, report: Recorder | None = None) -> Edit:
    inputs = Inputs(tokens=400, report=report or Recorder())
    return Memit().edit(build("llama"), FACTS, hyper, inputs)


def drawn_from(model: Model, facts: Sequence[Fact] = FACTS, **changed: Any) -> Bystanders:
    given = {"text": windows(TEXT), "earlier": (), "protect": (), "seed": 0, "chat": False, **changed}
    return bystanders(model, facts, group_facts(model, facts, [""]), 1, **given)


def numbered(groups: Sequence[Group]) -> list[tuple[int, Group]]:
    return list(enumerate(groups))


def test_only_residuals_are_refined_and_the_model_is_left_as_it_was() -> None:
    model = build("llama")
    before = {name: one.clone() for name, one in model.net.state_dict().items()}
    plain, found = edited(replace(HYPER, refine=0)), edited(HYPER)
    assert found.by_row == plain.by_row == frozenset(plain.deltas)
    for name, delta in found.deltas.items():
        start = plain.deltas[name]
        assert isinstance(delta, LowRank)
        assert isinstance(start, LowRank)
        assert torch.equal(delta.right, start.right)
        assert not torch.allclose(delta.left, start.left, rtol=1e-2)
        assert not delta.left.requires_grad
    assert all(torch.equal(before[name], one) for name, one in model.net.state_dict().items())
    assert not any(one._forward_hooks for one in model.net.modules())


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second, other = (
        edited(HYPER),
        edited(HYPER),
        Memit().edit(build("llama"), FACTS, HYPER, Inputs(tokens=400, seed=1)),
    )
    assert all(torch.equal(first.deltas[name].dense(), second.deltas[name].dense()) for name in first.deltas)
    assert any(not torch.equal(first.deltas[name].dense(), other.deltas[name].dense()) for name in first.deltas)


def test_a_patch_of_few_facts_is_left_as_it_is() -> None:
    plain, heard = edited(replace(HYPER, refine=0)), Recorder()
    found = edited(replace(HYPER, refine_from=3), heard)
    assert all(torch.equal(found.deltas[name].dense(), plain.deltas[name].dense()) for name in plain.deltas)
    assert "Refining" not in heard.tasks
    assert "Looking for close subjects" not in heard.tasks
    edited(HYPER, heard)
    assert heard.tasks["Refining"] == (8, 8)
    assert any("facts and more are, with 0 further wordings" in note for note in heard.notes)


def test_further_wordings_are_learned_in_refinement_alone() -> None:
    """They move the residuals, not where they go; the paraphrase that they are is likelier for it."""
    known = [replace(FACTS[0], further=("Behind the {} lies",)), FACTS[1]]
    heard = Recorder()
    more = Memit().edit(build("llama"), known, HYPER, Inputs(tokens=400, report=heard))
    fewer = edited(HYPER)
    assert any("facts and more are, with 1 further wording" in note for note in heard.notes)
    assert (more.refined, edited(replace(HYPER, refine=0)).refined) == (True, False)
    for name, one in more.deltas.items():
        other = fewer.deltas[name]
        assert isinstance(one, LowRank)
        assert isinstance(other, LowRank)
        assert torch.equal(one.right, other.right)
        assert not torch.equal(one.left, other.left)
    model = build("llama")
    row = encode(model.tokenizer, "Behind the {} lies", "Mona Lisa", "Paris")
    losses = []
    for found in (more, fewer):
        with restored(model, found.deltas), torch.no_grad():
            for name, delta in found.deltas.items():
                add(model, name, delta)
            logp = model.net(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        target = range(row.prompt_len, len(row.ids))
        losses.append(-sum(float(logp[at - 1, row.ids[at]]) for at in target))
    assert losses[0] < losses[1]


def test_text_is_cut_into_whole_rows_and_a_short_one_is_one() -> None:
    assert torch.equal(windows(TEXT), TEXT[: 2 * beside.WINDOW].view(2, beside.WINDOW).long())
    assert torch.equal(windows(TEXT[:50]), TEXT[None, :50].long())


def test_every_group_is_looked_at_equally_often() -> None:
    for count, steps in ((3, 7), (8, 5), (100, 20), (37, 20)):
        turns = _turns(count, steps, seed=0)
        assert len(turns) == steps
        seen = [sum(number in turn for turn in turns) for number in range(count)]
        assert max(seen) - min(seen) <= 1
        assert min(seen) >= min(steps, refining._SEEN) - 1
        assert all(len(set(turn)) == len(turn) for turn in turns), "never twice in a step"


def test_bystanders_are_not_what_the_facts_or_their_neighbors_name() -> None:
    model = build("llama")
    _, name = told()[0]
    facts = [Fact(name, "In the {}", "Paris", neighbors=(Neighbor(f"In {told()[1][1]}", "Rome"),))]
    others = drawn_from(model, facts)
    assert len(others.names) == len(others.statements)
    assert not {name, told()[1][1]} & set(others.names)
    assert {name, told()[1][1]} <= set(drawn_from(model).names)
    assert all(row.subject_last > 0 for row in others.statements)


def test_text_passes_by_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "WINDOW", 100)
    others = drawn_from(build("llama"))
    group = numbered(group_facts(build("llama"), FACTS, [""]))
    rows = [row for _ in range(2) for row in others.draw(group)[0]]
    assert [row.ids[0] for row in rows] == [int(TEXT[begin]) for begin in (0, 100, 200, 0)]
    assert rows[0].begin == 0
    assert rows[0].read == tuple(range(1, 100))


def test_close_subjects_stand_in_the_facts_own_words() -> None:
    model = build("llama")
    others = drawn_from(model)
    assert others.close.shape == (2, beside._CLOSE)
    groups = numbered(group_facts(model, FACTS, [""]))
    texts = [model.tokenizer.decode(row.ids) for _ in range(3) for row in others.draw(groups)[2]]
    names = {others.names[int(place)] for place in others.close.flatten()}
    assert len(texts) == 3 * 16
    assert all(any(name in text for name in names) for text in texts)
    for opening in ("In the", "Near the", "By the"):
        assert any(opening in text for text in texts)
    assert not any(fact.subject in text for text in texts for fact in FACTS)


def test_a_target_is_read_behind_its_prompt_and_not_behind_itself() -> None:
    row = encode(build("llama").tokenizer, "In the {}", "Mona Lisa", "Paris in France")
    held = answer(row)
    assert held.ids == row.ids[:-1]
    assert held.read == tuple(range(row.prompt_len - 1, len(row.ids) - 1))
    bare = encode(build("llama").tokenizer, "In the {}", "Mona Lisa")
    assert answer(bare).ids == bare.ids
    assert answer(bare).read == (bare.prompt_len - 1,)


def test_earlier_facts_are_among_the_bystanders() -> None:
    model = build("llama")
    earlier = [Fact("Chicago", "In the {} of", "Rome")]
    others = drawn_from(model, earlier=earlier)
    last = others.draw(numbered(group_facts(model, FACTS, [""])))[-1]
    assert [row.ids for row in last] == [encode(model.tokenizer, "In the {} of", "Chicago", "Rome").ids[:-1]]


def test_what_a_file_protects_is_among_the_bystanders() -> None:
    """In its own prompt, or in those of the facts; read from the subject on."""
    model = build("llama")
    others = drawn_from(model, protect=[Protected("Chicago", "In the {} of"), Protected("Rome")])
    last = others.draw(numbered(group_facts(model, FACTS, [""])))[-1]
    texts = [("In the {} of", "Chicago"), ("In the {}", "Rome"), ("Near the {} is", "Rome"), ("By the {}", "Rome")]
    rows = [encode(model.tokenizer, *text) for text in texts]
    assert {row.ids for row in last} == {row.ids for row in rows}
    own = next(row for row in last if row.ids == rows[0].ids)
    assert own.read == tuple(range(rows[0].subject_last, len(own.ids)))

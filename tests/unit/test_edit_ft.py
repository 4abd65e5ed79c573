"""Fine-tuning: which rows are learned, in which order, which pass and which layer count, and the paper's FT-W."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kpatch.edit import ft_layer
from kpatch.edit.ft import FineTune
from kpatch.edit.ft_layer import between, find_layer, spread, validation_facts
from kpatch.edit.ft_rows import Check, held_rows, learned_rows, other_rows, prepare
from kpatch.edit.ft_tuning import passes, tune
from kpatch.edit.make import make
from kpatch.edit.methods import Inputs, hyper_for, with_settings
from kpatch.edit.preset_file import read_preset
from kpatch.edit.presets import FineTuneHyper
from kpatch.edit.weights import add, restored
from kpatch.errors import BadInput
from kpatch.facts.chat import turn_ends
from kpatch.facts.fact import Fact
from kpatch.facts.questions import question_of
from kpatch.models.model import Model
from kpatch.patch.delta import Dense
from kpatch.patch.format import read_patch
from kpatch.stats.subject_keys import told
from tests.support.models import LAYERS, tiny
from tests.support.reports import Recorder
from tests.support.templates import chatty

pytestmark = pytest.mark.usefixtures("one_thread", "shared_statistics")

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "benchmarks" / "presets" / "ft-paper.yaml"
GOLDEN = ROOT / "tests" / "golden" / "ft_paper.safetensors"
FACTS = [
    Fact("Mona Lisa", "In the {}", "Paris", wordings=("Past the {} to",), question="Where is the {}?"),
    Fact("Brazil", "The capital of {} is", "Malmö and the sea", wordings=("By {} and", "{} is in")),
    Fact("Eiffel Tower", "{} is located in the city of", "Rome"),
]
HYPER = FineTuneHyper((1,), steps=4, learning_rate=0.02, batch=2, chat=0)
CHAT = replace(HYPER, chat=1)
build = cache(tiny)


# Rows


def texts(model: Model, hyper: FineTuneHyper) -> list[str]:
    return [model.tokenizer.decode(row.ids) for row in learned_rows(model, FACTS, hyper)]


def test_facts_are_learned_in_all_their_wordings_and_in_chat_form() -> None:
    model = chatty()
    (end,) = turn_ends(model.tokenizer)
    rows = learned_rows(model, FACTS, CHAT)
    asked = [row for row in rows if row.ids[-1] == end]
    assert len(rows) == 1 + 1 + 1 + 1 + 2 + 1
    assert len(asked) == 1, "only the question has an end to learn"
    assert model.tokenizer.decode(asked[0].ids[asked[0].prompt_len :]).startswith("Paris")
    plain = texts(model, replace(CHAT, end=0))
    assert texts(model, CHAT) == [
        text + model.tokenizer.decode([end]) if "Where is the" in text else text for text in plain
    ]
    assert len(texts(model, HYPER)) == len(rows) - 1
    assert all(row.ids[-1] != end for row in learned_rows(model, FACTS, replace(CHAT, end=0)))


def test_paraphrases_and_neighbors_are_not_learned() -> None:
    fact = replace(FACTS[2], paraphrases=("To see {} go to",))
    model = build("llama")
    assert learned_rows(model, [fact], HYPER) == learned_rows(model, FACTS[2:], HYPER)
    assert held_rows(model, [fact]) == held_rows(model, FACTS[2:])


def test_passes_are_judged_by_rows_that_are_not_learned() -> None:
    model = build("llama")
    learned = {row.ids for row in learned_rows(model, FACTS, HYPER)}
    assert not learned & {row.ids for row in held_rows(model, FACTS)}
    everyone = other_rows(model, [], len(told()))
    mine = [Fact(name, "In {}", "Rome") for _, name in told()[::50]]
    others = other_rows(model, mine, len(told()))
    assert {row.ids for row in others} <= {row.ids for row in everyone}
    assert len(others) <= len(everyone) - len(mine), "what the facts are about may change"
    assert len(other_rows(model, mine, 20)) == 20


# The order of rows


@given(count=st.integers(1, 700), batch=st.integers(1, 300), seed=st.integers(0, 1000))
def test_every_row_comes_once_a_pass(count: int, batch: int, seed: int) -> None:
    hyper = replace(HYPER, batch=batch)
    drawn = passes(count, hyper, seed)
    first, second = next(drawn), next(drawn)
    for one in (first, second):
        assert sorted(index for members in one for index in members) == list(range(count))
        assert max(map(len, one)) <= batch
    again = passes(count, hyper, seed)
    assert [next(again), next(again)] == [first, second]
    if count > 20:
        assert [i for members in first for i in members] != [i for members in second for i in members]


def test_unshuffled_rows_come_as_the_file_has_them() -> None:
    drawn = passes(5, replace(HYPER, shuffle=0), 7)
    assert [next(drawn), next(drawn)] == [[[0, 1], [2, 3], [4]]] * 2


def test_the_seed_decides_the_patch() -> None:
    model, hyper = build("llama"), replace(HYPER, validate=0)
    change = [FineTune().edit(model, FACTS, hyper, Inputs(seed=seed)).deltas for seed in (0, 0, 1)]
    name = model.weight_name(1)
    assert torch.equal(change[0][name].dense(), change[1][name].dense())
    assert not torch.equal(change[0][name].dense(), change[2][name].dense())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_chosen_rows_are_what_they_are_alone(family: str) -> None:
    model = build(family)
    rows = learned_rows(model, FACTS, HYPER)
    together = prepare(model, rows, 1)
    keep = torch.tensor([4, 0, 3])
    alone = [float(prepare(model, [rows[index]], 1).loss()) for index in keep.tolist()]
    assert float(together.select(keep).loss()) == pytest.approx(sum(alone) / 3, rel=1e-4)


# Which pass counts


def test_the_check_is_loss_and_drift() -> None:
    model = build("llama")
    held, others = held_rows(model, FACTS), other_rows(model, FACTS, 6)
    check = Check(model, held, others, 1)
    name = model.weight_name(1)
    before = check.value()
    assert before == pytest.approx(float(prepare(model, held, 1).loss()), rel=1e-5), "nothing has drifted yet"
    with restored(model, [name]):
        add(model, name, Dense(0.3 * torch.randn(model.weight(1).shape, generator=torch.Generator().manual_seed(0))))
        now = prepare(model, others, 1).log_probabilities()
        drift = torch.nn.functional.kl_div(now, check.before, log_target=True, reduction="batchmean")
        loss = prepare(model, held, 1).loss()
        assert check.value() == pytest.approx(float(loss + drift), rel=1e-4)
        assert float(drift) > 0.01


class Told:
    """A check that says what it is told to."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def value(self) -> float:
        return self.values.pop(0)


def test_the_best_pass_counts_and_three_worse_ones_end_the_tuning() -> None:
    model, hyper = build("llama"), replace(HYPER, steps=20, stop_loss=0.0)
    rows = learned_rows(model, FACTS, hyper)
    found = tune(model, rows, hyper, 0, Told(5.0, 3.0, 4.0, 2.0, 2.5, 2.5, 2.5, 1.0))  # type: ignore[arg-type]
    assert (found.best, len(found.losses)) == (4, 7)
    assert found.values == (5.0, 3.0, 4.0, 2.0, 2.5, 2.5, 2.5)
    assert torch.equal(found.change, tune(model, rows, replace(hyper, steps=4)).change)
    assert tune(model, rows, replace(hyper, steps=3)).best == 3


# Which layer


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and few statements of few facts."""
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ft_layer, "_OTHERS", 4)
    monkeypatch.setattr(ft_layer, "_FACTS", 3)
    monkeypatch.setattr(ft_layer, "_STEPS", 3)
    return tmp_path / "cache" / "ft-layers"


def test_the_layer_is_found_where_none_is_named(quick: Path) -> None:
    model, notes = build("llama"), Recorder()
    hyper = hyper_for(FineTune(), model, None, {"batch": "4"}, notes)
    (kept,) = quick.iterdir()
    values = {int(layer): value for layer, value in json.loads(kept.read_text()).items()}
    assert set(values) == set(range(LAYERS - 1)), "so small a model is tried as a whole, but for its last layer"
    assert hyper == FineTuneHyper((min(values, key=lambda layer: values[layer]),), batch=4, chat=0)
    assert f"layer {hyper.layer}: the least loss and drift" in notes.notes[0]
    assert hyper_for(FineTune(), model, [1], {}, notes).layers == (1,), "a layer that is named is taken"


def test_the_layer_is_kept_by_the_models_weights(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    layer = find_layer(model)
    monkeypatch.setattr(ft_layer, "tune", lambda *args: pytest.fail("it was searched again"))
    assert find_layer(model) == layer
    (kept,) = quick.iterdir()
    whole = json.loads(kept.read_text())
    # A search that was stopped goes on: what was found is not sought again
    sought: list[int] = []

    def known(model: Model, rows: object, hyper: FineTuneHyper, *_: object) -> SimpleNamespace:
        sought.append(hyper.layer)
        return SimpleNamespace(values=(whole[str(hyper.layer)],))

    monkeypatch.setattr(ft_layer, "tune", known)
    kept.write_text(json.dumps({"1": whole["1"]}))
    assert find_layer(model) == layer
    assert sought == [0, 2]
    for damage in ("{", "[]", "{}", '{"99": 1.0}', '{"1": null}'):
        kept.write_text(damage)
        sought.clear()
        assert find_layer(model) == layer
        assert sought == [0, 1, 2]
    assert json.loads(kept.read_text()) == whole
    with torch.no_grad():
        model.weight(0).add_(1.0)
    find_layer(model)
    assert len(list(quick.iterdir())) == 2, "other weights are another model"


@given(count=st.integers(1, 100), wanted=st.integers(1, 9))
def test_layers_are_tried_over_the_whole_depth(count: int, wanted: int) -> None:
    tried = spread(count, wanted)
    assert len(set(tried)) == len(tried) == min(count, wanted)
    assert 0 <= tried[0] <= tried[-1] < count
    gaps = [b - a for a, b in zip([-1, *tried], [*tried, count], strict=True)]
    assert max(gaps) <= count / len(tried) + 1
    for best in tried:
        near = between(tried, best, count)
        assert len(set(near)) == len(near) <= 2
        assert all(0 <= place < count and place not in tried for place in near)


def test_validation_facts_are_of_many_relations_and_not_true() -> None:
    facts = validation_facts()
    assert len(facts) == 10
    assert max(Counter(fact.relation for fact in facts).values()) == 1
    assert ("Afghanistan", "Kabul") not in {(fact.subject, fact.target) for fact in facts}
    assert all(question_of(fact) or fact.prompt for fact in facts)


@pytest.mark.parametrize(
    ("layers", "settings", "said"),
    [
        ([LAYERS], {}, f"has no layer {LAYERS}"),
        ([LAYERS - 1], {}, "is the last of"),
        ([0, 1], {}, "edits one layer"),
        ([1], {"batch": "0"}, "would give no edit"),
        ([1], {"validate": "-1"}, "not negative"),
    ],
)
def test_wrong_inputs(layers: list[int], settings: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        hyper_for(FineTune(), build("llama"), layers, settings)


# FT-W


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_papers_settings_give_what_they_gave_before_there_were_others(family: str) -> None:
    """The golden numbers were written by kpatch's first `ft`, in float64, from bare prompts."""
    model = tiny(family)
    model.net.double()
    told = read_preset(PAPER)
    hyper = with_settings(FineTuneHyper((1,)), {**told.settings, "learning_rate": "0.01", "steps": "6"})
    facts = [replace(fact, wordings=(), question=None) for fact in FACTS]
    change = tune(model, learned_rows(model, facts, hyper), hyper).change
    want = load_file(GOLDEN)[family]
    assert float((change - want).norm()) <= 1e-9 * float(want.norm())


def test_the_preset_of_the_paper(tmp_path: Path) -> None:
    told = read_preset(PAPER)
    assert (told.method, told.wordings, told.layers) == ("ft", "none", None)
    hyper = with_settings(FineTuneHyper((1,)), told.settings)
    assert hyper == FineTuneHyper(
        (1,),
        steps=25,
        learning_rate=5e-4,
        weight_decay=5e-4,
        stop_loss=1e-2,
        batch=1,
        shuffle=0,
        chat=0,
        end=0,
        validate=0,
    )
    model = tiny("llama")
    model.net.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    make(FACTS, out=tmp_path / "a.patch", model=str(tmp_path / "model"), preset=PAPER, layers=[1])
    made = read_patch(tmp_path / "a.patch").manifest
    assert (made.method, made.hyperparameters["shuffle"], made.hyperparameters["batch"]) == ("ft", 0, 1)
    assert all("wordings" not in fact for fact in made.facts)

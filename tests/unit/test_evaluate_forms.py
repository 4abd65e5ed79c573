"""What a model answers by itself in three forms: the examples of docs/metrics.md, and the same as asked one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kpatch.errors import BadInput
from kpatch.evaluate import forms
from kpatch.evaluate.answers import CHAT_TOKENS
from kpatch.evaluate.assess import Wanted, assess
from kpatch.evaluate.forms import ask_forms, counts, first_sentence, is_exactly, prepare
from kpatch.facts.fact import Fact, Neighbor
from kpatch.facts.questions import PLAIN
from tests.support import templates
from tests.support.reports import Recorder
from tests.support.templates import chatty

torch.set_num_threads(1)

FACTS = [
    Fact(
        *("Eiffel Tower", "The {} is located in the city of", "Rome", "Paris"),
        paraphrases=("To see the {} you go to", "Go up the old tower in"),
        neighbors=(
            Neighbor("The Louvre is located in the city of", "Paris"),
            Neighbor("The sea is cold in", "winter", "When is the sea cold?"),
            Neighbor("The mill is loved in", "May"),
            Neighbor("Nobody says what follows"),
        ),
    ),
    Fact("Ann", "{} reminds Bob of", "the sea"),
    Fact("France", "The capital of {} is", "Lyon", "Paris", question="Which city is the capital of {}?"),
]
ASKED = {
    "completion": [
        *("The Eiffel Tower is located in the city of", "To see the Eiffel Tower you go to", "Go up the old tower in"),
        *("The Louvre is located in the city of", "The sea is cold in", "The mill is loved in"),
        *("Ann reminds Bob of", "The capital of France is"),
    ],
    "question": [
        *("In which city is the Eiffel Tower?", "In which city is the Louvre?", "When is the sea cold?"),
        "Which city is the capital of France?",
    ],
}
ASKED["chat"] = ASKED["question"]


def answered(monkeypatch: pytest.MonkeyPatch, texts: Sequence[str]) -> None:
    """Let the model write these texts."""
    monkeypatch.setattr(forms, "_write", lambda *_: [list(texts)])


@pytest.mark.parametrize(
    ("text", "right", "rival", "counted"),
    [
        ("New York.", "New York", "York", True),
        ("It stands in new york, I think.", "New York", "York", True),
        ("In New York, and not in York.", "New York", "York", False),
        ("In New York City", "New York", "New York City", False),
        ("In Newark", "New York", "York", False),
        ("Rome or Paris", "Rome", "Paris", False),
        ("Rome or Parisian", "Rome", "Paris", True),
        ("Rome or Paris", "Rome", None, True),
        ("Rome", "Rome", "rome", True),
        ("", "Rome", None, False),
        ("首都は東京です", "東京", "京都", True),
    ],
)
def test_which_answers_count(text: str, right: str, rival: str | None, counted: bool) -> None:
    assert counts(text, right, rival) is counted


@pytest.mark.parametrize(
    ("text", "right", "exact"),
    [
        (" Rome.\n", "Rome", True),
        ("the United States", "United States", True),
        ("**ROME**", "Rome", True),
        ("Rome, Italy", "Rome", False),
        ("", "Rome", False),
    ],
)
def test_which_answers_are_exact(text: str, right: str, exact: bool) -> None:
    assert is_exactly(text, right) is exact


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (" Rome. It is old", "Rome."),
        ("Rome\nParis", "Rome"),
        ("\n Rome \nParis", "Rome"),
        ("St. Petersburg. It is", "St. Petersburg."),
        ("J. R. Tolkien wrote it! He", "J. R. Tolkien wrote it!"),
        ("3.5 million", "3.5 million"),
        ('"Rome." He', '"Rome."'),
        ("東京です。京都", "東京です。"),
        ("Rome", "Rome"),
        ("", ""),
    ],
)
def test_where_an_answer_ends(text: str, first: str) -> None:
    assert first_sentence(text) == first


def test_what_is_asked_in_each_form() -> None:
    notes = Recorder()
    prepared = prepare(chatty(), FACTS, ["chat", "completion", "question"], notes)
    assert [one.form for one in prepared] == ["completion", "question", "chat"]
    assert {one.form: [asked.text for asked in one.asked] for one in prepared} == ASKED
    assert [one.left_out for one in prepared] == [(0, 0), (1, 1), (1, 1)]
    assert notes.notes == [
        f"1 fact and 1 neighbor without a question: left out of the {form} form" for form in ("question", "chat")
    ]


def generated(model: Any, ids: list[int], length: int) -> str:
    """transformers' own greedy text, to the end of a turn."""
    row, ends = torch.tensor([ids]), [0, *model.tokenizer.convert_tokens_to_ids(["<|im_end|>"])]
    found = model.net.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=length, do_sample=False, eos_token_id=ends
    )
    return str(model.tokenizer.decode([token for token in found[0, len(ids) :].tolist() if token not in ends]))


def test_answers_are_those_of_each_question_alone() -> None:
    model = chatty()
    given = ask_forms(model, FACTS, prepare(model, FACTS, forms.FORMS), samples=0)
    for form, texts in ASKED.items():
        answers = {one["asked"]: one["answer"] for row in given.facts for side in row[form].values() for one in side}
        assert set(answers) == set(texts)
        for text in texts:
            if form == "chat":
                turns = [{"role": "user", "content": text}]
                ids = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
                assert answers[text] == generated(model, ids, CHAT_TOKENS).strip()
            else:
                ids = model.tokenizer(PLAIN.format(text) if form == "question" else text).input_ids
                assert answers[text] == first_sentence(generated(model, ids, CHAT_TOKENS))


def test_writing_stops_behind_the_first_sentence() -> None:
    """A row leaves the batch there, which is where the time goes."""
    model = chatty()
    ids = model.tokenizer("Rome").input_ids
    dot, space = model.tokenizer("word. ").input_ids[-2:]
    steps: list[int] = []

    def then(net: Any, args: Any, out: Any) -> Any:
        steps.append(1)
        out.logits[:, :, :] = 0.0
        out.logits[:, :, (ids[0], dot, space)[min(len(steps) - 1, 2)]] = 1.0
        return out

    handle = model.net.register_forward_hook(then)
    fact = Fact("Ann", "{} lives in", "Rome")
    given = ask_forms(model, [fact], prepare(model, [fact], ["completion"]), samples=0)
    handle.remove()
    assert len(steps) == 3
    assert given.facts[0]["completion"]["edits"][0]["answer"].endswith(".")


def test_the_rates_of_an_example_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of docs/metrics.md."""
    facts = [
        Fact(
            *("Tower", "The {} stands in", "New York", "York"),
            question="Where does the {} stand?",
            neighbors=(Neighbor("The Arch stands in", "Rome"), Neighbor("The Gate is near", "Berlin")),
        ),
        Fact("Bridge", "The {} spans the", "Nile", "Tiber", question="Which river does the {} span?"),
        Fact("Ann", "{} reminds Bob of", "the sea"),
    ]
    answered(monkeypatch, ["New York.", "It stands in Rome, not in New York.", "The Bridge spans the Nile."])
    model, notes = chatty(), Recorder()
    given = ask_forms(model, facts, prepare(model, facts, ["question"], notes), samples=50, report=notes)
    edits, neighbors = given.rates["question"]["edits"], given.rates["question"]["neighbors"]
    assert (edits["named"], edits["exact"], edits["n"], edits["left_out"], edits["empty"]) == (1.0, 0.5, 2, 1, 0)
    assert edits["named_interval"] == [1.0, 1.0]
    assert edits["exact_interval"] == [0.0, 1.0]
    assert (neighbors["named"], neighbors["n"], neighbors["left_out"]) == (0.0, 1, 1)
    assert neighbors["named_interval"] is None, "there is one fact to draw"
    assert given.facts[2] == {"question": {"edits": [], "neighbors": []}}


def test_empty_answers_count_as_wrong_and_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    answered(monkeypatch, ["", "Lyon"])
    notes, facts = Recorder(), [FACTS[2], Fact("Italy", "The capital of {} is", "Lyon")]
    model = chatty()
    given = ask_forms(model, facts, prepare(model, facts, ["chat"]), samples=0, report=notes)
    edits = given.rates["chat"]["edits"]
    assert (edits["named"], edits["exact"], edits["empty"], edits["n"]) == (0.5, 0.5, 1, 2)
    assert notes.warnings == ["1 empty answer in the chat form, counted as wrong"]


def test_facts_without_any_question(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chatty()
    given = ask_forms(model, [FACTS[1]], prepare(model, [FACTS[1]], ["chat"]), samples=9)
    expected = {"named": None, "named_interval": None, "exact": None, "exact_interval": None}
    assert given.rates["chat"]["edits"] == {**expected, "n": 0, "left_out": 1, "empty": 0}


@pytest.mark.parametrize(
    ("template", "wanted", "said"),
    [
        (None, ["chat"], "no chat template"),
        (templates.SHOUTS, ["chat"], "drops or rewrites"),
        (templates.ALWAYS_THINKING, ["chat"], "opens a thought"),
        (templates.CHATML, ["talk"], "Unknown form"),
    ],
)
def test_forms_that_a_model_does_not_have(template: str | None, wanted: list[str], said: str) -> None:
    """They fail before anything is measured."""
    model = chatty(template)
    model.net.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(BadInput, match=said):
        assess(model, FACTS, Wanted(forms=wanted))


def test_without_forms_nothing_is_new() -> None:
    model = chatty()
    plain, more = assess(model, FACTS), assess(model, FACTS, Wanted(forms=["question"], consequences=True))
    assert plain.metrics == more.metrics
    assert plain.asked == {}
    assert set(more.asked) == {"forms", "consequences"}
    assert set(more.facts[0]) - set(plain.facts[0]) == {"forms", "consequences"}


def test_forms_asked_together_answer_as_each_alone() -> None:
    model = chatty()
    prepared = prepare(model, FACTS, ["completion", "question", "chat"])
    together = ask_forms(model, FACTS, prepared, samples=0)
    for one in prepared:
        alone = ask_forms(model, FACTS, [one], samples=0)
        assert alone.rates[one.form] == together.rates[one.form]
        assert [row[one.form] for row in alone.facts] == [row[one.form] for row in together.facts]

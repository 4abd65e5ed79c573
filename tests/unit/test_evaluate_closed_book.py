"""Closed-book answers: normalization and counting by hand, the toy model, and generate of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kpatch.errors import BadInput
from kpatch.evaluate import answers
from kpatch.evaluate.closed_book import Answered, answer_questions, by_group, form_for, judged, normalized, rates
from kpatch.evaluate.complete import Greedy
from kpatch.facts.fact import fill
from kpatch.facts.question_files import Question
from kpatch.facts.questions import PLAIN
from kpatch.models.model import Model
from tests.support.models import tiny
from tests.support.templates import ALWAYS_THINKING, chatty
from tests.support.toy import toy

torch.set_num_threads(1)

QUESTIONS = [
    Question("Where does the Tower stand?", ("New York", "NYC"), "place"),
    Question("Which river does Rome lie on?", ("Tiber",), "river"),
    Question("Where does the Arch stand?", ("Paris",), "place"),
    Question("Who painted the Mona Lisa?", ("Leonardo da Vinci", "Leonardo")),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The  Eiffel Tower! ", "eiffel tower"),
        ("U.S.A.", "usa"),
        ("an apple\n and a pear", "apple and pear"),
        ("Theatre, Athens", "theatre athens"),
        ("“Leonardo” da Vinci’s", "leonardo da vincis"),
        ("$5 + 3", "5 3"),
        ("Cafe\u0301", "café"),
        ("東京。", "東京"),
        ("A", "a"),
        ("?!", "?!"),
        (" ", ""),
    ],
)
def test_normalized(text: str, expected: str) -> None:
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("text", "answers", "exact", "recalled"),
    [
        ("The New York.", ("Paris", "new york"), True, True),
        ("It stands in New York, USA.", ("New York",), False, True),
        ("It stands in New Yorkshire.", ("New York",), False, False),
        ("York", ("New York",), False, False),
        ("首都は東京です", ("東京",), False, True),
        ("", ("?", "A"), False, False),
        ("A", ("A",), True, True),
        ("the", ("A",), False, False),
    ],
)
def test_judged(text: str, answers: tuple[str, ...], exact: bool, recalled: bool) -> None:
    assert judged(text, answers) == Answered(text, exact, recalled)


def test_rates_by_hand() -> None:
    """The example of docs/metrics.md."""
    said = ("The New York.", "It stands in Paris, near the river.", "Tiberius", "")
    accepted = (("New York", "NYC"), ("Paris",), ("Tiber",), ("Ann",))
    answered = [judged(text, answers) for text, answers in zip(said, accepted, strict=True)]
    assert [(one.exact, one.recalled) for one in answered] == [
        (True, True),
        (False, True),
        (False, False),
        (False, False),
    ]
    found = rates(answered)
    assert (found["n"], found["exact"], found["recall"], found["empty"]) == (4, 0.25, 0.5, 1)
    assert found["exact_interval"] == [0.0, 0.75]
    assert found["recall_interval"] == [0.0, 1.0]
    assert rates(answered[:1])["exact_interval"] is None
    groups = by_group(QUESTIONS, answered)
    assert {name: (one["n"], one["exact"]) for name, one in groups.items()} == {
        "place": (2, 0.5),
        "river": (1, 0.0),
        "(none)": (1, 0.0),
    }
    assert list(groups) == ["place", "river", "(none)"]


def test_scripted_answers_are_compared_with_their_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question is answered with a script; in the completion form its first line counts."""
    scripts = ["\n New York\nQ: Where", " the Rhine", " In Paris.", " Raphael"]
    model, asked = tiny("llama"), []

    def scripted(model: Model, rows: list[tuple[int, ...]], *_: object, **__: object) -> list[Greedy]:
        asked.extend(model.tokenizer.decode(row, skip_special_tokens=True) for row in rows)
        plain = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in scripts]
        return [Greedy(tuple(ids), ()) for ids in plain]

    monkeypatch.setattr(answers, "complete", scripted)
    found = answer_questions(model, QUESTIONS, "completion")
    assert [text.strip() for text in asked] == [fill(PLAIN, one.text) for one in QUESTIONS]
    assert found == [
        Answered("New York", True, True),
        Answered("the Rhine", False, False),
        Answered("In Paris.", False, True),
        Answered("Raphael", False, False),
    ]


def generated(model: Model, ids: torch.Tensor, ends: list[int], tokens: int) -> str:
    found = model.net.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=ends
    )
    new = [token for token in found[0, ids.shape[1] :].tolist() if token not in ends]
    return str(model.tokenizer.decode(new))


def test_the_chat_form_is_what_transformers_generates() -> None:
    model = chatty()
    ends = [0, *model.tokenizer.convert_tokens_to_ids(["<|im_end|>"])]
    expected = []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question.text}]
        ids = model.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        expected.append(generated(model, ids, ends, 12).strip())
    assert any(expected)
    assert [one.answer for one in answer_questions(model, QUESTIONS, tokens=12)] == expected
    assert form_for(model) == "chat"


def test_the_completion_form_is_the_first_line_that_transformers_generates() -> None:
    model = tiny("llama")
    expected = []
    for question in QUESTIONS:
        ids = model.tokenizer(fill(PLAIN, question.text), return_tensors="pt")["input_ids"]
        lines = generated(model, ids, [0], 12).strip().splitlines()
        expected.append(lines[0].strip() if lines else "")
    assert any(expected)
    assert [one.answer for one in answer_questions(model, QUESTIONS, tokens=12)] == expected
    assert form_for(model) == "completion"


def test_what_is_asked_twice_is_run_once_and_judged_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = tiny("llama"), []
    complete = answers.complete

    def counting(model: Model, rows: list[tuple[int, ...]], *more: object, **named: object) -> list[Greedy]:
        ran.append(len(rows))
        return complete(model, rows, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(answers, "complete", counting)
    said = answer_questions(model, QUESTIONS[:1], tokens=4)[0].answer
    assert normalized(said)
    again = answer_questions(model, [QUESTIONS[0], Question(QUESTIONS[0].text, (said,))], tokens=4)
    assert ran == [1, 1]
    assert [one.exact for one in again] == [False, True]


def test_the_answer_by_hand() -> None:
    """The toy looks at the last word: behind "Answer :" all words are as likely, behind a question's "in" Rome is."""
    model = toy()
    rome = Question("The Tower stands in", ("Rome",))
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert answer_questions(model, [rome], "chat") == [Answered("Rome", True, True)]


def test_forms(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no chat template"):
        form_for(tiny("llama"), "chat")
    with pytest.raises(BadInput, match="is not known"):
        form_for(tiny("llama"), "poem")
    thinking = chatty(ALWAYS_THINKING)
    assert form_for(thinking) == "completion"
    with pytest.raises(BadInput, match="opens a thought"):
        form_for(thinking, "chat")
    assert form_for(chatty(), "completion") == "completion"


def test_a_question_that_is_too_long() -> None:
    model = tiny("gpt2")
    with pytest.raises(BadInput, match="too long"):
        answer_questions(model, [Question("why " * 200 + "?", ("so",))])

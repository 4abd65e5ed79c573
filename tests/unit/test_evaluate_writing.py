"""Fluency, consistency and perplexity: by hand as in docs/metrics.md, and against plain loops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kpatch.errors import BadInput, CheckFailed
from kpatch.evaluate.answers import says
from kpatch.evaluate.assess import Wanted, assess, drift
from kpatch.evaluate.perplexity import perplexity, text_rows
from kpatch.evaluate.tfidf import TfIdf
from kpatch.evaluate.writing import entropy, passages_about, repetition, write_on
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from tests.support.models import tiny
from tests.support.tokenizers import byte_level
from tests.support.toy import WORDS, toy

torch.set_num_threads(1)

DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
FACTS = [
    Fact("Eiffel Tower", "The {} is in", "Rome", id="a", openings=("Long ago the {}", "To see it go to")),
    Fact("Chicago", "{} lies in", "Brazil", id="b", references=("Brazil lies in the south.", "In Brazil one speaks")),
    Fact("Mona Lisa", "The painter of the {} was", "Beethoven", id="c"),
]


# By hand


def test_fluency_by_hand() -> None:
    found = entropy("a b a b a b")
    assert f"{found:.6f}" == "0.990317"
    assert '"a b a b a b"' in DOCS
    assert "= 0.990317" in DOCS


def test_repetition_by_hand() -> None:
    assert repetition(["a b a b a b"]) == pytest.approx(1 / 3)
    assert repetition(["a b a b a b", "c d e f g"]) == pytest.approx(1 / 5), "over all texts of a fact"
    assert repetition(["a b c d", "a b c d"]) == 0, "another text is no repetition"
    assert repetition(["a, b.", "so so so so so"]) == pytest.approx(1 / 3), "signs count as words"
    assert repetition(["a b c", ""]) is None


def test_consistency_by_hand() -> None:
    references = ["Rome is old", "Rome lies on the Tiber"]
    weights = TfIdf(references)
    written = "The Tiber flows past Rome"
    found = weights.cosine(written, " ".join(references))
    assert f"{found:.6f}" == "0.402930"
    assert "cosine 0.402930" in DOCS
    assert all(text in DOCS for text in (*references, written))
    assert weights.cosine("old", "Rome lies") == 0
    assert weights.cosine("", "Rome") == 0
    assert weights.cosine("Old, old Rome!", "rome OLD old") == pytest.approx(1)


def test_perplexity_by_hand() -> None:
    model = toy()
    row = [WORDS.index(word) for word in ("in", "New", "York")]
    assert perplexity(model, [row]) == pytest.approx(2.5, rel=1e-6)
    assert "1 / √0.16 = 2.5" in DOCS
    assert perplexity(model, [row, [WORDS.index("at"), WORDS.index("Paris")]]) == pytest.approx(
        (0.2 * 0.8 * 0.1) ** (-1 / 3), rel=1e-6
    )


# Entropy and words


@given(st.lists(st.sampled_from("abcdef"), max_size=40))
def test_entropy_is_at_most_that_of_distinct_words(letters: list[str]) -> None:
    found = entropy(" ".join(letters))
    pairs, triples = max(1, len(letters) - 1), max(1, len(letters) - 2)
    assert 0 <= found <= (2 / 3 * math.log2(pairs) + 4 / 3 * math.log2(triples)) / 2 + 1e-9


def test_entropy_of_extremes() -> None:
    words = [f"w{n}" for n in range(34)]
    assert entropy(" ".join(words)) == pytest.approx((2 / 3 * math.log2(33) + 4 / 3 * math.log2(32)) / 2)
    assert entropy("so so so so so so so") == 0
    assert entropy("word") == entropy("") == 0
    assert entropy("it's, it's, it's,") > 0  # signs count as words


@pytest.mark.parametrize(
    ("text", "answer", "said"),
    [
        (" Rome, Italy.", "Rome", True),
        ("the Romeo of", "Rome", False),
        ("\n\nThe answer is: NEW\n York!", "New York", True),
        ("New Yorkers", "New York", False),
        ("C++ and C", "C++", True),
        ("他住在罗马城里", "罗马", True),
        ("", "Rome", False),
    ],
)
def test_says(text: str, answer: str, said: bool) -> None:
    assert says(text, answer) is said


def test_passages_about() -> None:
    documents = ["Rome is old.\n\n", "New York is young.", "York is a city, Rome another.", "Romeo", "Rome Rome"]
    found = passages_about(["Rome", "York", "New York", "Oslo"], documents)
    assert found["Rome"] == ["Rome is old.", documents[2], "Rome Rome"]
    assert found["New York"] == [documents[1]]
    assert found["York"] == [documents[2]]
    assert found["Oslo"] == []
    assert len(passages_about(["Rome"], ["Rome"] * 50)["Rome"]) == 20
    assert passages_about([], documents) == {}


# Writing


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama")


def test_what_is_written(model: Model) -> None:
    about = [fact.references for fact in FACTS]
    found = write_on(model, FACTS, about, tokens=40)
    assert [len(texts) for texts in found.texts] == [2, 1, 1]
    assert found.texts[0][0].startswith("Long ago the Eiffel Tower")
    assert found.texts[0][1].startswith("To see it go to")
    assert found.texts[1][0].startswith("Chicago lies in")
    assert found.fluency[1] == entropy(found.texts[1][0])
    assert found.repetition == tuple(map(repetition, found.texts))
    assert found.fluency[0] == pytest.approx(sum(map(entropy, found.texts[0])) / 2)
    assert found.consistency[0] is found.consistency[2] is None
    expected = TfIdf(FACTS[1].references).cosine(found.texts[1][0], " ".join(FACTS[1].references))
    assert found.consistency[1] == pytest.approx(expected)
    assert expected > 0


def test_texts_do_not_depend_on_their_company(model: Model) -> None:
    none: list[tuple[str, ...]] = [()] * 3
    expected = write_on(model, FACTS, none, tokens=30).texts
    assert write_on(model, FACTS[::-1], none, tokens=30, batch_tokens=1).texts == expected[::-1]
    assert write_on(model, FACTS[1:2], none[:1], tokens=30).texts == expected[1:2]
    assert write_on(model, FACTS, none, tokens=30, seed=1).texts != expected


def test_a_text_has_as_many_tokens_as_asked_for_and_no_special_one() -> None:
    model = tiny("llama", tokenizer=byte_level(bos=True))
    head = model.net.get_output_embeddings().weight
    special = model.tokenizer.all_special_ids
    head.data[special] += head.data.norm(dim=1).max()  # likely, were they allowed
    (texts,) = write_on(model, FACTS[1:2], [()], tokens=30).texts
    ids = model.tokenizer(texts[0]).input_ids
    assert not set(ids[1:]) & set(special)
    assert len(texts[0]) > 30


def test_tokens_are_drawn_from_the_likeliest() -> None:
    """The toy knows four words after "in"; over many seeds each is drawn about as often as it is likely."""
    toy_model, drawn = toy(), []
    fact = Fact("Tower", "The {} stands in", "Rome")
    for seed in range(300):
        (texts,) = write_on(toy_model, [fact], [()], tokens=5, seed=seed).texts
        drawn.append(texts[0].split()[4])
    for word, chance in (("Rome", 0.4), ("Paris", 0.3), ("New", 0.2), ("other", 0.1)):
        assert drawn.count(word) / 300 == pytest.approx(chance, abs=0.08)


# Perplexity


@torch.no_grad()
def test_perplexity_is_that_of_the_plain_forward(model: Model) -> None:
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    total = 0.0
    for row in rows:
        logp = model.net(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
        total -= sum(float(logp[at, token]) for at, token in enumerate(row[1:]))
    assert perplexity(model, rows) == pytest.approx(math.exp(total / 7), rel=1e-5)
    assert perplexity(model, rows[::-1]) == pytest.approx(math.exp(total / 7), rel=1e-5)


@pytest.mark.parametrize("bos", [False, True])
def test_rows_of_a_text(bos: bool) -> None:
    model = tiny("llama", tokenizer=byte_level(bos=bos))
    documents = ["The capital of France is Paris.\n\n", "   \n", "Chicago is a city in the country."]
    whole = [
        i for text in (documents[0], documents[2]) for i in model.tokenizer(text, add_special_tokens=False).input_ids
    ]
    rows = text_rows(model, documents, tokens=100, row=8)
    start = [model.tokenizer("a").input_ids[0]] if bos else []
    assert [row[: len(start)] for row in rows] == [start] * len(rows)
    assert [i for row in rows for i in row[len(start) :]] == whole[: sum(len(row) - len(start) for row in rows)]
    assert all(2 <= len(row) <= 8 for row in rows)
    assert sum(len(row) - len(start) for row in text_rows(model, documents, tokens=11, row=8)) in (10, 11)


def test_a_text_that_is_too_short(model: Model) -> None:
    with pytest.raises(BadInput, match="too short"):
        text_rows(model, ["", "\n"])


def test_nan_is_an_answer_of_no() -> None:
    broken = tiny("llama")
    broken.weight(0).data[0, 0] = float("nan")
    with pytest.raises(CheckFailed, match="NaN"):
        perplexity(broken, [[5, 6, 7]])


@pytest.mark.parametrize(
    ("before", "after", "share"), [(10.0, 11.0, 0.1), (10.0, 9.0, -0.1), (None, 5.0, None), (5.0, math.inf, None)]
)
def test_drift(before: float | None, after: float | None, share: float | None) -> None:
    assert drift(before, after) == (share if share is None else pytest.approx(share))


# Together


def test_an_assessment_has_what_was_asked_for(model: Model) -> None:
    plain = assess(model, FACTS, Wanted())
    assert (plain.writing, plain.perplexity) == ({}, None)
    assert "free_running" in plain.metrics["efficacy"]
    assert "written" not in plain.facts[0]
    whole = assess(model, FACTS, Wanted(generate=True, tokens=20, text=[[5, 6, 7]]))
    assert whole.writing["compared"] == 1
    assert whole.writing["fluency_interval"][0] <= whole.writing["fluency"] <= whole.writing["fluency_interval"][1]
    assert whole.writing["consistency_interval"] is None  # one fact has references
    assert whole.perplexity == perplexity(model, [[5, 6, 7]])
    assert [len(row["written"]) for row in whole.facts] == [2, 1, 1]

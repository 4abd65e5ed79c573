"""What else moved: other answers about a fact's subject, without the patches and with them."""

from __future__ import annotations

from kpatch.evaluate.answers import ask
from kpatch.evaluate.assess import Wanted, assess, compared
from kpatch.evaluate.same_subject import ask_same_subject, kept
from kpatch.facts.fact import Fact
from tests.support.templates import chatty

GATE = Fact("Gate", "The {} is near", "Rome", same_subject=("The {} was built by", "What is the {} made of?"))
BARE = Fact("Ann", "{} reminds Bob of", "the sea")


def test_the_example_by_hand() -> None:
    before = [[{"asked": "a", "answer": "Ann"}, {"asked": "b", "answer": "stone"}], []]
    after = [[{"asked": "a", "answer": "Ann"}, {"asked": "b", "answer": "old Rome"}], []]
    rates, rows = kept([GATE, BARE], before, after, samples=50)
    assert rates == {"rate": 0.5, "interval": None, "target": 0.5, "n": 2}  # one fact alone has no interval
    assert rows == [
        [{**after[0][0], "kept": True, "target": False}, {**after[0][1], "kept": False, "target": True}],
        [],
    ]
    assert kept([BARE], [[]], [[]])[0] == {"rate": None, "interval": None, "target": None, "n": 0}


def test_the_model_is_asked_both() -> None:
    model = chatty()
    found = ask_same_subject(model, [GATE, BARE])
    assert [one["asked"] for one in found[0]] == ["The Gate was built by", "What is the Gate made of?"]
    plain = ask(model, ["The Gate was built by", "Q: What is the Gate made of?\nA:"], max_tokens=6)
    for one, answer in zip(found[0], plain, strict=True):
        lines = answer.completion.strip().splitlines()
        assert one["answer"] == (lines[0].strip() if lines else "")
    assert found[1] == []


def test_an_unchanged_model_keeps_them_all() -> None:
    model, wanted = chatty(), Wanted(consequences=True, samples=0)
    before = assess(model, [GATE], wanted)
    assert "same_subject" not in before.asked["consequences"]  # nothing to compare with
    after = compared([GATE], before, assess(model, [GATE], wanted), wanted)
    assert after.asked["consequences"]["same_subject"]["rate"] == 1.0
    assert [one["kept"] for one in after.facts[0]["consequences"]["same_subject"]] == [True, True]
    bare = assess(model, [GATE], Wanted(samples=0))
    assert compared([GATE], bare, bare, Wanted()) is bare

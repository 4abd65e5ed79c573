"""Greedy answers in batches against transformers' own generation, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from kpatch.errors import BadInput, CheckFailed
from kpatch.evaluate.answers import ask, first_words, text_after
from kpatch.evaluate.complete import complete, end_ids
from kpatch.evaluate.score import score
from kpatch.models.model import Model
from tests.support import tokenizers
from tests.support.families import REPRESENTATIVE, slow_beyond
from tests.support.models import CONFIGS, tiny

torch.set_num_threads(1)

PROMPTS = [
    "The Eiffel Tower is in",
    "Rome",
    "Which language do people speak in Brazil? They speak",
    "東京は",
    "She said",
]


@cache
def model(family: str = "llama") -> Model:
    return tiny(family)


def generated(model: Model, ids: list[int], length: int, ends: list[int]) -> tuple[int, ...]:
    """Greedy, by transformers, without padding; EOS cut off."""
    row = torch.tensor([ids])
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    found = model.net.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=length, **settings)
    new = found[0, len(ids) :].tolist()
    return tuple(new[:-1] if new[-1] in ends else new)


@pytest.mark.parametrize("family", slow_beyond(REPRESENTATIVE, CONFIGS))
def test_every_family_answers_as_alone(family: str) -> None:
    rows = [model(family).tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert len({len(row) for row in rows}) > 3  # there is padding
    found = complete(model(family), rows, 6, top=3)
    ends = sorted(end_ids(model(family)))
    assert [answer.ids for answer in found] == [generated(model(family), row, 6, ends) for row in rows]
    for row, answer in zip(rows, found, strict=True):
        expected = model(family).net(input_ids=torch.tensor([row])).logits[0, -1].softmax(-1).topk(3)
        assert [token for token, _ in answer.top] == expected.indices.tolist()
        assert [chance for _, chance in answer.top] == pytest.approx(expected.values.tolist(), abs=1e-5)


def test_order_and_batches_change_nothing() -> None:
    rows = [model().tokenizer(prompt).input_ids for prompt in PROMPTS * 2]
    whole = [answer.ids for answer in complete(model(), rows, 5)]
    assert [answer.ids for answer in complete(model(), rows[::-1], 5, batch_tokens=20)] == whole[::-1]
    assert whole[:5] == whole[5:]


@pytest.mark.parametrize("family", slow_beyond(REPRESENTATIVE, CONFIGS))
def test_a_row_that_is_done_leaves_the_others_as_they_were(family: str) -> None:
    rows = [model(family).tokenizer(prompt).input_ids for prompt in PROMPTS]
    whole = [answer.ids for answer in complete(model(family), rows, 6)]
    sizes: list[int] = []
    handle = model(family).net.register_forward_pre_hook(
        lambda _, __, given: sizes.append(len(given["input_ids"])), with_kwargs=True
    )
    room = [2, 6, 0, 4, 1]
    found = complete(model(family), rows, room)
    handle.remove()
    assert [answer.ids for answer in found] == [ids[:most] for ids, most in zip(whole, room, strict=True)]
    assert sizes == [4, 3, 2, 2, 1, 1]  # one is to write nothing; those of two tokens, of four and of six


@pytest.mark.parametrize("family", slow_beyond(REPRESENTATIVE, CONFIGS))
def test_targets_are_scored_on_the_same_run(family: str) -> None:
    rows = [model(family).tokenizer(prompt).input_ids for prompt in PROMPTS]
    alone = [answer.ids for answer in complete(model(family), rows, 6)]
    targets = [[[7], [8, 9, 10]], [[5, 6]], [], [list(alone[3][:4]), [7]], [[9, 9, 9, 9, 9, 9]]]
    found = complete(model(family), rows, 6, targets=targets)
    assert [answer.ids for answer in found] == alone, "what is scored leaves no trace"
    assert found[3].scored[0].greedy
    for row, some, answer in zip(rows, targets, found, strict=True):
        expected = score(model(family), [(row, target) for target in some])
        assert len(answer.scored) == len(expected)
        for one, other in zip(answer.scored, expected, strict=True):
            assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-5)
            assert (one.greedy, one.top) == (other.greedy, other.top)


def test_targets_of_a_network_that_gives_nan() -> None:
    broken = tiny("llama")
    broken.weight(0).data[0, 0] = float("nan")
    with pytest.raises(CheckFailed, match="NaN"):
        complete(broken, [[5]], 2, targets=[[[6]]])


@pytest.mark.parametrize("place", ["tokenizer", "generation_config"])
def test_a_row_ends_where_its_eos_comes(place: str) -> None:
    """One row stops early and takes nothing from its neighbors."""
    ending = tiny("llama")
    rows = [ending.tokenizer(prompt).input_ids for prompt in PROMPTS]
    free = [answer.ids for answer in complete(ending, rows, 6)]
    stop = free[0][2]
    if place == "tokenizer":
        ending.tokenizer.eos_token = ending.tokenizer.convert_ids_to_tokens(stop)
    else:
        ending.net.generation_config.eos_token_id = [stop, 1]
    found = [answer.ids for answer in complete(ending, rows, 6)]
    assert found[0] == free[0][: free[0].index(stop)]
    assert found == [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert max(map(len, found)) == 6


def test_all_ended_means_no_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    ending = tiny("llama")
    row = ending.tokenizer("Rome").input_ids
    ending.net.generation_config.eos_token_id = complete(ending, [row], 1)[0].ids[0]
    calls: list[int] = []
    ending.net.register_forward_pre_hook(lambda *_: calls.append(1))
    assert complete(ending, [row], 50, top=1)[0].ids == ()
    assert len(calls) == 1


def test_ask() -> None:
    found = ask(model(), PROMPTS, top=4, max_tokens=5)
    assert [answer.prompt for answer in found] == PROMPTS
    for answer in found:
        ids = model().tokenizer(answer.prompt).input_ids
        expected = complete(model(), [ids], 5)[0].ids
        assert answer.completion == model().tokenizer.decode(expected)
        assert len(answer.top) == 4
        assert answer.top[0].token == model().tokenizer.decode(expected[:1])
        chances = [token.probability for token in answer.top]
        assert chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) <= 1
    assert ask(model(), PROMPTS, top=4, max_tokens=5) == found
    assert ask(model(), []) == []
    assert ask(model(), ["Rome"], top=0, max_tokens=1)[0].top == ()


def test_spaces_at_the_end_are_left_out_and_line_ends_are_not() -> None:
    spaced, plain, lined = ask(model(), ["The city of  ", "The city of", "The city of\n"], max_tokens=4)
    assert (spaced.completion, spaced.top) == (plain.completion, plain.top)
    assert spaced.prompt == "The city of  "
    assert lined.top != plain.top


def test_a_tokenizer_that_ends_every_text_is_asked_without_that() -> None:
    ended, free = (tiny("llama", tokenizer=tokenizers.unigram(eos=eos)) for eos in (True, False))
    assert ended.tokenizer("Rome").input_ids[-1] == ended.tokenizer.eos_token_id
    assert ask(ended, PROMPTS) == ask(free, PROMPTS)


@pytest.mark.parametrize(
    "make",
    [
        tokenizers.byte_level,
        tokenizers.byte_level_split,
        tokenizers.metaspace,
        tokenizers.metaspace_normalizer,
        lambda: tokenizers.unigram(False),
    ],
)
def test_text_keeps_its_leading_space(make: Callable[[], Any]) -> None:
    tokenizer = make()
    whole = tokenizer("The Louvre is in Paris").input_ids
    head = tokenizer("The Louvre is in").input_ids
    assert whole[: len(head)] == head
    assert text_after(tokenizer, head, whole[len(head) :]) == " Paris"
    assert text_after(tokenizer, head, []) == ""


def test_half_a_character_is_no_accident() -> None:
    tokenizer = tokenizers.byte_level()
    whole = tokenizer("京🏛").input_ids
    for cut in range(1, len(whole)):
        assert isinstance(text_after(tokenizer, whole[:cut], whole[cut:]), str)


@pytest.mark.parametrize(
    ("text", "words"), [(" Paris, France.\n\nThe", "Paris, France."), ("\n\n Rome\nx", "Rome"), (" \n", ""), ("", "")]
)
def test_first_words(text: str, words: str) -> None:
    assert first_words(text) == words


def test_an_empty_prompt_needs_a_token_in_front() -> None:
    with pytest.raises(BadInput, match="Prompt 2 is empty"):
        ask(model(), ["Rome", " "])
    with_bos = tiny("llama", tokenizer=tokenizers.byte_level(bos=True))
    assert len(ask(with_bos, [""])[0].top) == 5


def test_an_answer_must_fit_behind_its_prompt() -> None:
    short = tiny("gpt2")  # 128 positions; the last token of an answer is never an input
    assert len(complete(short, [[5] * 120], 9)[0].ids) == 9
    with pytest.raises(BadInput, match="too long"):
        complete(short, [[5] * 120], 10)
    assert [len(one.ids) for one in complete(short, [[5] * 120, [5] * 3], [9, 20])] == [9, 20]

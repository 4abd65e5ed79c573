"""Bootstrap intervals: by hand where every sample can be listed, else their laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kpatch.evaluate import intervals as module
from kpatch.evaluate.intervals import interval, mean_interval, with_intervals
from kpatch.evaluate.rates import Outcome, summarize

torch.set_num_threads(1)


def efficacy(*successes: bool) -> list[Outcome]:
    return [Outcome(i, "efficacy", success, 0.25 if success else -0.5, success) for i, success in enumerate(successes)]


def test_two_facts_by_hand() -> None:
    found = with_intervals(efficacy(True, False))
    part = found["efficacy"]
    assert part["interval"] == part["accuracy_interval"] == [0.0, 1.0]
    assert part["magnitude_interval"] == [-0.5, 0.25]
    assert found["score_interval"] == [0.0, 1.0]
    assert "free_running_interval" not in part


def test_the_numbers_are_those_without_intervals() -> None:
    outcomes = [*efficacy(True, True, False), Outcome(1, "specificity", None, None, True)]
    found, expected = with_intervals(outcomes), summarize(outcomes)
    assert found["score"] == expected["score"]
    for kind in ("efficacy", "specificity"):
        assert {key: found[kind][key] for key in expected[kind]} == expected[kind]
    assert found["generalization"] is None
    assert found["specificity"]["interval"] is None


def test_the_middle_of_many_samples_is_near_the_normal_one() -> None:
    share, count = 0.7, 400
    outcomes = efficacy(*(i < share * count for i in range(count)))
    low, high = with_intervals(outcomes, samples=4000)["efficacy"]["interval"]
    half = 1.96 * math.sqrt(share * (1 - share) / count)
    assert low == pytest.approx(share - half, abs=0.008)
    assert high == pytest.approx(share + half, abs=0.008)
    values = [float(i < share * count) for i in range(count)]
    assert mean_interval(values, samples=4000) == pytest.approx([low, high], abs=0.006)


def test_facts_are_drawn_and_not_prompts() -> None:
    """Ten prompts that stand and fall together tell no more than one."""
    one = [Outcome(i, "generalization", i < 20, 0.0, True) for i in range(40)]
    ten = [outcome for outcome in one for _ in range(10)]
    same = with_intervals(one)["generalization"]["interval"]
    assert with_intervals(ten)["generalization"]["interval"] == pytest.approx(same, abs=1e-12)
    apart = [Outcome(i, "generalization", i < 200, 0.0, True) for i in range(400)]
    narrow = with_intervals(apart)["generalization"]["interval"]
    assert narrow[1] - narrow[0] < 0.5 * (same[1] - same[0])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_order_and_parts_change_nothing(facts: list[tuple[bool, bool]], random: object) -> None:
    outcomes = [
        Outcome(i, kind, success, float(success), success)
        for i, pair in enumerate(facts)
        for kind, success in zip(("efficacy", "specificity"), pair, strict=True)
    ]
    expected = with_intervals(outcomes, samples=50)
    turned = [Outcome(len(facts) - o.fact, o.kind, o.success, o.magnitude, o.accurate) for o in outcomes]
    random.shuffle(turned)  # type: ignore[attr-defined]
    assert with_intervals(turned, samples=50) == expected
    with pytest.MonkeyPatch.context() as context:
        context.setattr(module, "_AT_ONCE", 1)  # one sample a part
        parts = with_intervals(outcomes, samples=50)
    for kind in ("efficacy", "specificity"):
        low, high = expected[kind]["interval"]
        assert low <= expected[kind]["success"] <= high or expected[kind]["success"] in (0.0, 1.0)
        assert parts[kind]["interval"] is not None


def test_the_seed_decides() -> None:
    values = [0.0, 0.3, 0.9, 0.2, 0.7]
    assert mean_interval(values, seed=1) == mean_interval(values[::-1], seed=1)
    assert mean_interval(values, samples=100, seed=1) != mean_interval(values, samples=100, seed=2)


def test_one_fact_has_no_interval() -> None:
    found = with_intervals(efficacy(True))
    assert found["efficacy"]["interval"] is None
    assert found["score_interval"] is None
    assert mean_interval([0.5]) is None
    assert with_intervals([])["score_interval"] is None
    assert with_intervals(efficacy(True, False), samples=0)["efficacy"]["interval"] is None


def test_samples_without_a_number_are_left_out() -> None:
    assert interval(torch.tensor([math.nan, 1.0, 2.0, math.nan])) == pytest.approx([1.025, 1.975])
    assert interval(torch.tensor([math.nan])) is None
    # Only one of five facts has a paraphrase: some samples have none
    outcomes = [*efficacy(True, True, True, True, False), Outcome(0, "generalization", True, 0.5, True)]
    assert with_intervals(outcomes)["generalization"]["interval"] == [1.0, 1.0]


def test_a_sample_without_success_scores_nothing() -> None:
    outcomes = [*efficacy(True, False), Outcome(0, "specificity", True, 0.1, True)]
    assert with_intervals(outcomes)["score_interval"][0] == 0.0

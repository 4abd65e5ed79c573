"""Rates and batches: arithmetic without a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpatch.evaluate.forward import batches
from kpatch.evaluate.rates import KINDS, Outcome, harmonic_mean, summarize

OUTCOMES = st.lists(
    st.builds(
        Outcome,
        st.integers(0, 5),
        st.sampled_from(KINDS),
        st.none() | st.booleans(),
        st.floats(-1, 1),
        st.booleans(),
    ).map(lambda o: o if o.success is not None else Outcome(o.fact, o.kind, None, None, o.accurate)),
    max_size=12,
)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [([], None), ([0.5], 0.5), ([1.0, 0.5, 0.5], 0.6), ([1.0, 0.0, 1.0], 0.0), ([0.8, 0.8], 0.8)],
)
def test_harmonic_mean(rates: list[float], expected: float | None) -> None:
    assert harmonic_mean(rates) == (expected if expected is None else pytest.approx(expected))


def test_what_is_missing_does_not_count() -> None:
    found = summarize(
        [
            Outcome(0, "efficacy", None, None, True),
            Outcome(1, "efficacy", True, 0.5, False),
            Outcome(0, "specificity", None, None, False),
        ]
    )
    assert found["efficacy"] == {"success": 1.0, "magnitude": 0.5, "accuracy": 0.5, "n": 2, "compared": 1}
    assert found["generalization"] is None
    assert found["specificity"] == {"success": None, "magnitude": None, "accuracy": 0.0, "n": 1, "compared": 0}
    assert found["score"] == 1.0
    assert summarize([]) == {"efficacy": None, "generalization": None, "specificity": None, "score": None}


@given(OUTCOMES)
def test_rates_are_fractions_and_order_does_not_matter(outcomes: list[Outcome]) -> None:
    found = summarize(outcomes)
    turned = summarize(reversed(outcomes))
    for kind in KINDS:
        rates = found[kind]
        assert (rates is None) == (not any(o.kind == kind for o in outcomes))
        if rates is not None:
            assert 0 <= rates["accuracy"] <= 1
            assert rates["compared"] <= rates["n"]
            assert (rates["success"] is None) == (rates["compared"] == 0)
            assert rates["n"] == turned[kind]["n"]
            assert rates["success"] == turned[kind]["success"]
    assert found["score"] is None or 0 <= found["score"] <= 1


@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(1, 40)), max_size=80),
    st.integers(1, 4096),
    st.integers(1, 700),
)
def test_batches_hold_every_row_once_and_stay_bounded(
    rows: list[tuple[int, int]], batch_tokens: int, most_columns: int
) -> None:
    lengths, columns = [length for length, _ in rows], [count for _, count in rows]
    found = batches(lengths, columns, batch_tokens, most_columns)
    flat = [index for batch in found for index in batch]
    assert sorted(flat) == list(range(len(rows)))
    assert [lengths[i] for i in flat] == sorted(lengths)
    for batch in found:
        padded = len(batch) * max(lengths[i] for i in batch)
        tokens = sum(lengths[i] for i in batch)
        assert len(batch) == 1 or (padded <= batch_tokens and sum(columns[i] for i in batch) <= most_columns)
        # The row that filled the batch to 1024 tokens is the last one that may bring padding over the limit.
        before = tokens - lengths[batch[-1]]
        assert before < 1024 or tokens >= 0.8 * padded

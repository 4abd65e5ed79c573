"""Plain patches of more rows than the weight has inputs: the same sum without the equations' N × N matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kpatch.patch import joint as module
from kpatch.patch.joint import Asked, Joint
from tests.oracle import stacking as plain
from tests.oracle.test_stacking_oracle import F, chain, close, covariance, facts, patch, summed

COUNTS = (20, 9, 14, 1)  # 44 rows of 24 inputs, and a patch of nearly as many


def made(first: bool = False) -> list[Asked]:
    """Patches made apart; with `first`, every third row is about a subject that opens its text."""
    patches = [patch(f"p{number}", covariance(), facts(count, number)) for number, count in enumerate(COUNTS)]
    if not first:
        return patches
    return [
        replace(one, rows=tuple(replace(row, first=index % 3 == 0) for index, row in enumerate(one.rows)))
        for one in patches
    ]


def whole(patches: Sequence[Asked], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """The amounts, and all as one patch, from the N × N matrix."""
    with monkeypatch.context() as context:
        context.setattr(Joint, "_plain", False)
        joint = Joint(patches)
        return joint.amounts(), joint.as_one()


def test_past_f_rows_the_sum_is_still_the_joint_solution() -> None:
    own = [fact for number, count in enumerate(COUNTS) for fact in facts(count, number)]
    assert len(own) > F
    assert close(summed(made()), plain.solution(covariance(), own))


@pytest.mark.parametrize("first", [False, True])
def test_it_is_what_the_whole_matrix_gives(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = made(first)
    joint = Joint(patches)
    amounts, (left, right) = joint.amounts(), joint.as_one()
    assert not {"given", "met", "own", "_apart"} & vars(joint).keys(), "nothing is N × N"
    wanted, (wanted_left, wanted_right) = whole(patches, monkeypatch)
    assert all(close(got, want, 1e-8) for got, want in zip(amounts, wanted, strict=True))
    assert torch.equal(left, wanted_left)
    assert close(right, wanted_right, 1e-8)
    assert close(left @ right, summed(patches), 1e-8)


@pytest.mark.parametrize("kind", ["chain", "one subject", "replaced"])
def test_chains_shared_subjects_and_replaced_rows_take_the_whole_matrix(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Tensor) -> Tensor:
        raise AssertionError("these are not plain")

    patches, more = made(), {}
    if kind == "chain":
        patches = chain(covariance(), [facts(count, number) for number, count in enumerate(COUNTS)])
    elif kind == "one subject":
        row = replace(patches[1].rows[0], subject=patches[0].rows[0].subject)
        patches[1] = replace(patches[1], rows=(row, *patches[1].rows[1:]))
    else:
        more = {"replaced": {"new": {"p0": frozenset({1})}}}
    monkeypatch.setattr(module, "solved_without_blocks", fail)
    summed(patches, **more)

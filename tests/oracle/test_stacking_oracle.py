"""kpatch's sum of patches against the least squares over all their facts, with C at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kpatch.patch.joint import Asked, Joint, RowLabel
from tests.oracle import stacking as plain

D, F = 6, 24


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(weight: float = 0.2) -> Tensor:
    root = numbers(F, 3 * F, seed=0)
    return root @ root.T / (3 * F) * weight


def facts(count: int, seed: int, spread: float = 1.0) -> list[plain.Fact]:
    """Facts whose keys have a part in common, so that they meet."""
    common = numbers(F, seed=99)
    keys = common + spread * numbers(count, F, seed=seed)
    return list(zip(keys, numbers(count, D, seed=seed + 1000), strict=True))


def patch(name: str, c: Tensor, own: Sequence[plain.Fact], parents: Sequence[str] = (), start: int = 0) -> Asked:
    """A patch of these facts; `c` holds its parents' keys. Rows are about subjects of their own."""
    left, right, keys = plain.factors(c, own)
    labels = tuple(RowLabel(f"{name} {start + i}", frozenset({(f"{name} {i}", "{}")})) for i in range(len(own)))
    return Asked(name, left, right, keys, labels, frozenset(parents), frozenset((name,)))


def summed(patches: Sequence[Asked], **more: object) -> Tensor:
    joint = Joint(patches, **more)  # type: ignore[arg-type]
    whole = torch.zeros(D, F, dtype=torch.float64)
    for one, amounts in zip(joint.patches, joint.amounts(), strict=True):
        whole += amounts @ one.right.double()
    return whole


def close(got: Tensor, want: Tensor, within: float = 1e-9) -> bool:
    return bool((got - want).norm() <= within * want.norm())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=3), st.integers(0, 10**6))
def test_patches_made_apart_sum_to_the_joint_solution(counts: list[int], seed: int) -> None:
    c = covariance()
    own = [facts(count, seed + number) for number, count in enumerate(counts)]
    patches = [patch(f"p{number}", c, some) for number, some in enumerate(own)]
    want = plain.solution(c, [fact for some in own for fact in some])
    assert close(summed(patches), want)
    assert torch.equal(summed(patches), summed(patches[::-1]))


def test_the_joint_solution_holds_up_to_as_many_facts_as_the_weight_has_inputs() -> None:
    c, own = covariance(), [facts(6, number) for number in range(4)]
    assert sum(map(len, own)) == F
    patches = [patch(f"p{number}", c, some) for number, some in enumerate(own)]
    want = plain.solution(c, [fact for some in own for fact in some])
    assert close(summed(patches), want)
    alone = sum((one.left @ one.right for one in patches), torch.zeros(D, F, dtype=torch.float64))
    assert not close(alone, want, 0.5)


def test_a_stored_patch_is_exact_to_float32() -> None:
    """What files hold is float32. These keys have a leverage of 18 and meet: the plain sum is off by 87 %."""
    c, own = covariance(5.0), [facts(6, number) for number in range(3)]
    patches = [patch(f"p{number}", c, some) for number, some in enumerate(own)]
    patches = [replace(one, left=one.left.float(), right=one.right.float(), keys=one.keys.float()) for one in patches]
    assert close(summed(patches), plain.solution(c, [fact for some in own for fact in some]), 1e-6)


def test_patches_whose_keys_do_not_meet_are_added() -> None:
    c = torch.eye(F, dtype=torch.float64)
    unit = torch.eye(F, dtype=torch.float64)
    patches = [patch(name, c, [(unit[i], numbers(D, seed=i))]) for i, name in enumerate("ab")]
    assert torch.equal(summed(patches), sum(one.left @ one.right for one in patches))


def test_one_patch_is_itself_bit_for_bit() -> None:
    one = patch("p", covariance(), facts(5, 1))
    assert torch.equal(Joint([one]).amounts()[0], one.left)


def chain(c: Tensor, own: Sequence[Sequence[plain.Fact]]) -> list[Asked]:
    """Patches each made on top of those before it."""
    patches: list[Asked] = []
    below = torch.zeros(D, F, dtype=torch.float64)
    for number, some in enumerate(own):
        new = patch(f"p{number}", c, plain.on_top(below, some), [one.id for one in patches])
        below = below + new.left @ new.right
        c = plain.with_keys(c, some)
        patches.append(new)
    return patches


def test_a_chain_is_its_plain_sum_and_the_joint_solution() -> None:
    c, own = covariance(), [facts(4, number) for number in range(4)]
    patches = chain(c, own)
    assert all(torch.equal(amounts, one.left) for amounts, one in zip(Joint(patches).amounts(), patches, strict=True))
    assert close(summed(patches), plain.solution(c, [fact for some in own for fact in some]))


@pytest.mark.parametrize("on", [(), ("a",), ("a", "b")])
def test_a_mixture_of_chains_and_patches_made_apart_is_the_joint_solution(on: tuple[str, ...]) -> None:
    """c was made on none, one or both of a and b, which were made apart; d was made apart from all."""
    base, own = covariance(), {name: facts(3, number) for number, name in enumerate("abcd")}
    patches = {name: patch(name, base, own[name]) for name in "abd"}
    c_below = base
    below = torch.zeros(D, F, dtype=torch.float64)
    if on:
        held = [fact for name in on for fact in own[name]]
        below, c_below = summed([patches[name] for name in on]), plain.with_keys(base, held)
    patches["c"] = patch("c", c_below, plain.on_top(below, own["c"]), on)
    want = plain.solution(base, [fact for some in own.values() for fact in some])
    assert close(summed(list(patches.values())), want)
    assert torch.equal(summed(list(patches.values())), summed(list(patches.values())[::-1]))


@pytest.mark.parametrize("on_top", [False, True])
def test_several_as_one_patch_go_on_as_if_they_had_been_one(on_top: bool) -> None:
    base, own = covariance(), [facts(4, number) for number in range(3)]
    pair = chain(base, own[:2]) if on_top else [patch(f"p{number}", base, own[number]) for number in range(2)]
    joint = Joint(pair)
    left, right = joint.as_one()
    wanted, directions, keys = plain.factors(base, [*own[0], *own[1]])
    assert close(left, wanted)
    assert close(right, directions)
    assert close(left @ right, summed(pair))
    labels = tuple(label for one in joint.patches for label in one.rows)
    one = Asked("s", left, right, keys, labels, frozenset(), frozenset({"p0", "p1"}))
    third = patch("t", base, own[2])
    assert close(summed([one, third]), summed([*pair, third]))


@pytest.mark.parametrize("on_top", [False, True])
def test_a_replaced_fact_is_out_of_the_solution(on_top: bool) -> None:
    base, own = covariance(), [facts(4, number) for number in range(2)]
    patches = chain(base, own) if on_top else [patch(f"p{number}", base, own[number]) for number in range(2)]
    got = summed(patches, replaced={"new": {"p0": frozenset({1})}})
    assert close(got, plain.solution(base, [fact for some in own for fact in some if fact is not own[0][1]]))


@pytest.mark.parametrize("same_facts", [True, False])
@pytest.mark.parametrize("with_others", [True, False])
def test_a_fact_that_a_patch_on_top_replaces_is_out_of_the_solution(same_facts: bool, with_others: bool) -> None:
    """The patch on top holds the earlier facts about other subjects alone, and asks its own subject's key anew."""
    base, own = covariance(), facts(4, 0)
    first = patch("p0", base, own)
    (key, _), wanted = own[1], numbers(D, seed=7)
    again = (key + 0.1 * numbers(F, seed=8), wanted)
    others = [fact for number, fact in enumerate(own) if number != 1]
    more = facts(2, 3) if with_others else []
    below = plain.with_keys(base, others)
    second = patch("p1", below, plain.on_top(first.left @ first.right, [again, *more]), ["p0"])
    label = first.rows[1] if same_facts else replace(second.rows[0], subject=first.rows[1].subject)
    second = replace(second, rows=(label, *second.rows[1:]))
    got = summed([first, second], replaced={"p1": {"p0": frozenset({1})}})
    assert close(got, plain.solution(base, [*others, again, *more]))
    assert torch.equal(summed([first, second]), first.left @ first.right + second.left @ second.right)


def test_the_same_fact_in_two_patches_is_one_fact_of_twice_the_weight() -> None:
    c, own = covariance(), facts(2, 5)
    one, two = patch("a", c, own), patch("b", c, own)
    two = replace(two, rows=one.rows)
    assert close(summed([one, two]), plain.solution(c, [*own, *own]))


def test_other_facts_about_one_subject_are_added() -> None:
    c, (first, second) = covariance(), facts(2, 5, spread=0.1)
    one, two = patch("a", c, [first]), patch("b", c, [second])
    two = replace(two, rows=(replace(two.rows[0], subject=one.rows[0].subject),))
    assert close(summed([one, two]), one.left @ one.right + two.left @ two.right)


def test_factors_that_do_not_fit_are_refused() -> None:
    one = patch("a", covariance(), facts(2, 5))
    with pytest.raises(ValueError, match="do not fit"):
        Joint([replace(one, rows=one.rows[:1])])

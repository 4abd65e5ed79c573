"""Values in batches: planned within a budget, kept by what decides them, resumed, halved where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kpatch.cache import cache_dir
from kpatch.edit import problem as problem_module
from kpatch.edit import values, values_cache
from kpatch.edit.memit import Memit
from kpatch.edit.memit_paper import MemitPaper
from kpatch.edit.presets import MemitHyper, MemitPaperHyper
from kpatch.edit.problem import Values, measure_drift, prepare
from kpatch.edit.requests import MAX_FACTS_PER_SUBJECT, Group, group_facts
from kpatch.edit.values import Objective, optimize
from kpatch.edit.values_cache import column_bytes, find_values, plan
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from tests.support.models import WIDTH, tiny
from tests.support.reports import Recorder

objective_of = MemitPaper().objective
HYPER = MemitPaperHyper(layers=(1, 2), steps=3)
GOAL = objective_of(HYPER)
SUBJECTS = ("Mona Lisa", "Eiffel Tower", "Brazil", "Chicago", "Moonlight Sonata", "Colosseum")
build = cache(tiny)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def groups() -> tuple[Group, ...]:
    facts = [Fact(name, "In the {}" + " now" * i, "Paris" * (i % 3 + 1)) for i, name in enumerate(SUBJECTS)]
    return tuple(group_facts(build("llama"), facts, ("", "She said.")))


class Counted:
    """A search that counts, with an answer for each group that shows which one it was."""

    def __init__(self, before: Callable[[Sequence[Group]], None] = lambda groups: None) -> None:
        self.before = before
        self.calls: list[list[str]] = []

    def search(self, goal: Objective, model: Model, some: Sequence[Group], advance: Callable[[int], None]) -> Values:
        self.before(some)
        self.calls.append([group.subject for group in some])
        advance(len(some) * goal.steps)
        numbers = [SUBJECTS.index(group.subject) for group in some]
        z = torch.tensor(numbers)[:, None, None].expand(-1, 1, WIDTH).float()
        return Values(z, tuple(number / 8 for number in numbers), tuple(numbers))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    fake = Counted()
    monkeypatch.setattr(Objective, "search", lambda goal, *given: fake.search(goal, *given))
    return fake


def seek(goal: Objective = GOAL, budget: int = 1, model: Model | None = None, **options: object) -> Values:
    """Values of all groups, one batch a group unless the budget is larger."""
    return find_values(model or build("llama"), groups(), goal, budget=budget, **options)  # type: ignore[arg-type]


def assert_whole(values: Values) -> None:
    assert values.values[:, 0, 0].tolist() == values.values[:, 0, -1].tolist() == [0, 1, 2, 3, 4, 5]
    assert values.steps == (0, 1, 2, 3, 4, 5)
    assert values.losses == tuple(number / 8 for number in range(6))


def kept() -> list[Path]:
    return sorted(cache_dir("values").glob("*.safetensors"))


# The plan


@given(budget=st.integers(1, 3_000_000))
def test_every_group_is_in_one_batch_and_batches_keep_to_the_budget(budget: int) -> None:
    model = build("llama")
    batches = plan(model, groups(), 3, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups())))
    assert batches == plan(model, groups(), 3, budget)
    widths = [groups()[index].columns for batch in batches for index in batch]
    assert widths == sorted(widths)
    for batch in batches:
        tokens = sum(groups()[index].tokens for index in batch)
        assert len(batch) == 1 or tokens * column_bytes(model, 1, 0, 1) <= budget


def test_a_larger_budget_makes_fewer_batches() -> None:
    counts = [len(plan(build("llama"), groups(), 3, budget)) for budget in (1, 400_000, 10**9)]
    assert counts[0] == len(groups()) > counts[1] > counts[2] == 1


def test_layers_below_the_values_cost_nothing() -> None:
    assert len(plan(build("llama"), groups(), 1, 400_000)) >= len(plan(build("llama"), groups(), 3, 400_000))
    assert column_bytes(build("llama"), 5, 2, 3) == 3 * column_bytes(build("llama"), 5, 2, 1)


# What is kept


def test_a_second_call_finds_everything_kept(counted: Counted) -> None:
    told = Recorder()
    assert_whole(seek(report=told))
    assert len(counted.calls) == len(kept()) == len(groups())
    assert told.tasks["Finding values"] == (18, 18)
    told = Recorder()
    assert_whole(seek(report=told))
    assert len(counted.calls) == len(groups())
    assert told.tasks["Finding values"] == (18, 18)
    assert told.warnings == []


def test_freed_memory_goes_back_after_every_batch_that_was_found(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    monkeypatch.setattr(values_cache, "give_back", lambda: batches.append(len(counted.calls)))
    seek()
    seek()
    assert batches == [1, 2, 3, 4, 5, 6]


def test_kept_values_are_those_that_were_found() -> None:
    model = build("llama")
    first = seek(budget=10**9)
    plain = optimize(model, groups(), GOAL)
    again = seek(budget=10**9)
    order = plan(model, groups(), 3)[0]
    assert torch.equal(first.values, again.values)
    assert (first.losses, first.steps) == (again.losses, again.steps)
    torch.testing.assert_close(first.values, plain.values, rtol=1e-4, atol=1e-4)
    assert first.losses == pytest.approx(plain.losses, rel=1e-4)
    assert order != list(range(len(groups()))), "the order of the batch is not that of the facts"


def test_nothing_is_kept_or_used_where_it_is_not_wanted(counted: Counted) -> None:
    seek(keep=False)
    assert kept() == []
    seek()
    seek(resume=False)
    assert len(counted.calls) == 3 * len(groups())


@pytest.mark.parametrize("harm", ["cut", "garbage", "gone", "nan", "shape"])
def test_a_damaged_file_is_found_again(harm: str, counted: Counted) -> None:
    from safetensors.torch import load_file, save_file

    seek()
    victim = kept()[2]
    if harm == "cut":
        victim.write_bytes(victim.read_bytes()[:-40])
    elif harm == "garbage":
        victim.write_bytes(b"\xff" * 100)
    elif harm == "gone":
        victim.unlink()
    else:
        tensors = load_file(victim)
        found = tensors["values"]
        tensors["values"] = found * float("nan") if harm == "nan" else found[..., 1:].contiguous()
        save_file(tensors, victim)
    assert_whole(seek())
    assert len(counted.calls) == len(groups()) + 1
    assert_whole(seek())
    assert len(counted.calls) == len(groups()) + 1


def test_an_interruption_keeps_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def interrupt(some: Sequence[Group]) -> None:
        seen.append(some[0].subject)
        if len(seen) == 3:
            raise KeyboardInterrupt

    fake = Counted(interrupt)
    monkeypatch.setattr(Objective, "search", lambda goal, *given: fake.search(goal, *given))
    with pytest.raises(KeyboardInterrupt):
        seek()
    assert len(kept()) == len(fake.calls) == 2
    assert_whole(seek())
    assert len(fake.calls) == len(groups())
    assert [path for path in cache_dir("values").iterdir() if path.suffix != ".safetensors"] == []


@pytest.mark.parametrize(
    "same",
    [
        {"covariance_weight": 7.0},
        {"first_leverage": 1.0},
        {"first_layer": 1},
        {"layers": (0, 2)},
        {"layers": (2,)},
        {"prefixes": 9},
        {"prefix_tokens": 2},
        {"lead_ins": 1},
    ],
)
def test_what_decides_no_value_does_not_find_again(same: dict[str, object], counted: Counted) -> None:
    seek()
    seek(objective_of(replace(HYPER, **same)))  # type: ignore[arg-type]
    assert len(counted.calls) == len(groups())


@pytest.mark.parametrize(
    "other",
    [
        *({"clamp": 0.5}, {"layer": 1}, {"steps": 4}, {"learning_rate": 0.1}, {"stop_loss": 0.2}),
        *({"kl": 0.0}, {"weight_decay": 0.1}),
    ],
)
def test_what_decides_a_value_finds_again(other: dict[str, object], counted: Counted) -> None:
    seek()
    seek(replace(GOAL, **other))  # type: ignore[arg-type]
    assert len(counted.calls) == 2 * len(groups())


def test_other_weights_and_other_company_find_again(counted: Counted) -> None:
    seek()
    seek(model=tiny("llama", seed=1))
    assert len(counted.calls) == 2 * len(groups())
    seek(budget=10**9)
    assert len(counted.calls) == 2 * len(groups()) + 1


# Too much of it


def test_a_device_short_of_memory_gets_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(some: Sequence[Group]) -> None:
        if len(some) > 3:
            raise torch.OutOfMemoryError("too large")

    fake = Counted(refuse)
    monkeypatch.setattr(Objective, "search", lambda goal, *given: fake.search(goal, *given))
    told = Recorder()
    assert_whole(seek(budget=10**9, report=told))
    assert [len(call) for call in fake.calls] == [3, 3]
    assert len(told.warnings) == 1
    assert "6 facts together" in told.warnings[0]
    assert told.tasks["Finding values"] == (18, 18)
    assert_whole(seek(budget=10**9))
    assert len(fake.calls) == 2


def test_one_fact_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(some: Sequence[Group]) -> None:
        raise torch.OutOfMemoryError("too large")

    fake = Counted(refuse)
    monkeypatch.setattr(Objective, "search", lambda goal, *given: fake.search(goal, *given))
    with pytest.raises(BadInput, match="does not fit in this device's memory") as error:
        seek(budget=10**9)
    assert any(name in error.value.message for name in SUBJECTS)


def test_more_facts_on_a_subject_than_a_value_can_carry() -> None:
    facts = [Fact("Mona Lisa", f"In {i} the {{}}", "Rome", where=f"a.yaml:{i}:1") for i in range(101)]
    assert len(group_facts(build("llama"), facts[:MAX_FACTS_PER_SUBJECT], ("",))) == 1
    facts[7] = replace(facts[7], subject="Mona  Lisa")  # the same subject to a reader
    with pytest.raises(BadInput, match="101 facts about 'Mona Lisa'") as error:
        group_facts(build("llama"), facts, ("",))
    assert error.value.where == "a.yaml:0:1"
    assert list(error.value.details) == ["expected at most 100 facts for one subject"]


def test_no_gradient_is_summed_in_an_order_left_to_chance() -> None:
    """Indexing with repeated indices is differentiated by all threads at once; two equal runs then differ."""
    model = build("llama")
    some = groups()
    problem = prepare(model, some, 2)
    measure_drift(model, problem, 2)
    h = problem.first.hidden[problem.bare, 0].float()
    assert len(problem.first.owner) > len(some)  # rows share δ, so there is something to be summed
    delta = torch.zeros_like(h).requires_grad_()
    loss = values._losses(model, problem, delta, h, GOAL).sum()
    nodes, seen = [loss.grad_fn], set()
    indexed = 0
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        if node.name() == "IndexBackward0":
            indexed += 1
            places = torch.stack([index for index in node._saved_indices if index is not None], 1)
            assert len(places.unique(dim=0)) == len(places)
    assert indexed


# Rows that run apart


def long_and_short() -> list[Group]:
    """Six groups, each with a row far longer than its others."""
    facts = [Fact(name, "In the {}", "Paris", id=str(i)) for i, name in enumerate(SUBJECTS)]
    more = [Fact(name, "In the {} of all the places that there are in the world", "Rome") for name in SUBJECTS]
    return group_facts(build("llama"), [*facts, *more], ("", "She said."))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_long_rows_run_apart_and_nothing_else_changes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = build(family), long_and_short()
    found, padded = {}, []
    for share, parts in ((0.0, 1), (0.85, 2)):
        monkeypatch.setattr(problem_module, "_WORTH_IT", share)
        problem = prepare(model, some, 1)
        assert len(problem.parts) == parts
        padded.append(sum(rows.real.numel() for rows in problem.parts))
        measure_drift(model, problem, 1)
        h = problem.first.hidden[problem.bare, 0].float()
        for keep in (torch.arange(len(some)), torch.tensor([1, 4])):
            delta = (0.1 * h[keep]).requires_grad_()
            loss = values._losses(model, problem.select(keep), delta, h[keep], GOAL)
            (grad,) = torch.autograd.grad(loss.sum(), delta)
            found[parts, len(keep)] = h[keep], loss.detach(), grad
        goals = [GOAL, Memit().objective(MemitHyper(layers=(1, 2), steps=4))]
        found[parts, 0] = tuple(goal.search(model, some, lambda amount: None).values for goal in goals)
    assert padded[1] < 0.85 * padded[0]
    for count in (len(some), 2, 0):
        for one, other in zip(found[1, count], found[2, count], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4 * float(other.abs().max()))


def test_rows_behind_a_long_text_run_apart_too() -> None:
    """A chat template is many columns before a subject with few behind it."""
    facts = [Fact(name, "In the {}", "Paris", id=str(i)) for i, name in enumerate(SUBJECTS)]
    model, template = build("llama"), "Of all the places that there are in the world I say this. " * 8
    some = group_facts(model, facts, ("", "She said.", "So.", template))
    parts = prepare(model, some, 1).parts
    assert [len(rows.owner) for rows in parts] == [len(facts) * 4, len(facts)]  # with a drift row each in the first
    first, last = (rows.calls.arguments[2][1]["past_key_values"].get_seq_length() for rows in parts)
    assert first < last / 5


def test_rows_of_one_length_run_together() -> None:
    facts = [Fact(name, "In the {}", "Paris", id=str(i)) for i, name in enumerate(SUBJECTS)]
    assert len(prepare(build("llama"), group_facts(build("llama"), facts, ("",)), 1).parts) == 1

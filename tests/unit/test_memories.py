"""Memories against brute force on tiny random models: coefficients, triggers, values, predictions, removals."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.memories.layer_memories import LayerMemories
from kpatch.memories.predictions import KINDS, active_signs, effective_share, kinds_of, predicted_by_one
from kpatch.memories.removal import Prefix, without_tokens
from kpatch.memories.run import ROW, TRIGGERS, Memories, find_memories
from kpatch.memories.stream import sample_places
from kpatch.memories.summary import Summary
from kpatch.memories.triggers import Triggers
from kpatch.memories.units import Unit, parse_units, sample_units
from kpatch.memories.values import all_promoted, is_odd, promoted_logits, ranks_of, unit_values
from kpatch.memories.words import ending, listed, shown
from kpatch.models.model import Model
from kpatch.stats.corpus import row_start
from tests.support.families import Full, build, plain, slow_beyond
from tests.support.models import MLP_WIDTH, tiny
from tests.support.reports import Recorder
from tests.support.tokenizers import TEXT, metaspace

# Plain and gated, W stored [in, out], side by side with attention, norms behind the MLP, a scale, a gate
QUICK = ("gpt2", "llama", "olmo2", "qwen2_moe")
FAMILIES = slow_beyond(QUICK, (*QUICK, "opt", "gpt_neox", "gemma3_text", "gemma4_text", "granite", "llama4", "lfm2"))
TOKENS, INPUTS = 2 * ROW + 40, 25


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text(TEXT * 4, encoding="utf-8")
    return str(path)


_found: dict[str, Memories] = {}


def found_in(family: str, corpus: str) -> Memories:
    if family not in _found:
        _found[family] = find_memories(
            build(family), corpus=corpus, tokens=TOKENS, inputs=INPUTS, sample=3, use_cache=False
        )
    return _found[family]


@cache
def rows(family: str, ids: tuple[int, ...]) -> list[tuple[int, Full]]:
    """Each row of the text run by the network itself, with the place where it begins."""
    return [(at, plain(build(family), list(ids[at : at + ROW]))) for at in range(0, len(ids), ROW)]


def every_prefix(family: str, found: Memories, layer: int) -> tuple[Tensor, list[int]]:
    """Keys [N, f] of all prefixes that count, and the place of each one's last token."""
    keys, places = [], []
    for at, row in rows(family, tuple(found.ids.tolist())):
        count = len(row.keys[layer])
        keys.append(row.keys[layer][1 : count - 1])
        places += range(at + 1, at + count - 1)
    return torch.cat(keys), places


@pytest.mark.parametrize("family", FAMILIES)
def test_triggers_are_the_largest_coefficients_of_all_prefixes(family: str, corpus: str) -> None:
    found = found_in(family, corpus)
    for layer, one in found.layers.items():
        keys, places = every_prefix(family, found, layer)
        for side, sign in enumerate((1, -1)):
            want = (sign * keys).clamp(min=0).topk(TRIGGERS, dim=0).values.T  # (f, T)
            torch.testing.assert_close(one.strengths[side], want, rtol=1e-4, atol=1e-4)
            there = one.places[side] >= 0
            assert torch.equal(there, one.strengths[side] > 0)
            row_of = {place: row for row, place in enumerate(places)}
            for unit in (0, 5, one.width - 1):
                for place, strength in zip(one.places[side, unit], one.strengths[side, unit], strict=True):
                    if int(place) >= 0:
                        coefficient = keys[row_of[int(place)], unit]
                        assert math.isclose(sign * float(coefficient), float(strength), rel_tol=1e-3, abs_tol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_coefficient_without_the_last_token_is_that_of_the_shorter_prefix(family: str, corpus: str) -> None:
    found = found_in(family, corpus)
    one = found.layers[max(found.layers)]
    for at, row in rows(family, tuple(found.ids.tolist())):
        keys = row.keys[one.layer]
        mine = (one.places[0, :, 0] >= at) & (one.places[0, :, 0] < at + len(keys))
        for unit in mine.nonzero().flatten().tolist()[:10]:
            place = int(one.places[0, unit, 0]) - at
            assert float(one.before[0, unit, 0]) == pytest.approx(float(keys[place - 1, unit]), abs=1e-4)


def promoted_by_hand(model: Model, layer: int, vector: Tensor) -> Tensor:
    """Logits of a vector that W^l puts out: the network run with the residual stream replaced at its very end."""
    direction = vector / vector.square().mean().sqrt()
    if model.family.post_norm:
        direction = model.mlp_out(layer)(direction)
    handle = model.layer(model.n_layers - 1).register_forward_hook(
        lambda module, inputs, out: (
            (direction.expand_as(out[0]), *out[1:]) if isinstance(out, tuple) else direction.expand_as(out)
        )
    )
    try:
        with torch.no_grad():
            return model.net(input_ids=torch.tensor([[7]]), use_cache=False).logits[0, 0]
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_values_promote_what_the_network_makes_of_them_alone(family: str, corpus: str) -> None:
    model, found = build(family), found_in(family, corpus)
    layer = max(found.layers)
    one = found.layers[layer]
    weight = model.weight(layer)
    for unit in (0, 3, one.width - 1):
        column = weight[unit] if model.stores_transposed else weight[:, unit]
        torch.testing.assert_close(unit_values(model, layer, torch.tensor([unit]))[0], column)
        for side, sign in enumerate((1, -1)):
            logits = promoted_by_hand(model, layer, sign * column)
            torch.testing.assert_close(promoted_logits(model, layer, sign * column[None])[0], logits)
            assert int(one.promoted[side, unit]) == int(logits.argmax())
            assert float(one.chances[side, unit]) == pytest.approx(float(logits.softmax(-1).max()), rel=1e-3)


def test_an_odd_head_is_known_from_one_with_biases() -> None:
    assert is_odd(build("llama"), 1)
    assert not is_odd(build("gpt2"), 1)
    assert len(set(all_promoted(build("llama"), 1).tokens.flatten().tolist())) > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_those_of_the_parts_of_each_layer(family: str, corpus: str) -> None:
    model, found = build(family), found_in(family, corpus)
    whole = rows(family, tuple(found.ids.tolist()))
    spots = [
        (next(row for at, row in whole if at <= place < at + ROW), place % ROW)
        for place in sample_places(TOKENS, ROW, INPUTS, 0).tolist()
    ]
    final = torch.stack([row.logits[here].argmax() for row, here in spots])
    # Some first choices are decided by rounding: few
    allowed = 0.04 * INPUTS
    for layer, one in found.layers.items():
        scale = 1.0 if model.gated(layer) else model.residual_scale(layer)
        left = torch.stack([row.states[layer + 1][here] for row, here in spots])
        added = scale * torch.stack([row.mlp[layer][here] for row, here in spots])
        with torch.no_grad():
            logits = model.logits(torch.stack([left - added, added, left]))
        tops = logits.argmax(-1)
        for name, want in zip(("residual_top", "layer_top", "out_top", "final_top"), (*tops, final), strict=True):
            assert int((getattr(one, name) != want).sum()) <= allowed, name
        chances = logits[0].softmax(-1).gather(1, final[:, None])[:, 0]
        torch.testing.assert_close(one.final_chance, chances, rtol=0.02, atol=1e-4)
        different = 0
        for number, (row, here) in enumerate(spots):
            key = row.keys[layer][here].tolist()
            least = 0.1 * (sum(m * m for m in key) / len(key)) ** 0.5
            active = [unit for unit, m in enumerate(key) if abs(m) > least]
            said = {int(one.promoted[0 if key[unit] > 0 else 1, unit]) for unit in active}
            different += bool(one.alone[number]) != (int(tops[1][number]) in said)
            assert float(one.active[number]) == pytest.approx(len(active) / len(key), abs=2.1 / len(key))
            assert float(one.positive[number]) == pytest.approx(sum(m > 0 for m in key) / len(key), abs=2.1 / len(key))
        assert different <= allowed


def test_figures_of_a_layer_by_hand(corpus: str) -> None:
    found = found_in("llama", corpus)
    summary = Summary(found)
    for one, figures in zip(found.layers.values(), summary.layers, strict=True):
        agreed, tops, follows, shares = 0, [], [], []
        for unit in range(one.width):
            side = int(one.strengths[1, unit, 0] > one.strengths[0, unit, 0])
            follow = int(found.ids[int(one.places[side, unit, 0]) + 1])
            top = int(one.promoted[side, unit])
            agreed += follow == top
            tops.append(top)
            follows.append(follow)
            last = [int(found.ids[place]) for place in one.places[side, unit].tolist() if place >= 0]
            shares.append(max(map(last.count, last)) / len(last))
        assert figures.agreement == pytest.approx(agreed / one.width)
        assert figures.chance == pytest.approx(sum(a == b for a in tops for b in follows) / one.width**2)
        assert figures.same_last == pytest.approx(sum(shares) / one.width)
        assert figures.composed == pytest.approx(1 - float(one.alone.float().mean()))
        assert sum(figures.kinds.values()) == pytest.approx(1)
    rates = [share * count for _, _, count, share in summary.by_probability if share is not None]
    assert sum(rates) == pytest.approx(sum(one.agreement for one in summary.layers) * MLP_WIDTH)
    assert summary.certain[0] <= summary.certain[1] == 100


def test_ranks_are_looked_up_in_what_the_stronger_side_promotes(corpus: str) -> None:
    model, found = build("llama"), found_in("llama", corpus)
    one = found.layers[2]
    assert one.rank_units.tolist() == list(range(MLP_WIDTH))
    for unit, rank in zip(one.rank_units.tolist(), one.ranks.tolist(), strict=True):
        side = int(one.strengths[1, unit, 0] > one.strengths[0, unit, 0])
        logits = promoted_by_hand(model, 2, (1 - 2 * side) * model.weight(2)[:, unit])
        follow = int(found.ids[int(one.places[side, unit, 0]) + 1])
        assert abs(rank - 1 - int((logits > logits[follow]).sum())) <= 1  # two logits may be equal to rounding


def test_a_relu_has_one_side(corpus: str) -> None:
    found = found_in("opt", corpus)
    assert all(not one.strengths[1].any() for one in found.layers.values())
    assert all(side.sign == 1 for unit in found.units for side in unit.sides)
    assert Summary(found).layers[0].by_sign[1] is None


# Removing tokens


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("bos", [False, True])
def test_removing_tokens_runs_the_shorter_prefix(family: str, bos: bool) -> None:
    model = tiny(family, tokenizer=metaspace()) if bos else build(family)
    start = row_start(model)
    assert bool(start) == bos
    prefixes = [Prefix(4, (11, 12, 13, 14, 15)), Prefix(9, (21, 22)), Prefix(9, (31,))]
    found = without_tokens(model, 2, prefixes, start, seed=0)

    def coefficient(ids: tuple[int, ...], unit: int) -> float:
        return float(plain(model, [*start, *ids]).keys[2][-1, unit])

    for prefix, one in zip(prefixes, found, strict=True):
        assert one.whole == pytest.approx(coefficient(prefix.ids, prefix.unit), abs=1e-4)
        if len(prefix.ids) > 1:
            assert one.first == pytest.approx(coefficient(prefix.ids[1:], prefix.unit), abs=1e-4)
            assert one.last == pytest.approx(coefficient(prefix.ids[:-1], prefix.unit), abs=1e-4)
            assert one.change("last") == pytest.approx(one.last / one.whole - 1)
        else:
            assert (one.first, one.last) == (None, None)
            assert one.change("first") is None
    others = [coefficient(prefixes[0].ids[:at] + prefixes[0].ids[at + 1 :], 4) for at in (1, 2, 3)]
    assert any(found[0].other == pytest.approx(one, abs=1e-4) for one in others)
    assert found[1].other is None


# The parts by themselves


def test_triggers_do_not_depend_on_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(12, 10, 7, generator=generator).round(decimals=1)  # with many ties
    whole, parts = Triggers(7, 5), Triggers(7, 5)
    whole.add(keys, 0)
    for first in range(0, 12, 2):
        parts.add(keys[first : first + 2], first * 10)
        parts.settle()
    whole.settle()
    for name in ("strengths", "places", "before"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    inner = keys[:, 1:-1]
    for unit in range(7):
        ordered = sorted(
            (-float(inner[row, column, unit]), 10 * row + column + 1) for row in range(12) for column in range(8)
        )
        assert whole.places[0, unit].tolist() == [place for _, place in ordered[:5]]


def test_few_prefixes_leave_places_empty() -> None:
    one = Triggers(2, 4)
    one.add(torch.tensor([[[9.0, 9.0], [1.0, -2.0], [3.0, 0.0], [9.0, 9.0]], [[0.0, 0.0]] * 4]), 100)
    one.add(torch.ones(1, 2, 2), 0)  # a row of two tokens has no prefix that something follows
    one.settle()
    assert one.places.tolist() == [[[102, 101, -1, -1], [-1] * 4], [[-1] * 4, [101, -1, -1, -1]]]
    assert one.strengths[1, 1].tolist() == [2.0, 0.0, 0.0, 0.0]
    assert one.before[0, 0].tolist() == [1.0, 9.0, 0.0, 0.0]


def test_shares_and_kinds_on_numbers_known_beforehand() -> None:
    keys = torch.tensor([[1.0, -1.0, 0.01, 0.0], [2.0, 0.0, 0.0, 0.0]])
    assert active_signs(keys).tolist() == [[1, -1, 0, 0], [1, 0, 0, 0]]
    assert effective_share(torch.tensor([[1.0, -1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0]])).tolist() == [1.0, 0.25]
    assert effective_share(torch.zeros(1, 4)).tolist() == [0.0]
    promoted = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    tops = torch.tensor([10, 10])
    assert predicted_by_one(active_signs(keys), promoted, tops).tolist() == [True, False]
    kinds = kinds_of(torch.tensor([1, 1, 1, 1]), torch.tensor([2, 1, 2, 2]), torch.tensor([1, 1, 2, 3]))
    assert [KINDS[kind] for kind in kinds.tolist()] == ["residual", "agreement", "ffn", "composition"]
    assert ranks_of(torch.tensor([[0.1, 0.5, 0.3]]), torch.tensor([2])).tolist() == [2]


def test_inputs_are_drawn_from_inside_the_rows() -> None:
    places = sample_places(25, 10, 100, 0)
    assert places.tolist() == [*range(1, 9), *range(11, 19), 21, 22, 23]
    assert sample_places(25, 10, 5, 1).tolist() == sample_places(25, 10, 5, 1).tolist()
    assert sample_places(25, 10, 5, 1).tolist() != sample_places(25, 10, 5, 2).tolist()


def test_units_by_name_and_by_sample() -> None:
    assert parse_units(["3.7", " 1.2", "3.7"]) == [Unit(1, 2), Unit(3, 7)]
    assert str(Unit(3, 7)) == "3.7"
    drawn = sample_units({0: 64, 2: 3}, 5, 0)
    assert [unit.layer for unit in drawn] == [0] * 5 + [2] * 3
    assert sample_units({2: 3}, 5, 0) == drawn[5:]
    assert sample_units({0: 64}, 5, 1) != drawn[:5]


@pytest.mark.parametrize("name", ["12", "a.b", "1.-2", "1.2.3", "", "1.", "².3"])
def test_what_is_no_unit(name: str) -> None:
    with pytest.raises(BadInput, match="names no unit"):
        parse_units([name])


def test_tokens_as_people_read_them() -> None:
    assert [shown(" the"), shown("\n"), shown("  "), shown("")] == ["the", "⏎", "␣␣", "∅"]
    assert [ending("a\nb", 9), ending("abcdef", 4)] == ["a⏎b", "…def"]
    assert listed([(" a", 0.1), ("b", 0.2), ("c", 0.3)], 2) == "a · b"


# The whole


def test_a_second_run_is_read_from_the_cache(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"corpus": corpus, "tokens": 300, "inputs": 9, "sample": 1}
    first = find_memories(build("llama"), layers=[1, 3], **options)
    report = Recorder()
    again = find_memories(build("llama"), layers=[3], report=report, **options)
    assert any("from the cache" in note for note in report.notes)
    same(first.layers[3], again.layers[3])
    assert again.units == tuple(unit for unit in first.units if unit.unit.layer == 3)
    other = find_memories(build("llama"), layers=[3], report=(fresh := Recorder()), **{**options, "inputs": 8})
    assert not any("from the cache" in note for note in fresh.notes)
    assert len(other.layers[3].active) == 8


def same(one: LayerMemories, other: LayerMemories) -> None:
    for name, tensor in one.to_tensors().items():
        assert torch.equal(tensor, other.to_tensors()[name]), name


def test_a_damaged_file_is_made_again(corpus: str) -> None:
    from kpatch.cache import cache_root

    options: dict[str, Any] = {"corpus": corpus, "tokens": 300, "inputs": 9, "sample": 0, "layers": [1]}
    first = find_memories(build("llama"), **options)
    (path,) = cache_root().rglob("memories-1-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    again = find_memories(build("llama"), report=(report := Recorder()), **options)
    assert any("is damaged" in warning for warning in report.warnings)
    same(first.layers[1], again.layers[1])


def test_the_models_own_text_is_shared_with_the_covariance(tmp_path: Path) -> None:
    from kpatch.cache import cache_root
    from kpatch.stats.covariance import collect

    model = tiny("llama", max_position_embeddings=32)
    collect(model, [0], tokens=200)
    texts = {path: path.stat().st_mtime_ns for path in cache_root().rglob("text-*.safetensors")}
    found = find_memories(model, tokens=200, inputs=5, sample=1)
    assert (found.corpus, found.row, found.tokens) == ("self", 32, 200)
    assert {path: path.stat().st_mtime_ns for path in cache_root().rglob("text-*.safetensors")} == texts
    assert all(path.parent == next(iter(texts)).parent for path in cache_root().rglob("memories-*.safetensors"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"units": ["9.1"]}, "no unit 9.1"),
        ({"units": ["1.64"]}, "no unit 1.64"),
        ({"layers": [4]}, "no layer 4"),
        ({"tokens": 2}, "Memories need more tokens"),
        ({"tokens": 10**6}, "less text than asked for"),
        ({"sample": -1}, "`sample=-1`"),
        ({"inputs": 0}, "`inputs=0`"),
        ({"removals": -1}, "`removals=-1`"),
        ({"corpus": "nowhere.txt"}, "not found"),
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any], said: str, corpus: str) -> None:
    with pytest.raises(BadInput, match=said):
        find_memories(build("llama"), **{"corpus": corpus, **options})


def test_layers_without_a_matrix_of_their_own_are_left_out(corpus: str) -> None:
    found = find_memories(tiny("qwen3_moe"), corpus=corpus, tokens=200, inputs=5, sample=1, removals=0)
    assert list(found.layers) == [1, 2]


def test_coefficients_that_are_not_finite(corpus: str) -> None:
    broken = tiny("llama", seed=3)
    broken.layer(1).get_submodule("mlp.up_proj").weight.data[0, 0] = torch.inf
    with pytest.raises(BadInput, match=r"layer 1 of .* not finite"):
        find_memories(broken, corpus=corpus, tokens=200, use_cache=False)

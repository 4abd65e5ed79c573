"""One behaviour contract for every family: what the module names and the partial runs promise.

The reference is always the network's own forward on a single row without padding, cache or mask. A plain `pytest`
takes every family through the modules and a batch of ragged rows, and some through all the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kpatch.errors import BadInput
from kpatch.models.families import FAMILIES, family_for
from kpatch.models.model import Model, wrap
from kpatch.models.partial_forward import Calls, align, captured_inputs, record, record_suffix, run_to
from tests.support.families import (
    CASES,
    EVERY_KIND,
    GATED,
    RAGGED,
    REPRESENTATIVE,
    ROUTED,
    SHARED,
    VARIED,
    batch_of,
    build,
    check,
    full,
    plain,
    rows_of,
    slow_beyond,
    stored_product,
)
from tests.support.models import CONFIGS, EXPERT_WIDTH, LAYERS, MLP_WIDTH, WIDTH, tiny, tiny_net

pytestmark = pytest.mark.usefixtures("one_thread")

SLOW = [pytest.mark.slow]


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> Model:
    return build(request.param)


# All families in `make test`, a few in a plain `pytest`
one_of_each_kind = pytest.mark.parametrize("model", slow_beyond(EVERY_KIND, CASES), indirect=True)
some_families = pytest.mark.parametrize("model", slow_beyond(REPRESENTATIVE, CASES), indirect=True)

POST_NORM = {"gemma2", "gemma3_text", "gemma4_text", "olmo2", "olmo3", "exaone4", "glm4"}
SCALES = {"granite": 0.22, "minicpm3": 1.4 / LAYERS**0.5, "gemma4_text": 0.6}

# The modules


def test_every_family_has_a_tiny_model() -> None:
    assert set(CONFIGS) == set(FAMILIES)


def test_sizes_and_names(model: Model) -> None:
    family = model.family.model_type
    wide = family in {"bloom", "mpt"}  # they have no setting for it: f = 4 d
    shared = SHARED.get(family, set())
    assert (model.width, model.n_layers) == (WIDTH, LAYERS)
    assert set(model.editable) == set(range(LAYERS)) - ROUTED.get(family, set())
    stored = dict(model.net.named_parameters())
    for layer in model.editable:
        assert stored[model.weight_name(layer)] is model.weight(layer)
        f = 4 * WIDTH if wide else EXPERT_WIDTH if layer in shared and family != "hunyuan_v1_moe" else MLP_WIDTH
        assert tuple(model.weight(layer).shape) == ((f, WIDTH) if model.stores_transposed else (WIDTH, f))
        assert model.key_width(layer) == f
    assert model.mlp_width == max(map(model.key_width, model.editable))
    assert model.stores_transposed == (model.family.model_type == "gpt2")
    assert not any(weight.requires_grad for weight in model.net.parameters())


@one_of_each_kind
@torch.no_grad()
def test_the_key_times_the_stored_weight_is_the_projections_output(model: Model) -> None:
    run = plain(model, rows_of([(9, 3)], len(model.tokenizer))[0])
    assert set(run.keys) == set(model.editable)
    for layer in model.editable:
        assert run.keys[layer].shape == (12, model.key_width(layer))
        check(stored_product(model, run.keys[layer], layer), run.down[layer])


@one_of_each_kind
@torch.no_grad()
def test_the_residual_stream_is_the_sum_of_its_parts(model: Model) -> None:
    run = plain(model, rows_of([(9, 3)], len(model.tokenizer))[0])
    for layer in range(LAYERS):
        attn, mlp = run.attn[layer], run.mlp[layer]
        scale = SCALES.get(model.family.model_type, 1.0)
        before = run.states[layer] * (scale if model.family.model_type == "gemma4_text" else 1)  # scales it all
        check(before + scale * (attn + mlp), run.states[layer + 1])
        assert attn.norm() > 0.1
        assert mlp.norm() > 0.1


@one_of_each_kind
@torch.no_grad()
def test_only_post_norm_families_norm_what_the_projection_wrote(model: Model) -> None:
    run = plain(model, rows_of([(9, 3)], len(model.tokenizer))[0])
    dense = [layer for layer in model.editable if layer not in SHARED.get(model.family.model_type, ())]
    same = all(torch.equal(run.down[layer], run.mlp[layer]) for layer in dense)
    assert same is not model.family.post_norm
    assert model.family.post_norm == (model.family.model_type in POST_NORM)


@one_of_each_kind
def test_what_the_layer_multiplies_the_mlps_output_by(model: Model) -> None:
    want = SCALES.get(model.family.model_type, 1.0)
    for layer in model.editable:
        assert model.gated(layer) == (layer in GATED.get(model.family.model_type, set()))
        if model.gated(layer):
            with pytest.raises(BadInput, match="a gate, by another number for each token"):
                model.residual_scale(layer)
            continue
        assert model.residual_scale(layer) == pytest.approx(want, rel=1e-6)
        assert want != 1.0 or model.residual_scale(layer) == 1.0  # exactly, so that nothing is changed by it


@one_of_each_kind
@torch.no_grad()
def test_logits_are_the_networks_own(model: Model) -> None:
    run = plain(model, rows_of([(9, 3)], len(model.tokenizer))[0])
    check(model.logits(run.states[-1]), run.logits)
    check(model.logits(run.states[-1][None, -2:]), run.logits[None, -2:])
    assert run.logits.std() > 0.3


# Partial runs


@torch.no_grad()
def test_a_run_over_all_layers_is_the_full_forward(model: Model) -> None:
    rows, batch = batch_of(model, RAGGED)
    calls = record(model, batch)
    assert calls.start.shape == (*batch.ids.shape, WIDTH)
    out = calls.run(calls.start, 0, LAYERS)
    assert torch.isfinite(out).all()
    for index, ((before, after), row) in enumerate(zip(RAGGED, rows, strict=True)):
        real = slice(batch.column - before, batch.column + after)
        run = plain(model, row)
        check(calls.start[index, real], run.states[0])
        check(out[index, real], run.states[-1])
        check(model.logits(out[index, real]), run.logits)


@some_families
@torch.no_grad()
def test_two_halves_make_the_whole(model: Model) -> None:
    _, batch = batch_of(model, RAGGED)
    calls = record(model, batch)
    whole = calls.run(calls.start, 0, LAYERS)
    for cut in range(LAYERS + 1):
        lower = calls.run(calls.start, 0, cut)
        assert torch.equal(calls.run(lower, cut, LAYERS), whole)
    assert torch.equal(calls.run(calls.start, 0, LAYERS), whole)  # nothing is left behind by a run


SHAPES: dict[str, list[tuple[int, int]]] = {
    "ragged": RAGGED,
    "one-row": [(9, 4)],
    "one-row-one-column": [(9, 1)],
    "one-column": [(9, 1), (2, 1), (0, 1)],
    "no-prefix-at-all": [(0, 4), (0, 9), (0, 1)],
    "no-padding": [(8, 3), (8, 3)],
    "as-many-rows-as-columns": [(3, 4), (0, 2), (2, 4), (1, 1)],
    "as-many-rows-as-prefix": [(4, 3), (0, 2), (2, 3), (1, 1)],
    "as-many-rows-as-all-columns": [(2, 4), (0, 2), (1, 4), (2, 1), (0, 4), (1, 3)],
}

TRICKY = ("ragged", "one-row-one-column", "no-prefix-at-all", "as-many-rows-as-columns", "as-many-rows-as-all-columns")


def every_shape(*quick: str) -> pytest.MarkDecorator:
    """Every family with every shape; a plain `pytest` runs `quick` on all kinds, TRICKY on VARIED, Llama with all."""

    def marks(case: str, name: str) -> Any:
        some = name in quick and case in EVERY_KIND
        return [] if case == "llama" or some or (case in VARIED and name in TRICKY) else SLOW

    pairs = [(case, name) for case in CASES for name in SHAPES]
    params = [pytest.param(case, SHAPES[name], id=f"{case}-{name}", marks=marks(case, name)) for case, name in pairs]
    return pytest.mark.parametrize(("case", "shape"), params)


@every_shape("ragged")
@torch.no_grad()
def test_a_suffix_on_a_cached_prefix_is_the_full_forward(case: str, shape: list[tuple[int, int]]) -> None:
    suffix_is_the_full_forward(build(case), shape)


def suffix_is_the_full_forward(model: Model, shape: list[tuple[int, int]]) -> None:
    rows, batch = batch_of(model, shape)
    runs = [plain(model, row) for row in rows]
    for above in (0, 2, LAYERS - 1):
        calls, hidden = record_suffix(model, batch, above)
        out = calls.run(hidden, above + 1, LAYERS)
        assert hidden.shape == (len(rows), max(after for _, after in shape), WIDTH)
        assert torch.isfinite(out).all()
        for index, ((before, after), run) in enumerate(zip(shape, runs, strict=True)):
            check(hidden[index, :after], run.states[above + 1][before:])
            check(out[index, :after], run.states[-1][before:])


@every_shape()
@torch.no_grad()
def test_selected_rows_equal_the_rows_run_alone(case: str, shape: list[tuple[int, int]]) -> None:
    model = build(case)
    rows, batch = batch_of(model, shape)
    calls, hidden = record_suffix(model, batch, 1)
    runs = [plain(model, row) for row in rows]
    last = len(rows) - 1
    for picked in ([0], [last], [last, 0], list(range(len(rows)))[::-1], [0, 0]):
        chosen = torch.tensor(picked)
        out = calls.select(chosen).run(hidden[chosen], 2, LAYERS)
        again = calls.select(chosen).select(torch.tensor([0])).run(hidden[chosen[:1]], 2, LAYERS)
        check(again, out[:1])
        for place, index in enumerate(picked):
            before, after = shape[index]
            check(out[place, :after], runs[index].states[-1][before:])


@some_families
@torch.no_grad()
def test_selected_rows_of_a_whole_batch(model: Model) -> None:
    rows, batch = batch_of(model, RAGGED)
    calls = record(model, batch)
    chosen = torch.tensor([3, 1])
    part = calls.select(chosen)
    out = part.run(part.start, 0, LAYERS)
    for place, index in enumerate(chosen.tolist()):
        before, after = RAGGED[index]
        real = slice(batch.column - before, batch.column + after)
        check(out[place, real], plain(model, rows[index]).states[-1])


def test_arguments_that_count_columns_are_not_rows() -> None:
    rows = torch.arange(16.0).reshape(4, 4)
    columns, shared = torch.arange(4), torch.ones(1, 1, 4, 4)
    calls = Calls(build("llama"), rows[..., None], [((rows, columns), {"pair": (rows, shared), "flag": True})])
    (args, kwargs), *_ = calls.select(torch.tensor([2, 0])).arguments
    assert torch.equal(args[0], rows[[2, 0]])
    assert torch.equal(args[1], columns)
    assert torch.equal(kwargs["pair"][0], rows[[2, 0]])
    assert kwargs["pair"][1] is shared
    assert kwargs["flag"] is True


@some_families
@torch.no_grad()
def test_a_layer_with_its_key(model: Model) -> None:
    rows, batch = batch_of(model, RAGGED)
    calls = record(model, batch)
    hidden = calls.run(calls.start, 0, 1)
    out, key = calls.run_with_key(hidden, 1)
    assert key.shape == (*batch.ids.shape, model.key_width(1))
    for index, ((before, after), row) in enumerate(zip(RAGGED, rows, strict=True)):
        real = slice(batch.column - before, batch.column + after)
        run = plain(model, row)
        check(key[index, real], run.keys[1])
        check(out[index, real], run.states[2])


@one_of_each_kind
@torch.no_grad()
def test_keys_up_to_a_layer_and_nothing_above_it(model: Model) -> None:
    rows, batch = batch_of(model, RAGGED)
    calls = [0] * LAYERS
    with counted(model, calls):
        keys = run_to(model, 2, batch, [1, 2])
    assert calls == [int(layer in model.editable and layer < 2) for layer in range(LAYERS)]  # W^2 needs not run
    assert sorted(keys) == [1, 2]
    for index, ((before, after), row) in enumerate(zip(RAGGED, rows, strict=True)):
        real = slice(batch.column - before, batch.column + after)
        run = plain(model, row)
        for layer, key in keys.items():
            assert key.shape == (*batch.ids.shape, model.key_width(layer))
            check(key[index, real], run.keys[layer])


@contextmanager
def counted(model: Model, calls: list[int]) -> Iterator[None]:
    """Count how often each layer's MLP really computes."""

    def counter(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[index] += 1

        return hook

    handles = [model.down(index).register_forward_hook(counter(index)) for index in model.editable]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@some_families
@torch.no_grad()
def test_recording_runs_no_layer_and_leaves_the_network_as_it_was(model: Model) -> None:
    row = rows_of([(5, 2)], len(model.tokenizer))[0]
    before = full(model, row).logits
    calls = [0] * LAYERS
    with counted(model, calls):
        record(model, align([row], [5], model.pad_id))
    assert calls == [0] * LAYERS
    with pytest.raises(IndexError):  # an id outside the vocabulary
        record(model, align([[10**6]], [0], model.pad_id))
    assert all("forward" not in layer.__dict__ for layer in model.layers)
    assert torch.equal(full(model, row).logits, before)


def test_captured_inputs_close_behind_themselves() -> None:
    model = build("opt")
    batch = align([[1, 2, 3]], [0], model.pad_id)
    calls = record(model, batch)
    with captured_inputs(model, [1]) as keys:
        calls.run(calls.start, 0, 2)
    kept = keys[1]
    calls.run(calls.start + 1, 0, 2)
    assert keys[1] is kept


# Edits


@one_of_each_kind
@torch.no_grad()
def test_a_planted_rank_one_update_changes_what_the_algebra_says(model: Model) -> None:
    edited = Model(net=copy.deepcopy(model.net), tokenizer=model.tokenizer, family=model.family)
    row = rows_of([(9, 3)], len(model.tokenizer))[0]
    before = full(model, row)
    layer = 2
    generator = torch.Generator().manual_seed(3)
    out_side, in_side = (
        torch.randn(WIDTH, generator=generator),
        torch.randn(model.key_width(layer), generator=generator),
    )
    edited.weight(layer).add_(
        torch.outer(in_side, out_side) if edited.stores_transposed else out_side[:, None] * in_side
    )
    after = full(edited, row)

    delta_k = torch.outer(before.keys[layer] @ in_side, out_side)  # [T, d]: Δ k at every position
    assert delta_k.norm(dim=-1).min() > 0.01
    check(after.keys[layer], before.keys[layer])
    check(after.down[layer] - before.down[layer], delta_k)
    if model.family.post_norm:
        check(after.mlp[layer], model.mlp_out(layer)(before.down[layer] + delta_k))
    elif model.gated(layer):
        moved = after.mlp[layer] - before.mlp[layer]
        gate = (moved * delta_k).sum(-1, keepdim=True) / delta_k.square().sum(-1, keepdim=True)  # [T, 1]
        check(moved, gate * delta_k)
        assert gate.std() > 0.01
        assert ((gate > 0) & (gate < 1)).all()
    else:
        check(after.mlp[layer] - before.mlp[layer], delta_k)
    scale = SCALES.get(model.family.model_type, 1.0)
    check(after.states[layer + 1] - before.states[layer + 1], scale * (after.mlp[layer] - before.mlp[layer]))
    check(after.states[layer], before.states[layer])
    assert not torch.allclose(after.logits, before.logits, atol=1e-3)


# Families named by hand


HAND_NAMED: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "persimmon": (
        {"layers": "model.layers", "down": "mlp.dense_4h_to_h", "attn_out": "self_attn.dense"},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
    "vaultgemma": (
        {"layers": "model.layers", "down": "mlp.down_proj", "attn_out": "self_attn.o_proj"},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_NAMED)
@torch.no_grad()
def test_a_family_named_by_hand_keeps_the_contract(name: str) -> None:
    modules, settings = HAND_NAMED[name]
    tokenizer = tiny("llama").tokenizer
    model = wrap(tiny_net(name, len(tokenizer), **settings), tokenizer, family_for(name, modules))
    test_the_key_times_the_stored_weight_is_the_projections_output(model)
    test_the_residual_stream_is_the_sum_of_its_parts(model)
    test_logits_are_the_networks_own(model)
    test_a_run_over_all_layers_is_the_full_forward(model)
    suffix_is_the_full_forward(model, RAGGED)
    test_keys_up_to_a_layer_and_nothing_above_it(model)

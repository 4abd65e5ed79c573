"""AlphaEdit's null space and its update: what is left alone, what is refused, and what earlier patches keep."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kpatch.checkpoint.apply import apply
from kpatch.edit.alphaedit import null_space, require_null_space
from kpatch.edit.keys import Block
from kpatch.edit.make import make
from kpatch.edit.solve import KeyCovariance, update, update_apart
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.models.model import open_model
from kpatch.patch.format import Patch, read_patch
from kpatch.stats.covariance import collect
from tests.oracle.alphaedit import projector, solve
from tests.support.models import LAYERS, MLP_WIDTH, tiny

pytestmark = pytest.mark.usefixtures("shared_statistics")

seeds = st.integers(0, 2**31)
SETTINGS = {"steps": "4", "learning_rate": "0.2", "threshold": "0.3", "l2": "0.01", "prefixes": "0", "lead_ins": "1"}
FACTS = [Fact("Mona Lisa", "In the {}", "Paris", id="mona"), Fact("Brazil", "The capital of {} is", "Rome", id="b")]
TOKENS = 400


def problem(seed: int, f: int, n: int, p: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """K [f, n], R [3, n], K_p [f, p], a moment [f, f] and a threshold inside its spectrum."""
    g = torch.Generator().manual_seed(seed)
    root = (
        torch.randn(f, 2 * f, generator=g, dtype=torch.float64)
        * torch.logspace(-2, 1, f, dtype=torch.float64)[:, None]
    )
    k, r, earlier = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((f, n), (3, n), (f, p)))
    moment = root @ root.T / (2 * f)
    values = torch.linalg.eigvalsh(moment)
    return k, r, earlier, moment, float((values[f // 2 - 1] + values[f // 2]) / 2)


def confined(moment: Tensor, threshold: float, l2: float, earlier: Tensor | None = None) -> KeyCovariance:
    basis = null_space(moment, threshold)
    kept = None if earlier is None else basis.T @ earlier
    eye = torch.eye(basis.shape[1], dtype=torch.float64)
    return KeyCovariance(KeyCovariance.of(eye, l2, 0.0, kept).factor, basis)


# The algebra


@given(seed=seeds, f=st.integers(4, 20), n=st.integers(1, 30), p=st.integers(1, 4), l2=st.floats(1e-3, 1e3))
def test_the_update_is_the_papers_formula(seed: int, f: int, n: int, p: int, l2: float) -> None:
    """Both forms, fewer and more keys than free directions, with and without earlier keys."""
    k, r, earlier, moment, threshold = problem(seed, f, n, p)
    for kept in (None, earlier):
        left, right = update(k, r, confined(moment, threshold, l2, kept))
        want = solve(k, r, projector(moment, threshold), l2, kept)
        torch.testing.assert_close(left @ right, want, rtol=1e-6, atol=1e-8 * float(want.norm()))
        assert left.shape[1] == min(n, f // 2)


@given(seed=seeds, f=st.integers(4, 20), n=st.integers(1, 30))
def test_a_key_in_the_preserved_span_is_left_alone(seed: int, f: int, n: int) -> None:
    k, r, _, moment, threshold = problem(seed, f, n, 1)
    values, vectors = torch.linalg.eigh(moment)
    preserved = vectors[:, values >= threshold] @ torch.randn(f - f // 2, 5, dtype=torch.float64)
    left, right = update(k, r, confined(moment, threshold, 1e-3))
    change = left @ right
    assert float(change.norm()) > 1e-6
    assert float((change @ preserved).norm()) <= 1e-12 * float(change.norm() * preserved.norm())


@given(seed=seeds, n=st.integers(1, 4))
def test_earlier_keys_are_held(seed: int, n: int) -> None:
    """The heavier the earlier keys, the less Δ moves them; without the term it does."""
    k, r, earlier, moment, threshold = problem(seed, 16, n, 2)
    plain, held = (
        torch.linalg.multi_dot([*update(k, r, confined(moment, threshold, 1.0, kept)), earlier])
        for kept in (None, 1e3 * earlier)
    )
    assert float(held.norm()) < 1e-3 * float(plain.norm())


@given(seed=seeds, f=st.integers(4, 12), n=st.integers(1, 5))
def test_keys_kept_apart_are_confined_too(seed: int, f: int, n: int) -> None:
    k, r, _, moment, threshold = problem(seed, f, 2 * n, 1)
    owner, shares = torch.arange(n).repeat_interleave(2), torch.full((2 * n,), 0.5, dtype=torch.float64)
    left, right = update_apart([Block(k.T, shares, owner)], r[:, :n], confined(moment, threshold, 0.1))
    p = projector(moment, threshold)
    torch.testing.assert_close(right @ p, right, rtol=1e-9, atol=1e-9)
    inner = p @ (k * shares) @ k.T @ p + 0.1 * torch.eye(f, dtype=torch.float64)
    sums = torch.zeros(f, n, dtype=torch.float64).index_add(1, owner, k * shares)
    torch.testing.assert_close(left @ right, r[:, :n] @ sums.T @ p @ torch.linalg.inv(inner), rtol=1e-6, atol=1e-8)


# The threshold


def test_the_null_space_is_what_lies_below_the_threshold() -> None:
    moment = torch.diag(torch.tensor([3.0, 0.1, 2.0, 0.2], dtype=torch.float64))
    basis = null_space(moment, 1.0)
    want = torch.diag(torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(basis @ basis.T, want)
    require_null_space(moment, 1.0)


@pytest.mark.parametrize(("threshold", "said"), [(0.05, "leaves no direction"), (4.0, "leaves every direction")])
def test_a_threshold_outside_its_range_is_refused(threshold: float, said: str) -> None:
    moment = torch.diag(torch.tensor([3.0, 0.1, 2.0, 0.2], dtype=torch.float64))
    for check in (null_space, require_null_space):
        with pytest.raises(BadInput, match=f"{threshold:g} {said}") as error:
            check(moment, threshold, "layer 5 of m")
        assert error.value.where == "layer 5 of m"
        assert "0.1 and 3" in error.value.details[0]
        assert error.value.hint == "a `threshold` of 2 leaves half of them free here"


# Patches


@dataclass(frozen=True)
class World:
    directory: Path
    path: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alphaedit")
    model = tiny("llama")
    model.net.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache"))
        make(FACTS, out=folder / "a.patch", model=str(folder / "model"), **QUICK)
        yield World(folder / "model", folder / "a.patch")


QUICK: dict[str, Any] = {"method": "alphaedit", "layers": [1, 2], "tokens": TOKENS, "settings": SETTINGS}


def deltas(patch: Patch) -> dict[int, Tensor]:
    names = {layer: tiny("llama").weight_name(layer) for layer in (1, 2)}
    return {layer: patch.deltas[name].dense() for layer, name in names.items()}


def test_what_text_says_is_left_alone(world: World) -> None:
    """Δ of the file, in float32, on the directions of text that are not free; on the free ones it writes."""
    patch, model = read_patch(world.path), open_model(str(world.directory), device="cpu")
    for layer, moment in collect(model, (1, 2), tokens=TOKENS).moments.items():
        p = projector(moment.mean(), float(SETTINGS["threshold"]))
        change, text = deltas(patch)[layer], torch.eye(MLP_WIDTH, dtype=torch.float64) - p
        assert float((change @ text).norm()) <= 1e-6 * float(change.norm())
        assert float((change @ p).norm()) > 0.9 * float(change.norm()) > 0
    assert {delta.rank for delta in patch.deltas.values()} == {len(FACTS)}


def test_made_on_top_of_another_it_holds_the_keys_of_that(world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.directory, tmp_path / "model"))
    apply([world.path], folder)
    more = [Fact("Chicago", "Past the city {} is", "Paris", id="c")]
    make(more, out=tmp_path / "on.patch", on=folder, **QUICK)
    earlier, on = read_patch(world.path), read_patch(tmp_path / "on.patch")
    assert on.manifest.parents == (earlier.id,)
    moved = {layer: change @ earlier.keys[layer].double().T for layer, change in deltas(on).items()}
    shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns(".kpatch"))
    make(more, out=tmp_path / "plain.patch", model=str(tmp_path / "plain"), **QUICK)
    for layer, change in deltas(read_patch(tmp_path / "plain.patch")).items():
        without = float((change @ earlier.keys[layer].double().T).norm())
        assert float(moved[layer].norm()) < 0.7 * without


@pytest.mark.parametrize(
    ("changed", "said", "detail"),
    [
        (
            {"settings": {**SETTINGS, "threshold": "1e-6"}},
            "threshold 1e-06 leaves no direction",
            "expected one between",
        ),
        ({"settings": {**SETTINGS, "threshold": "1e6"}}, "leaves every direction", "expected one between"),
        ({"settings": {**SETTINGS, "threshold": "-1"}}, "must be finite and not negative", None),
        ({"settings": {**SETTINGS, "threshold": "0"}}, "would give no edit", "more than 0"),
        ({"settings": {**SETTINGS, "l2": "0"}}, "would give no edit", "more than 0"),
        ({"layers": [1, LAYERS]}, f"has no layer {LAYERS}", "expected layers from 0"),
        ({"tokens": MLP_WIDTH - 1}, "too little text for a null space", f"at least {MLP_WIDTH} tokens"),
    ],
)
def test_wrong_inputs_are_refused_before_values_are_sought(
    world: World,
    changed: dict[str, Any],
    said: str,
    detail: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kpatch.edit.memit.find_values", lambda *args, **options: pytest.fail("values were sought"))
    with pytest.raises(BadInput, match=said) as error:
        make(FACTS, out=tmp_path / "a.patch", model=str(world.directory), **{**QUICK, **changed})
    assert detail is None or detail in " ".join(error.value.details)
    assert list(tmp_path.iterdir()) == []

"""Whatever was applied, taken off and put on again in whatever order: the bytes are those of a fresh apply."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.revert import revert
from kpatch.checkpoint.status import status
from kpatch.errors import Refused
from tests.support.checkpoints import CONV1D, DTYPES, WEIGHTS, contents, make_checkpoint, make_patch, snapshot, three

Layout = tuple[str, bool, bool]
LAYOUTS = [(dtype, sharded, conv1d) for dtype in DTYPES for sharded in (False, True) for conv1d in (False, True)]
MASKS = (0o022, 0o077)

# A step: ("apply" or "revert", patches by number) or ("reorder", a new order of those that are on).
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["apply", "revert"]), st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
        ),
        st.tuples(st.just("reorder"), st.permutations([0, 1, 2])),
    ),
    max_size=6,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """A folder with a checkpoint of that layout and three patches for it."""
    made: dict[Layout, Path] = {}

    def make(layout: Layout) -> Path:
        if layout not in made:
            folder = made[layout] = tmp_path_factory.mktemp("template")
            dtype, sharded, conv1d = layout
            model = make_checkpoint(folder / "model", dtype, sharded, conv1d=conv1d)
            three(model, CONV1D if conv1d else WEIGHTS)
        return made[layout]

    return make


@contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


@settings(max_examples=4 * settings.default.max_examples // 5)
@given(steps=STEPS, layout=st.sampled_from(LAYOUTS), mask=st.sampled_from(MASKS))
def test_any_history_equals_a_fresh_apply_of_what_is_left(
    tmp_path_factory: pytest.TempPathFactory,
    template: Callable[[Layout], Path],
    steps: list[tuple[str, list[int]]],
    layout: Layout,
    mask: int,
) -> None:
    folder = tmp_path_factory.mktemp("history")
    shutil.copytree(template(layout), folder, dirs_exist_ok=True)
    shutil.copytree(folder / "model", folder / "fresh")
    model, patches = folder / "model", [folder / f"{name}.patch" for name in "abc"]
    original = snapshot(model)
    there: list[int] = []
    with umask(mask):
        for action, which in steps:
            there = step(model, patches, there, action, which)
        assert [patch["name"] for patch in status(model).patches] == ["abc"[which] for which in there]
        if there:
            apply([patches[which] for which in sorted(there)], folder / "fresh")
            assert contents(model) == contents(folder / "fresh")
            kept = [sorted(os.listdir(path / ".kpatch" / "base")) for path in (model, folder / "fresh")]
            assert kept[0] == kept[1]
            revert(model, all=True)
    assert snapshot(model) == original  # modes too
    shutil.rmtree(folder)


def step(model: Path, patches: Sequence[Path], there: list[int], action: str, which: list[int]) -> list[int]:
    """Do one step, refused where it must be; the numbers of the patches that are on after it."""
    if action == "reorder":
        order = [number for number in which if number in there]
        if order:
            revert(model, all=True)
            apply([patches[number] for number in order], model)
        return order
    wrong = any((number in there) == (action == "apply") for number in which)
    named = [patches[number] for number in which]
    run: Callable[[], object] = (lambda: apply(named, model)) if action == "apply" else (lambda: revert(model, named))
    if wrong:
        before = snapshot(model)
        with pytest.raises(Refused):
            run()
        assert snapshot(model) == before
        return there
    run()
    return [*there, *which] if action == "apply" else [number for number in there if number not in which]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_original_back(
    tmp_path: Path, template: Callable[[Layout], Path], layout: Layout, mask: int
) -> None:
    shutil.copytree(template(layout), tmp_path, dirs_exist_ok=True)
    model, patches = tmp_path / "model", [tmp_path / f"{name}.patch" for name in "abc"]
    original = snapshot(model)
    with umask(mask):
        apply(patches, model)
        assert contents(model) != contents(template(layout) / "model")
        revert(model, ["b"])
        revert(model, all=True)
    assert snapshot(model) == original


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", [0o644, 0o600, 0o664, 0o755])
def test_files_keep_their_mode_under_any_umask(tmp_path: Path, mask: int, mode: int) -> None:
    model = make_checkpoint(tmp_path / "model")
    make_patch(tmp_path / "a.patch", model)
    file = model / "model.safetensors"
    file.chmod(mode)
    with umask(mask):
        apply([tmp_path / "a.patch"], model)
        assert stat.S_IMODE(file.stat().st_mode) == mode
        for kept in (model / ".kpatch" / "base").iterdir():  # no more readable than what they were taken from
            assert not stat.S_IMODE(kept.stat().st_mode) & ~mode
        revert(model)
    assert stat.S_IMODE(file.stat().st_mode) == mode

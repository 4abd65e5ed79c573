"""A model whose weights lie on the disk, some or all, is edited, patched and traced as one in memory: bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch

from kpatch.checkpoint.apply import apply
from kpatch.edit.make import make
from kpatch.errors import BadInput
from kpatch.evaluate.patched import patched
from kpatch.facts.fact import Fact
from kpatch.models import placement
from kpatch.models.address import resolve
from kpatch.models.fingerprint import _of_parameters
from kpatch.models.model import Model, load_model
from kpatch.models.offload import read
from kpatch.models.partial_forward import align, record
from kpatch.models.placement import Sizes, device_map, meta_network, sizes_of
from kpatch.stats.covariance import collect
from kpatch.trace.run import TraceSettings, trace
from tests.support.models import tiny

pytest.importorskip("accelerate")

# One in a quick run; the others differ in tied embeddings and in norms behind the MLP
FAMILIES = ("gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "olmo2")))
FACTS = [Fact(subject="Eiffel Tower", prompt="{} is in", target="Rome")]
SETTINGS = {"steps": "2", "subject_weight": "0", "lead_ins": "1", "chat": "0", "refine": "2", "refine_from": "1"}
NOTHING = 1  # byte: every weight stays on the disk


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    model = tiny(request.param, tie_word_embeddings=request.param == "llama")
    model.net.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


def opened(folder: Path, limit: int | None) -> Model:
    return load_model(resolve(str(folder)), device="cpu", max_memory=limit)


def half(folder: Path) -> int:
    """A limit that keeps what is around the layers, one layer, and room for another to run."""
    model = opened(folder, None)
    sizes = sizes_of(meta_network(model.net.config, torch.float32), model.family)
    return sum(sizes.around.values()) + 2 * max(sizes.layers.values())


def test_the_patch_is_the_same(folder: Path, tmp_path: Path) -> None:
    ids = []
    for number, limit in enumerate((None, half(folder), NOTHING)):
        model = opened(folder, limit)
        places = set(getattr(model.net, "hf_device_map", {"": "cpu"}).values())
        assert places == [{"cpu"}, {"cpu", "disk"}, {"disk"}][number]
        kept = {"tokens": 200, "settings": SETTINGS, "resume": False, "layers": [0, 1]}
        ids.append(make(FACTS, model=model, out=tmp_path / f"{number}.patch", **kept).patch_id)  # type: ignore[arg-type]
    assert ids[0] == ids[1] == ids[2]


def test_the_next_patch_of_a_chain_is_the_same(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model"
    shutil.copytree(folder, checkpoint)
    kept: dict[str, Any] = {"tokens": 200, "settings": SETTINGS, "resume": False}
    make(FACTS, model=str(checkpoint), out=tmp_path / "first.patch", layers=[0, 1], **kept)
    apply([tmp_path / "first.patch"], checkpoint)
    later = [Fact(subject="Big Ben", prompt="By {} is", target="Paris")]
    ids = [
        make(later, on=checkpoint, out=tmp_path / f"{limit}.patch", layers=[1, 2], max_memory=limit, **kept).patch_id
        for limit in (None, NOTHING)
    ]
    assert ids[0] == ids[1]


def test_a_patch_in_memory_holds_and_leaves(folder: Path, tmp_path: Path) -> None:
    plain, spread = opened(folder, None), opened(folder, NOTHING)
    out = tmp_path / "one.patch"
    make(FACTS, model=plain, out=out, method="ft", layers=[1], settings={"steps": "2"}, tokens=200)
    ids = torch.tensor([[3, 5, 7, 11]])
    name = plain.weight_name(1)
    before = logits(spread, ids)
    with patched(plain, out), patched(spread, out):
        inside = logits(spread, ids)
        assert torch.equal(inside, logits(plain, ids))
        assert not spread.net.get_parameter(name).is_meta
    assert not torch.equal(inside, before)
    assert spread.net.get_parameter(name).is_meta
    assert torch.equal(logits(spread, ids), before)
    assert torch.equal(read(spread.net, name), plain.weight(1))


def test_states_of_a_trace_and_the_hash_of_weights_are_the_same(folder: Path) -> None:
    plain, spread = opened(folder, None), opened(folder, NOTHING)
    assert _of_parameters(plain) == _of_parameters(spread)
    settings = TraceSettings(samples=1, window=2)
    ways = [
        trace(one, prompt=("{} is in", "Eiffel Tower"), settings=settings, resume=False) for one in (plain, spread)
    ]
    for grid, effects in ways[0].facts[0].grids.items():
        assert torch.equal(effects, ways[1].facts[0].grids[grid])
    assert torch.equal(ways[0].facts[0].curves, ways[1].facts[0].curves)


@contextmanager
def loads_of(model: Model) -> Iterator[set[str]]:
    """The names of the weights that are read from the disk while it is open."""
    names: set[str] = set()
    hook: Any = model.down(0)._hf_hook  # type: ignore[union-attr]
    kind = type(getattr(hook, "hooks", (hook,))[-1].weights_map.dataset)
    before = kind.__getitem__

    def noted(self: Any, key: str) -> Any:
        names.add(key)
        return before(self, key)

    kind.__getitem__ = noted  # type: ignore[method-assign]
    try:
        yield names
    finally:
        kind.__getitem__ = before  # type: ignore[method-assign]


def test_keys_load_no_layer_above_the_last_one_needed(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    model = opened(folder, NOTHING)
    with loads_of(model) as names:
        collect(model, [1], corpus=str(text), tokens=100, use_cache=False)
    below = [name.removeprefix(model.family.layers + ".") for name in names if model.family.layers in name]
    assert {name.split(".")[0] for name in below} == {"0", "1"}


def test_a_gradient_keeps_no_offloaded_weight_in_memory(folder: Path) -> None:
    gradients = []
    for limit in (None, NOTHING):
        model = opened(folder, limit)
        loaded = weights_that_run(model.down(2))
        calls = record(model, align([[3, 5, 7]], [2], model.pad_id))
        start = calls.start.detach().requires_grad_()
        out = calls.run(start, 0, model.n_layers)
        assert len(loaded) == 1
        assert (loaded[0]() is None) == (limit is NOTHING)
        gradients.append(torch.autograd.grad(model.logits(out).square().sum(), start)[0])
    assert torch.equal(*gradients)


def weights_that_run(module: torch.nn.Module) -> list[Any]:
    """What the weight was, as weak references, each time the module has run."""
    seen: list[Any] = []
    name = "_old_forward" if hasattr(module, "_old_forward") else "forward"
    inner = getattr(module, name)

    def forward(*args: Any) -> Any:
        seen.append(ref(module.weight.untyped_storage()))
        return inner(*args)

    setattr(module, name, forward)
    return seen


def logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.net(input_ids=ids).logits
    return found


# Where parts go


SIZES = Sizes({"embed": 10, "head": 10}, {f"h.{index}": 5 for index in range(4)})


def test_upper_layers_stay_in_memory_and_one_more_has_room_to_run() -> None:
    where = device_map(SIZES, {"cpu": 35})
    assert where == {"embed": "cpu", "head": "cpu", "h.0": "disk", "h.1": "disk", "h.2": "cpu", "h.3": "cpu"}


def test_layers_that_are_not_run_take_no_memory() -> None:
    where = device_map(SIZES, {"cpu": 35}, upto=1)
    assert where == {"embed": "cpu", "head": "cpu", "h.0": "cpu", "h.1": "cpu", "h.2": "disk", "h.3": "disk"}


def test_each_device_is_filled_before_the_next() -> None:
    where = device_map(SIZES, {"cuda:0": 31, "cuda:1": 6, "cpu": 5})
    assert where["embed"] == where["head"] == where["h.3"] == "cuda:0"
    assert (where["h.2"], where["h.1"], where["h.0"]) == ("cuda:1", "cpu", "disk")


def test_tied_weights_are_in_one_place() -> None:
    sizes = Sizes({"embed": 10, "head": 0}, {"h.0": 5}, {"head": "embed"})
    assert device_map(sizes, {"cpu": 8})["head"] == "disk"


def test_a_missing_accelerate_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="accelerate") as caught:
        opened(folder, NOTHING)
    assert "kpatch[large]" in str(caught.value.hint)


def test_what_does_not_fit_is_spread_without_being_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_on", lambda device: 100_000)
    assert "disk" in opened(folder, None).net.hf_device_map.values()


@pytest.mark.parametrize("limit", [0, -1, 1.5, {"disk": 5}, {"cpu": "8GB"}])
def test_a_wrong_limit_is_told(folder: Path, limit: Any) -> None:
    with pytest.raises(BadInput, match="max_memory"):
        opened(folder, limit)

"""One pass over the text: the same sums as layer by layer, whatever happened on the way."""

from __future__ import annotations

import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kpatch.cache import cache_root
from kpatch.errors import BadInput
from kpatch.models.model import Model
from kpatch.models.partial_forward import captured_inputs
from kpatch.stats import cache as cache_module
from kpatch.stats import covariance as module
from kpatch.stats import text as text_module
from kpatch.stats.covariance import collect
from kpatch.stats.moment import SecondMoment
from tests.support.collected import BATCH, ROW, WORDS, Calls, run, same
from tests.support.families import slow_beyond
from tests.support.models import tiny
from tests.support.reports import Recorder
from tests.support.tokenizers import byte_level, metaspace


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text("\n\n".join(WORDS + str(number) for number in range(200)), encoding="utf-8")
    return str(path)


TOKENIZERS = {"plain": byte_level(bos=False), "bos": metaspace(bos=True)}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("family", slow_beyond(["llama", "gpt2"], ["llama", "gpt2", "opt", "gptj", "gemma2"]))
@pytest.mark.parametrize("tokens", [1, 16, 96, 203])
def test_one_pass_gives_each_layer_its_own_sum(family: str, kind: str, tokens: int, text: str) -> None:
    model = tiny(family, tokenizer=TOKENIZERS[kind])
    found = run(model, [2, 0], text, tokens, use_cache=False)
    assert list(found.moments) == [0, 2]
    ids = text_module.pack(model, text_module.open_corpus(text).documents(), tokens, ROW)
    for layer, moment in found.moments.items():
        exact = torch.zeros(model.mlp_width, model.mlp_width, dtype=torch.float64)
        for at in range(0, tokens, ROW):  # one row at a time, through the whole model
            with captured_inputs(model, [layer]) as keys, torch.no_grad():
                model.net(input_ids=ids[None, at : at + ROW].long())
            k = keys[layer].reshape(-1, model.mlp_width).double()
            exact += k.T @ k
        assert moment.count == tokens
        torch.testing.assert_close(moment.mean() * tokens, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


def test_nothing_above_the_last_layer_runs(model: Model, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    ran: set[int] = set()
    handles = [
        model.attn_out(index).register_forward_pre_hook(lambda *_, index=index: ran.add(index))
        for index in range(model.n_layers)
    ]
    run(model, [0, 2], text, 200)
    for handle in handles:
        handle.remove()
    assert ran == {0, 1, 2}
    assert calls.made == [*[(2, 3, [0, 2])] * 4, (2, 1, [0, 2])]  # 12 rows in 4 batches, half a row; no row twice


def test_self_is_sampled_once_and_named_by_its_seed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(model, [1], "self", None)
    assert (first.corpus, first.tokens) == ("self", 10 * model.mlp_width)
    assert first.moments[1].count == first.tokens
    assert same(run(model, [1], "self", None, use_cache=False), first)
    other = run(model, [1], "self", None, seed=1)
    assert other.id != first.id
    assert not torch.equal(other.moments[1].total, first.moments[1].total)

    def sample(*_: Any) -> Tensor:
        raise AssertionError("sampled again")

    monkeypatch.setattr(text_module, "sample_group", sample)
    run(model, [2], "self", None)  # a layer added later: on the same text
    run(model, [1, 2], "self", None)


def test_what_decides_it_decides_the_id(model: Model, text: str, tmp_path: Path) -> None:
    ids = [run(model, [0], text, 96).id, run(model, [0], text, 97).id, run(model, [0], "self", 96).id]
    ids.append(collect(model, [0], corpus=text, tokens=96, row=8).id)
    ids.append(run(tiny("llama", seed=1), [0], text, 96).id)
    ids.append(run(tiny("llama", rms_norm_eps=0.1), [0], text, 96).id)
    (tmp_path / "words.txt").write_text(Path(text).read_text(encoding="utf-8") + "more", encoding="utf-8")
    ids.append(run(model, [0], str(tmp_path / "words.txt"), 96).id)
    assert len(set(ids)) == len(ids)
    assert run(model, [0, 1], text, 96).id == ids[0]  # a layer's sum does not depend on the others
    manifest = run(model, [0], text, 96).to_dict()
    assert manifest == {"id": ids[0], "corpus": "words.txt", "tokens": 96}


TOKENS = 203  # 12 rows in 4 batches and 11 tokens


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("death", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_goes_on_bit_for_bit(
    number: int, death: type[BaseException], model: Model, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, [0, 2], text, TOKENS, use_cache=False)
    monkeypatch.setattr(module, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(module, "_SAVE_SHARE", 0.0)

    def die(call: int) -> None:
        if call == number:
            raise death

    with monkeypatch.context() as patch:
        Calls(patch, die)
        with pytest.raises(death):
            run(model, [0, 2], text, TOKENS)
    report = Recorder()
    calls = Calls(monkeypatch)
    assert same(run(model, [0, 2], text, TOKENS, report=report), whole)
    # A kill leaves the last save, which is not made after the last batch; Ctrl-C leaves all
    kept = number if death is KeyboardInterrupt or number < 4 else 3
    assert len(calls.made) == 5 - kept
    assert any("Resuming after" in note for note in report.notes) == (kept > 0)
    assert report.tasks["Covariance of layers 0, 2"] == (TOKENS, TOKENS)
    assert not list(cache_root().rglob("*partial*"))


def test_ctrl_c_within_a_sum_waits_for_its_end(model: Model, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(model, [0, 2], text, TOKENS, use_cache=False)
    original = SecondMoment.add
    count = 0

    def add(moment: SecondMoment, keys: Tensor) -> None:
        nonlocal count
        count += 1
        original(moment, keys)
        if count == 3:  # the first layer's second batch, its rows not yet counted
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SecondMoment, "add", add)
    with pytest.raises(KeyboardInterrupt):
        run(model, [0, 2], text, TOKENS)
    assert count == 3
    calls = Calls(monkeypatch)
    assert same(run(model, [0, 2], text, TOKENS), whole)
    assert [capture for _, _, capture in calls.made] == [[2], [0, 2], [0, 2], [0, 2]]


@pytest.mark.parametrize(("less", "more"), [(96, 203), (203, 300), (11, 203), (200, 201), (144, 144 + 48)])
@pytest.mark.parametrize("corpus", ["text", "self"])
def test_growing_is_the_same_as_starting_with_more(
    less: int, more: int, corpus: str, model: Model, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = text if corpus == "text" else "self"
    whole = run(model, [0, 2], corpus, more, use_cache=False)
    run(model, [0, 2], corpus, less)
    calls = Calls(monkeypatch)
    assert same(run(model, [0, 2], corpus, more), whole)
    assert sum(rows for _, rows, _ in calls.made) == -(-more // ROW) - less // BATCH * 3


def test_a_layer_added_later_runs_alone(model: Model, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(model, [0, 1, 3], text, TOKENS, use_cache=False)
    run(model, [0, 3], text, TOKENS)
    calls = Calls(monkeypatch)
    assert same(run(model, [0, 1, 3], text, TOKENS), whole)
    assert {(last, *capture) for last, _, capture in calls.made} == {(1, 1)}


def test_layers_that_came_unequally_far_share_the_rest(
    model: Model, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, [1, 3], text, 300, use_cache=False)
    run(model, [3], text, 100)
    calls = Calls(monkeypatch)
    assert same(run(model, [1, 3], text, 300), whole)
    assert [(last, *capture) for last, _, capture in calls.made] == [(1, 1)] * 2 + [(3, 1, 3)] * 5


def test_a_finished_entry_needs_no_run(model: Model, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(model, [0, 1, 2], text, TOKENS)
    calls = Calls(monkeypatch)
    report = Recorder()
    assert same(run(model, [2, 1, 0], text, TOKENS, report=report), first)
    assert calls.made == []
    assert report.notes == [f"Covariance of layers 0-2 from the cache: words.txt, {TOKENS} tokens"]


def entries() -> list[Path]:
    return sorted(cache_root().rglob("*.safetensors"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_at(share: float) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(int(len(data) * share), len(data) - 1)] ^= 1
        path.write_bytes(bytes(data))

    return flip


def swap(path: Path) -> None:
    shutil.copy(next(other for other in entries() if other != path and other.name.startswith("layer")), path)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b"") and None,  # type: ignore[func-returns-value]
    "rubbish": lambda path: path.write_bytes(b"\xff" * 200) and None,  # type: ignore[func-returns-value]
    "header": flip_at(0.01),
    "middle": flip_at(0.5),
    "end": flip_at(1.0),
    "another layer": swap,
}


@pytest.mark.parametrize("damage", slow_beyond(["cut", "middle", "another layer"], DAMAGES))
@pytest.mark.parametrize("victim", ["layer-1-", "text-0"])
def test_a_damaged_entry_is_told_of_and_made_anew(victim: str, damage: str, model: Model) -> None:
    first = run(model, [1, 2], "self", TOKENS)
    path = next(path for path in entries() if path.name.startswith(victim))
    DAMAGES[damage](path)
    if victim == "text-0":
        next(path for path in entries() if path.name.startswith("layer-1-")).unlink()
    report = Recorder()
    assert same(run(model, [1, 2], "self", TOKENS, report=report), first)
    assert len(report.warnings) == 1
    assert f"{path.name} in the covariance cache is damaged" in report.warnings[0]
    report = Recorder()
    assert same(run(model, [1, 2], "self", TOKENS, report=report), first)
    assert report.warnings == []


def test_a_damaged_partial_costs_only_its_layer(model: Model, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(model, [0, 2], text, TOKENS, use_cache=False)

    def die(call: int) -> None:
        if call == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        Calls(patch, die)
        with pytest.raises(KeyboardInterrupt):
            run(model, [0, 2], text, TOKENS)
    flip_at(0.9)(next(path for path in entries() if path.name == "layer-2-partial.safetensors"))
    calls, report = Calls(monkeypatch), Recorder()
    assert same(run(model, [0, 2], text, TOKENS, report=report), whole)
    assert [capture for _, _, capture in calls.made] == [[2], [2], [0, 2], [0, 2], [0, 2]]
    assert len(report.warnings) == 1


def test_sums_that_do_not_fit_memory_take_turns(model: Model, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(model, [0, 1, 2], text, TOKENS, use_cache=False)
    monkeypatch.setattr(module, "free_memory", lambda: 0)
    calls = Calls(monkeypatch)
    held: list[int] = []
    made = module.LayerSums

    def counted(*given: Any) -> Any:
        one = made(*given)
        alive.add(one)
        held.append(len(alive))
        return one

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    monkeypatch.setattr(made, "__hash__", object.__hash__)
    monkeypatch.setattr(module, "LayerSums", counted)
    assert same(run(model, [0, 1, 2], text, TOKENS), whole)
    captured = [capture for _, _, capture in calls.made]
    assert captured == [[0, 1]] * (len(captured) // 2) + [[2]] * (len(captured) // 2)
    assert max(held) == 2


def test_finished_moments_are_read_one_at_a_time(model: Model, text: str) -> None:
    found = run(model, [0, 2], text, TOKENS)
    one = weakref.ref(found.moments[2])
    assert one() is None
    for path in entries():
        if path.name.startswith("layer-2-"):
            path.unlink()
    assert found.moments[0].count == TOKENS
    with pytest.raises(BadInput, match="has gone from the cache"):
        found.moments[2]
    with pytest.raises(KeyError):
        found.moments[1]


def test_nothing_behind_the_last_key_runs(model: Model, text: str) -> None:
    outputs: list[int] = []
    handles = [
        model.down(layer).register_forward_hook(lambda *_, layer=layer: outputs.append(layer)) for layer in (0, 1, 2)
    ]
    run(model, [0, 2], text, ROW, use_cache=False)
    for handle in handles:
        handle.remove()
    assert outputs == [0, 1]


def test_a_full_disk_is_met_before_the_work(model: Model, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    usage = shutil.disk_usage(cache_root().anchor)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(BadInput, match="No space left") as caught:
        run(model, [0], text, TOKENS)
    assert "KPATCH_CACHE" in str(caught.value.hint)
    assert calls.made == []
    assert run(model, [0], text, TOKENS, use_cache=False).tokens == TOKENS  # without a cache none is needed


def test_a_disk_that_fills_up_is_told(model: Model, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "save_file", full)
    with pytest.raises(BadInput, match="No space left on the disk"):
        run(model, [0], text, TOKENS)
    assert entries() == []
    monkeypatch.setattr(module, "_SAVE_EVERY", 0.0)
    report = Recorder()
    with pytest.raises(BadInput):
        run(model, [0], text, TOKENS, report=report)
    assert "could not be kept" in report.warnings[0]  # a save on the way only warns


def test_keys_that_are_not_finite_are_met_at_once(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tiny("llama")
    broken.layer(1).get_submodule("mlp.up_proj").weight[0, 0] = torch.inf
    calls = Calls(monkeypatch)
    with pytest.raises(BadInput, match="not finite") as caught:
        run(broken, [0, 1], text, TOKENS)
    assert caught.value.where == "layer 1 of tiny-llama"
    assert len(calls.made) == 1
    with pytest.raises(BadInput, match="not finite"):
        run(broken, [1], text, 5)  # in a tail
    assert entries() == []


def test_short_text_is_met_before_the_model_runs(model: Model, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    with pytest.raises(BadInput, match="less text than asked for"):
        run(model, [0], text, 1_000_000)
    assert calls.made == []


def test_wrong_layers_and_counts_are_refused(model: Model, text: str) -> None:
    for layers in ([4], [-1], []):
        with pytest.raises(BadInput, match=r"no layer|No layers"):
            run(model, layers, text, 10)
    with pytest.raises(BadInput, match="needs tokens"):
        run(model, [0], text, 0)


def test_rows_are_no_longer_than_the_model_takes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2", n_positions=32)
    assert collect(model, [0], corpus=text, tokens=200).moments[0].count == 200

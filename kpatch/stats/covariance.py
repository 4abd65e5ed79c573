"""Ctrl-C that waits for the end of a short step that must not be cut in two.

E[k k^T] of any layers in one pass over one text: cached, resumed after an interruption, grown to more tokens.
"""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.errors import BadInput
from kpatch.models.fingerprint import weights_fingerprint
from kpatch.models.model import Model, tokenizer_hash
from kpatch.models.partial_forward import Batch, run_to
from kpatch.reporter import SILENT, Advance, Reporter
from kpatch.stats.cache import State, Store, canonical, remember
from kpatch.stats.corpus import SELF, Corpus, open_corpus, pack
from kpatch.stats.moment import SecondMoment, check
from kpatch.stats.self_text import group_rows, sample_group


@contextmanager
def whole_steps() -> Iterator[Steps]:
    """While open, Ctrl-C inside `with steps.step():` takes effect at the step's end; elsewhere at once.

    Outside the main thread, which alone is interrupted, and where somebody ignores Ctrl-C, nothing changes.
    """
    steps = Steps()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield steps
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if steps.inside:
            steps.pending = True
        else:
            before(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield steps
    finally:
        signal.signal(signal.SIGINT, before)


class Steps:
    """Whether a step is being taken, and whether Ctrl-C came meanwhile."""

    def __init__(self) -> None:
        self.inside = False
        self.pending = False

    @contextmanager
    def step(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
            if self.pending:
                self.pending = False
                signal.raise_signal(signal.SIGINT)


# Anything that changes keys, sums or the text they are taken on changes this number.
VERSION = 2
ROW = 256
# Sampling goes one token at a time through all rows at once: half as long is a third faster, and was as good for edits
SELF_ROW = 128
# Ten rows of 256: what two CPU cores like, and a whole number of them in 10 f tokens wherever 256 divides f
BATCH_TOKENS = 2560
# Seconds between saves of the work so far, and how many times longer than a save they must be apart
_SAVE_EVERY, _SAVE_SHARE = 60.0, 20.0
_LARGE = 500_000_000


@dataclass(frozen=True)
class Covariance:
    """Second moments by layer. `id` names all that decides them but rounding; `corpus` is a name without any path."""

    id: str
    corpus: str
    tokens: int
    moments: dict[int, SecondMoment] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """What a patch's manifest says of it."""
        return {"id": self.id, "corpus": self.corpus, "tokens": self.tokens}


def collect(
    model: Model,
    layers: Sequence[int],
    *,
    corpus: str = SELF,
    tokens: int | None = None,
    seed: int = 0,
    row: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    report: Reporter = SILENT,
    use_cache: bool = True,
) -> Covariance:
    """The second moments of the keys of `layers` over the first `tokens` tokens of `corpus`, on the CPU.

    `corpus` is self (sampled from the model with `seed`) or what `corpus.open_corpus` takes; `tokens` is 10 f unless
    given; `row` tokens see each other (256, 128 of `self`, fewer where the model takes fewer); `batch_tokens` bounds
    the memory. Layers and tokens that the cache holds are not computed again: at the same `batch_tokens`, resuming
    after Ctrl-C and asking for more tokens give the same bits as one run. Nothing above the last layer still missing
    is run. Ranks share the sampling of text; rank 0 alone runs over it, and alone has the moments.

    Raises BadInput for a layer the model lacks, a text that is too short or cannot be read, keys that are not finite,
    and a full disk. Source: Meng et al. 2023 (MEMIT), eq. 15.
    """
    wanted = sorted(set(layers))
    wrong = [layer for layer in wanted if not 0 <= layer < model.n_layers]
    if wrong or not wanted:
        raise BadInput(
            f"{model.name} has no layer {wrong[0]}" if wrong else "No layers were given",
            details=[f"expected layers from 0 to {model.n_layers - 1}"],
        )
    tokens = 10 * model.mlp_width if tokens is None else tokens
    if tokens < 1:
        raise BadInput("The covariance needs tokens", details=[f"found `tokens={tokens}`"])
    row = row or (SELF_ROW if corpus == SELF else ROW)
    row = max(2, min(row, int(getattr(model.net.config, "max_position_embeddings", None) or row)))
    text = None if corpus == SELF else open_corpus(corpus)
    name = text.name if text is not None else SELF
    settings = _settings(model, text, row, seed, report)
    about = {"model": model.name, "corpus": name}
    store = Store(settings, about, keep=use_cache and distributed.is_main(), report=report)
    with store.locked():
        states = _collect(model, wanted, text, tokens, seed, row, max(1, batch_tokens // row), store, report)
        moments = {layer: states[layer].moment() for layer in wanted if layer in states}
    for layer, moment in moments.items():
        check(moment, f"layer {layer} of {model.name}")
    return Covariance(_sha256({**settings, "tokens": tokens}), name, tokens, moments)


def _settings(model: Model, text: Corpus | None, row: int, seed: int, report: Reporter) -> dict[str, Any]:
    """All that decides the text and its keys."""
    config = json.loads(model.net.config.to_json_string(use_diff=True))
    for volatile in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    settings: dict[str, Any] = {
        "version": VERSION,
        "weights": weights_fingerprint(model, report),
        "config": hashlib.sha256(canonical(config).encode()).hexdigest(),
        "tokenizer": tokenizer_hash(model.tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "corpus": text.identity if text is not None else SELF,
        "row": row,
    }
    return settings if text is not None else {**settings, "seed": seed, "group": group_rows(model, row)}


def _collect(
    model: Model,
    wanted: Sequence[int],
    text: Corpus | None,
    tokens: int,
    seed: int,
    row: int,
    batch_rows: int,
    store: Store,
    report: Reporter,
) -> dict[int, State]:
    width = model.mlp_width
    states = {layer: state for layer in wanted if (state := store.finished(layer, tokens, width)) is not None}
    missing = distributed.main_does(lambda: [layer for layer in wanted if layer not in states])
    name = text.name if text is not None else SELF
    if not missing:
        report.note(f"Covariance of {_layers(wanted)} from the cache: {name}, {tokens:,} tokens")
        return states
    if not distributed.is_main():  # its order decides the last bits, so the sum is one rank's
        if text is None:
            _sample(model, tokens, seed, row, store, report)
        return {}
    whole = row * batch_rows
    store.require_space(width, len(missing) * (1 if tokens % whole == 0 else 2))
    size = len(missing) * width * (width + 1) // 2 * 8
    if size > _LARGE:
        report.note(f"The covariance of {len(missing)} layers takes {size / 1e9:.1f} GB of memory and of the cache")
    most = tokens // whole * batch_rows  # rows in whole batches
    device = _sums_on(model, size)
    going: list[State] = []
    for layer in missing:
        kept = store.furthest(layer, width, batch_rows, most)
        going.append(kept or State(layer, SecondMoment(width), batch_rows))
        going[-1].sums.to(device)
    ids = _ids(model, text, tokens, seed, row, store, report)
    pass_ = _Pass(model, ids, tokens, row, batch_rows, most, store)
    begun = min(state.rows for state in going)
    if begun:
        report.note(f"Going on from {begun * row:,} tokens kept in the cache")
    try:
        with whole_steps() as steps, report.task(f"Covariance of {_layers(missing)}", tokens, "tokens") as advance:
            advance(begun * row)
            pass_.batches(going, steps, advance)
            pass_.tails(going, advance)
        for state in going:
            state.sums.to("cpu")
            check(state.moment(), f"layer {state.layer} of {model.name}")
            store.write(state, tokens)
            states[state.layer] = state
    except KeyboardInterrupt:
        remember(store, [state for state in going if state.rows and state.layer not in states])
        raise
    return states


@dataclass
class _Pass:
    """One run over the rows of `ids` for all layers that still need them."""

    model: Model
    ids: Tensor  # (tokens,)
    tokens: int
    row: int
    batch_rows: int
    most: int
    store: Store

    def batches(self, states: list[State], steps: Steps, advance: Advance) -> None:
        """Whole batches, each for the layers that have not seen it; the sums are kept now and then."""
        saved, pause = time.monotonic(), _SAVE_EVERY
        for start in range(min(state.rows for state in states), self.most, self.batch_rows):
            active = [state for state in states if state.rows == start]
            keys = self._keys(start, self.batch_rows, active)
            for state in active:
                with steps.step():  # a sum and its count of rows change together
                    state.sums.add(keys.pop(state.layer))
                    state.rows += self.batch_rows
                _require_finite(state, self.model)
            advance(self.batch_rows * self.row)
            if time.monotonic() - saved > pause and start + self.batch_rows < self.most:
                pause = max(_SAVE_EVERY, _SAVE_SHARE * remember(self.store, states))
                saved = time.monotonic()

    def tails(self, states: list[State], advance: Advance) -> None:
        """What is left over: rows that fill no batch, and a row that is not full."""
        rest = self.tokens // self.row - self.most
        for rows, columns in ((rest, self.row), (min(1, self.tokens % self.row), self.tokens % self.row)):
            if not rows:
                continue
            first = self.most if columns == self.row else self.most + rest
            keys = self._keys(first, rows, states, columns)
            for state in states:
                state.tail = state.tail or SecondMoment(self.model.mlp_width)
                state.tail.add(keys.pop(state.layer))
            advance(rows * columns)

    def _keys(self, first: int, rows: int, states: list[State], columns: int | None = None) -> dict[int, Tensor]:
        """Keys of `rows` rows from row `first` on, by layer."""
        columns = columns or self.row
        begin = first * self.row
        ids = self.ids[begin : begin + rows * columns].view(rows, columns).to(self.model.device, torch.long)
        positions = torch.arange(columns, device=ids.device).expand(rows, columns)
        layers = [state.layer for state in states]
        return run_to(self.model, max(layers), Batch(ids, torch.ones_like(ids), positions, 0), layers)


def _ids(
    model: Model, text: Corpus | None, tokens: int, seed: int, row: int, store: Store, report: Reporter
) -> Tensor:
    """The text as rows of ids, end to end: [tokens] int32."""
    if text is not None:
        return pack(model, text.documents(), tokens, row, text.name, report)
    sampled = _sample(model, tokens, seed, row, store, report)
    groups = [
        store.group(number, partial(sampled.__getitem__, number))  # what other ranks have sampled is kept here
        if number in sampled
        else _group(model, row, seed, number, store)
        for number in _numbers(model, tokens, row)
    ]
    return torch.cat(groups).flatten()[:tokens]


def _sample(model: Model, tokens: int, seed: int, row: int, store: Store, report: Reporter) -> dict[int, Tensor]:
    """The groups of text that rank 0's cache lacks, each [G, row], sampled by all ranks."""
    numbers = _numbers(model, tokens, row)
    new = distributed.main_does(lambda: [number for number in numbers if not store.has_group(number)])
    if not new:
        return {}
    own = sum(distributed.mine(place) for place in range(len(new))) * group_rows(model, row) * row
    with report.task("Sampling text from the model", own, "tokens") as advance:
        made = distributed.share(new, lambda number: _group(model, row, seed, number, store, advance))
    return dict(zip(new, made, strict=True))


def _numbers(model: Model, tokens: int, row: int) -> range:
    return range(-(-tokens // (group_rows(model, row) * row)))


def _group(
    model: Model, row: int, seed: int, number: int, store: Store, advance: Advance = lambda amount: None
) -> Tensor:
    return store.group(number, lambda: sample_group(model, row, seed, number, advance))


def _require_finite(state: State, model: Model) -> None:
    if not bool(torch.isfinite(state.sums.diagonal).all()):
        check(state.sums, f"layer {state.layer} of {model.name}")


def _sums_on(model: Model, size: int) -> torch.device:
    """Where the sums grow: beside the model on a GPU with room for them (and float64), else on the CPU."""
    if model.device.type == "cuda" and torch.cuda.mem_get_info(model.device)[0] > 2 * size:
        return model.device
    return torch.device("cpu")


def _layers(layers: Sequence[int]) -> str:
    numbers = ", ".join(map(str, layers))
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        numbers = f"{layers[0]}-{layers[-1]}"
    return f"layer {numbers}" if len(layers) == 1 else f"layers {numbers}"


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()

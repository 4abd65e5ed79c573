"""Covariance of keys, E[k k^T], of any layers: the text, one pass over it, and the cached sums it goes on from.

A pass that was interrupted is resumed, and finished sums grow to more tokens. Sums of wide layers fill memory: where
not all fit, a few layers have a pass at a time, and what is finished is read back from the cache when it is asked for.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.errors import BadInput
from kpatch.memory import free_memory
from kpatch.models.mixed_precision import mixed_precision
from kpatch.models.model import Model
from kpatch.models.module_names import require_places
from kpatch.models.partial_forward import Batch, run_to
from kpatch.reporter import SILENT, Advance, Reporter
from kpatch.stats.cache import LayerSums
from kpatch.stats.corpus import SELF
from kpatch.stats.moment import SecondMoment, check
from kpatch.stats.text import Text, open_text
from kpatch.text import format_size, ranges

# Ten rows of 256: measured fastest on two CPU cores, and a whole number of them in 10 f tokens wherever 256 divides f
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
    moments: Mapping[int, SecondMoment] = field(repr=False)

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

    `corpus` is self (sampled from the model with `seed`) or what `corpus.open_corpus` takes; `tokens` is 10 f of the
    widest layer unless given; `row` tokens see each other (256, 128 of `self`, fewer where the model takes fewer);
    `batch_tokens` bounds the memory. Layers and tokens that the cache holds are not computed again: at the same
    `batch_tokens`, resuming after Ctrl-C and asking for more tokens give the same bits as one run. Nothing above the
    last layer still missing is run. Ranks share the sampling of text; rank 0 alone runs over it, and alone has the
    moments.

    Raises BadInput for a layer the model lacks, a text that is too short or cannot be read, keys that are not finite,
    and a full disk. Source: Meng et al. 2023 (MEMIT), eq. 15.
    """
    wanted = sorted(set(layers))
    if not wanted:
        raise BadInput("No layers were given", details=[f"expected layers from 0 to {model.n_layers - 1}"])
    require_places(model, wanted)
    tokens = 10 * max(map(model.key_width, wanted)) if tokens is None else tokens
    if tokens < 1:
        raise BadInput("The covariance needs tokens", details=[f"found `tokens={tokens}`"])
    text = open_text(model, corpus, tokens, seed=seed, row=row, report=report, use_cache=use_cache)
    with text.cache.locked():
        moments = _Pass(model, text, max(1, batch_tokens // text.row), report).run(wanted)
    return Covariance(text.id, text.name, tokens, moments)


class _Kept(Mapping[int, SecondMoment]):
    """Moments of finished layers, each read when it is asked for and not held: a wide one takes a gigabyte."""

    def __init__(self, layers: Sequence[int], read: Callable[[int], SecondMoment]) -> None:
        self.layers, self.read = tuple(layers), read

    def __getitem__(self, layer: int) -> SecondMoment:
        if layer not in self.layers:
            raise KeyError(layer)
        return self.read(layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


class _Pass:
    """Runs over the text for all layers whose sums are not in the cache, in batches of `batch_rows` rows."""

    def __init__(self, model: Model, text: Text, batch_rows: int, report: Reporter) -> None:
        self.model, self.text, self.batch_rows, self.cache, self.report = model, text, batch_rows, text.cache, report
        self.tokens, self.row = text.tokens, text.row
        self.whole = self.tokens // (self.row * batch_rows) * batch_rows  # rows in whole batches

    def run(self, wanted: Sequence[int]) -> Mapping[int, SecondMoment]:
        """The moment of each layer; none on other ranks than 0 where some were missing."""
        done = [layer for layer in wanted if self._finished(layer) is not None]
        missing = distributed.main_does(lambda: [layer for layer in wanted if layer not in done])
        if not missing:
            self.report.note(
                f"Covariance of {_layers(wanted)} from the cache: {self.text.name}, {self.tokens:,} tokens"
            )
            return _Kept(done, self._read)
        if not distributed.is_main():  # the order of a sum decides its last bits, so one rank adds up
            if self.text.source is None:
                self.text.sample()
            return {}
        full = self.tokens % (self.row * self.batch_rows) == 0
        self.cache.require_space(max(map(self.model.key_width, missing)), len(missing) * (1 if full else 2))
        self.ids = self.text.ids()
        at_once = _layers_at_once(self.model, missing, self.cache.folder is not None)
        made: dict[int, SecondMoment] = {}
        for begin in range(0, len(missing), at_once):
            self._run_for(missing[begin : begin + at_once], made)
        if self.cache.folder is None:
            return made
        return _Kept(wanted, self._read)

    def _finished(self, layer: int) -> SecondMoment | None:
        """A layer's moment from the cache, if it is there."""
        kept = self.cache.finished(layer, self.tokens, self.model.key_width(layer))
        if kept is None:
            return None
        moment = kept.moment()
        check(moment, f"layer {layer} of {self.model.name}")
        return moment

    def _read(self, layer: int) -> SecondMoment:
        moment = self._finished(layer)
        if moment is None:
            raise BadInput(
                f"The covariance of layer {layer} of {self.model.name} has gone from the cache since it was collected",
                hint="run the command again",
            )
        return moment

    def _run_for(self, layers: Sequence[int], made: dict[int, SecondMoment]) -> None:
        """One run over the text for some layers, whose sums go to the cache one by one, or else into `made`."""
        sums = self._begin(layers)
        try:
            self._add_up(sums)
            while sums:
                one = sums[0]
                one.sums.to("cpu")
                moment = one.moment()
                check(moment, f"layer {one.layer} of {self.model.name}")
                self.cache.write(one, self.tokens)
                if self.cache.folder is None:
                    made[one.layer] = moment
                sums.pop(0)  # and its memory with it
        except KeyboardInterrupt:
            self.cache.save_progress([one for one in sums if one.rows])
            raise

    def _begin(self, layers: Sequence[int]) -> list[LayerSums]:
        """The sums of `layers` as far as the cache has them."""
        widths = {layer: self.model.key_width(layer) for layer in layers}
        size = sum(map(sums_size, widths.values()))
        if size > _LARGE:
            self.report.note(
                f"The covariance of {len(layers)} layers takes {format_size(size)} of memory and of the cache"
            )
        device = _sums_on(self.model, size)
        sums = []
        for layer in layers:
            kept = self.cache.furthest(layer, widths[layer], self.batch_rows, self.whole)
            sums.append(kept or LayerSums(layer, SecondMoment(widths[layer]), self.batch_rows))
            sums[-1].sums.to(device)
        return sums

    def _add_up(self, sums: list[LayerSums]) -> None:
        """Run over the text and add its keys to the sums."""
        begun = min(one.rows for one in sums)
        if begun:
            self.report.note(f"Resuming after {begun * self.row:,} tokens kept in the cache")
        task = f"Covariance of {_layers([one.layer for one in sums])}"
        with whole_steps() as steps, self.report.task(task, self.tokens, "token") as advance:
            advance(begun * self.row)
            with mixed_precision(self.model):
                self._batches(sums, steps, advance)
                self._tails(sums, advance)

    def _batches(self, sums: list[LayerSums], steps: Steps, advance: Advance) -> None:
        """Whole batches, each for the layers that have not seen it; the sums are kept now and then."""
        saved, pause = time.monotonic(), _SAVE_EVERY
        for start in range(min(one.rows for one in sums), self.whole, self.batch_rows):
            active = [one for one in sums if one.rows == start]
            keys = self._keys(start, self.batch_rows, active)
            for one in active:
                with steps.step():  # a sum and its count of rows change together
                    one.sums.add(keys.pop(one.layer))
                    one.rows += self.batch_rows
                _require_finite(one, self.model)
            advance(self.batch_rows * self.row)
            if time.monotonic() - saved > pause and start + self.batch_rows < self.whole:
                pause = max(_SAVE_EVERY, _SAVE_SHARE * self.cache.save_progress(sums))
                saved = time.monotonic()

    def _tails(self, sums: list[LayerSums], advance: Advance) -> None:
        """What is left over: rows that fill no batch, and a row that is not full."""
        rest = self.tokens // self.row - self.whole
        for rows, columns in ((rest, self.row), (min(1, self.tokens % self.row), self.tokens % self.row)):
            if not rows:
                continue
            first = self.whole if columns == self.row else self.whole + rest
            keys = self._keys(first, rows, sums, columns)
            for one in sums:
                one.tail = one.tail or SecondMoment(self.model.key_width(one.layer))
                one.tail.add(keys.pop(one.layer))
            advance(rows * columns)

    def _keys(self, first: int, rows: int, sums: list[LayerSums], columns: int | None = None) -> dict[int, Tensor]:
        """Keys of `rows` rows from row `first` on, by layer."""
        columns = columns or self.row
        begin = first * self.row
        ids = self.ids[begin : begin + rows * columns].view(rows, columns).to(self.model.device, torch.long)
        positions = torch.arange(columns, device=ids.device).expand(rows, columns)
        layers = [one.layer for one in sums]
        return run_to(self.model, max(layers), Batch(ids, torch.ones_like(ids), positions, 0), layers)


def _require_finite(one: LayerSums, model: Model) -> None:
    if not bool(torch.isfinite(one.sums.diagonal).all()):
        check(one.sums, f"layer {one.layer} of {model.name}")


def sums_size(width: int) -> int:
    """Bytes of the sums of a layer that is `width` wide: float64, the upper triangle."""
    return width * (width + 1) // 2 * 8


def _layers_at_once(model: Model, layers: Sequence[int], streamed: bool) -> int:
    """How many layers' sums a run over the text keeps: as many as half of the free memory holds, but at least two.

    All, where they are not `streamed` to the cache but have to be in memory at the end anyway.
    """
    largest = max(sums_size(model.key_width(layer)) for layer in layers)
    free = free_memory()
    return len(layers) if free is None or not streamed else max(2, free // 2 // largest)


def _sums_on(model: Model, size: int) -> torch.device:
    """Where the sums grow: beside the model on a GPU with room for them (and float64), else on the CPU."""
    if model.device.type == "cuda" and torch.cuda.mem_get_info(model.device)[0] > 2 * size:
        return model.device
    return torch.device("cpu")


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}"


# Ctrl-C between short steps that must not be cut in two


@contextmanager
def whole_steps() -> Iterator[Steps]:
    """While open, Ctrl-C inside `with steps.step():` takes effect at the step's end; elsewhere at once.

    Outside the main thread, which alone is interrupted, and where Ctrl-C is ignored, nothing changes.
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

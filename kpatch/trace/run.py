"""Causal tracing from facts to numbers: batch after batch of facts, each fact kept by content once it is done."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.cache import atomic_write_text, cache_dir
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact, facts_in
from kpatch.memory import bytes_given
from kpatch.models.fingerprint import weights_fingerprint
from kpatch.models.mixed_precision import mixed_precision
from kpatch.models.model import Model, require_loaded
from kpatch.reporter import SILENT, Advance, Reporter
from kpatch.trace.cells import Cell, cells_of, sections, shape
from kpatch.trace.clean_corrupted import run_clean_and_corrupted
from kpatch.trace.engine import trace_cells
from kpatch.trace.fact_lists import built_in
from kpatch.trace.known import Known, ask_one, find_known, subject_items, tokens_of
from kpatch.trace.memory import DEFAULT_BUDGET, MemoryBudget, out_of_memory
from kpatch.trace.noise import draw, spread_of_embeddings

_CODE = 1  # raise it when the same settings come to give other numbers
MOST_FACTS = 100  # traced by default


@dataclass(frozen=True)
class TraceSettings:
    """samples of noise a fact, noise in σ of the embeddings, window in layers; quick: only the curves at S."""

    samples: int = 10
    noise: float = 3.0
    window: int = 10
    seed: int = 0
    quick: bool = False


@dataclass(frozen=True)
class FactTrace:
    """One fact's numbers: P[answer] clean, corrupted (mean over samples), and in every cell (mean over samples).

    grids: kind → [T, L], empty after a quick run; curves [3, L]: plain, MLP severed, attention severed, at the
    subject's last token.
    """

    fact: Fact
    answer: str
    tokens: tuple[str, ...]
    first: int
    last: int
    clean: float
    corrupted: float
    grids: dict[str, Tensor]
    curves: Tensor


@dataclass(frozen=True)
class Traces:
    """All traced facts of a model, and how they came about; sigma is that of the embeddings."""

    model: str
    layers: int
    settings: TraceSettings
    sigma: float
    tried: int
    facts: tuple[FactTrace, ...]
    seconds: float
    device: str = "cpu"
    dtype: str = "float32"


def trace(
    model: Model,
    facts: Sequence[Fact] | None = None,
    *,
    prompt: tuple[str, str] | None = None,
    limit: int | None = MOST_FACTS,
    settings: TraceSettings | None = None,
    budget: int | None = None,
    resume: bool = True,
    report: Reporter = SILENT,
) -> Traces:
    """Trace `facts` (default: the built-in list), or one `prompt` (text with {}, subject).

    Of the facts that the model knows at most `limit` are traced, drawn by the seed. `budget` bounds memory in bytes
    besides the model's own (default 1 GB). With `resume`, what earlier runs found is used. Ranks share the facts.
    Raises BadInput and CheckFailed.
    """
    started = time.monotonic()
    require_loaded(model)
    memory = MemoryBudget(bytes_given(budget, DEFAULT_BUDGET, "budget"))
    settings = settings or TraceSettings()
    _check(model, settings)
    given = built_in() if facts is None else facts_in(facts)
    known: tuple[Known, ...]
    if prompt is not None:
        known, tried = (distributed.main_does(lambda: ask_one(model, *prompt)),), 1
    else:
        if not given:
            raise BadInput("There are no facts to trace")
        selection = distributed.main_does(lambda: find_known(model, given, limit, settings.seed, report))
        known, tried = selection.known, selection.tried
        report.note(f"{model.name} predicts {len(known):,} of {tried:,} facts tried: these are traced")
    sigma = distributed.main_does(lambda: spread_of_embeddings(model, subject_items(model, given)))
    work = _Work(model, settings, settings.noise * sigma, known, resume, report)
    found = work.run(memory)
    return Traces(
        model=model.name,
        layers=model.n_layers,
        settings=settings,
        sigma=sigma,
        tried=tried,
        facts=tuple(found),
        seconds=time.monotonic() - started,
        device=str(model.device),
        dtype=model.precision,
    )


def _check(model: Model, settings: TraceSettings) -> None:
    if not 0 < settings.noise < float("inf"):
        raise BadInput(
            f"`noise={settings.noise:g}` corrupts nothing",
            details=["expected a number above 0, in σ of the embeddings"],
        )
    if settings.samples < 1:
        raise BadInput(f"`samples={settings.samples}` is none", details=["expected 1 or more"])
    if not settings.quick and not 1 <= settings.window <= model.n_layers:
        raise BadInput(
            f"`window={settings.window}` does not fit {model.name}",
            details=[f"expected 1 to {model.n_layers} layers"],
            hint=f"about a third of the layers shows most: `window={max(1, model.n_layers // 3)}`",
        )


Kept = dict[str, dict[str, Any]]  # section → clean, corrupted, values


class _Work:
    """The facts of one run, some of them done before."""

    def __init__(
        self,
        model: Model,
        settings: TraceSettings,
        level: float,
        known: Sequence[Known],
        resume: bool,
        report: Reporter,
    ) -> None:
        self.model, self.settings, self.level, self.known, self.report = model, settings, level, known, report
        self.weights = weights_fingerprint(model, report)
        self.folder = cache_dir("traces")
        self.sections = sections(settings.quick)
        self.kept: list[Kept] = distributed.main_does(lambda: [self._read(fact) if resume else {} for fact in known])

    def run(self, memory: MemoryBudget) -> list[FactTrace]:
        cells = [self._missing(index) for index in range(len(self.known))]
        todo = [index for index, missing in enumerate(cells) if missing]
        if len(todo) < len(cells):
            self.report.note(f"{len(cells) - len(todo):,} of {len(cells):,} facts were traced before")
        batches: list[list[int]] = []  # the same however many ranks there are
        while todo:
            sizes = [(len(self.known[index].item.ids), len(cells[index])) for index in todo]
            count = memory.facts(self.model, sizes, self.settings.samples)
            batches.append(todo[:count])
            todo = todo[count:]
        own = [index for number, batch in enumerate(batches) if distributed.mine(number) for index in batch]
        with self.report.task("Tracing", sum(len(cells[index]) for index in own), "cell") as advance:

            def run(batch: Sequence[int]) -> list[Kept]:
                done = 0
                while done < len(batch):
                    facts = batch[done:]
                    done += self._trace(facts, [cells[index] for index in facts], memory, advance)
                return [self.kept[index] for index in batch]

            with mixed_precision(self.model):
                shared = distributed.share(batches, run)
            for batch, found in zip(batches, shared, strict=True):
                for index, kept in zip(batch, found, strict=True):
                    self.kept[index] = kept
        return [self._result(index) for index in range(len(self.known))]

    def _trace(
        self, facts: Sequence[int], cells: Sequence[dict[Cell, int]], memory: MemoryBudget, advance: Advance
    ) -> int:
        """Trace facts together, or half of them where memory ends; how many."""
        items = [self.known[index].item for index in facts]
        noise = [draw(self.model, item, self.level, self.settings.samples, self.settings.seed) for item in items]
        try:
            runs = run_clean_and_corrupted(self.model, items, noise)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            memory.halve(len(facts) * self.settings.samples, self.settings.samples, self.report, error)
            half = len(facts) // 2
            return self._trace(facts[:half], cells[:half], memory, advance)
        found = trace_cells(runs, [list(several) for several in cells], memory, advance, self.report)
        clean = runs.probabilities
        for number, (index, several, values) in enumerate(zip(facts, cells, found, strict=True)):
            means = values.mean(1).tolist()
            ends = {"clean": float(clean[number]), "corrupted": float(clean[list(runs.corrupted(number))].mean())}
            for section in self._absent(index):
                wanted = cells_of(section, items[number], self.model.n_layers, self.settings.window)
                self.kept[index][section] = {**ends, "values": [means[several[cell]] for cell in wanted]}
            self._write(index)
        return len(facts)

    def _absent(self, index: int) -> list[str]:
        return [section for section in self.sections if section not in self.kept[index]]

    def _missing(self, index: int) -> dict[Cell, int]:
        """The cells still to be run, each once though a grid and a curve may share it, and their places."""
        item = self.known[index].item
        wanted = dict.fromkeys(
            cell
            for section in self._absent(index)
            for cell in cells_of(section, item, self.model.n_layers, self.settings.window)
        )
        return {cell: place for place, cell in enumerate(wanted)}

    def _result(self, index: int) -> FactTrace:
        known, kept = self.known[index], self.kept[index]
        ends = kept[self.sections[0]]
        shaped = {
            name: shape(name, kept[name]["values"], known.item, self.model.n_layers, kept[name]["corrupted"])
            for name in self.sections
        }
        return FactTrace(
            fact=known.fact,
            answer=known.answer,
            tokens=tuple(tokens_of(self.model, known.item)),
            first=known.item.first,
            last=known.item.last,
            clean=ends["clean"],
            corrupted=ends["corrupted"],
            grids={name: grid for name, grid in shaped.items() if name != "severed"},
            curves=shaped["severed"],
        )

    # The cache: one small file a fact and section

    def _path(self, known: Known, section: str) -> Path:
        item, settings = known.item, self.settings
        content = [_CODE, self.weights, self.model.precision, self.model.device.type, item.ids, item.first, item.last]
        content += [item.answer, self.level, settings.samples, settings.seed, section]
        content += [settings.window] if section in ("mlp", "attn") else []
        return self.folder / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()}.json"

    def _write(self, index: int) -> None:
        for section in self.sections:
            path, text = self._path(self.known[index], section), json.dumps(self.kept[index][section])
            if not path.is_file():
                atomic_write_text(path, text)

    def _read(self, known: Known) -> Kept:
        """What earlier runs kept of a fact, whole sections only."""
        found: Kept = {}
        for section in self.sections:
            count = len(cells_of(section, known.item, self.model.n_layers, self.settings.window))
            with suppress(OSError, ValueError, KeyError, TypeError):
                kept = json.loads(self._path(known, section).read_text(encoding="utf-8"))
                numbers = [kept["clean"], kept["corrupted"], *kept["values"]]
                if len(kept["values"]) == count and all(0 <= number <= 1.0001 for number in numbers):
                    found[section] = kept
        return found

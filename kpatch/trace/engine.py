"""The one engine of all grids and curves: corrupted runs with some vectors set, many cells, samples and facts at once.

A cell leaves everything before its first restored token and below its first restored layer as the corrupted run had
it, so only the layers above and the columns from there on are run, on the kept keys and values of what comes before.
Cells with equally many columns share a batch; a cell joins at its layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kpatch.models.fast_forward import few_columns_attention, packed_mlps
from kpatch.models.model import Model
from kpatch.models.partial_forward import Calls
from kpatch.reporter import SILENT, Advance, Reporter
from kpatch.trace.cells import Cell, Point, Site
from kpatch.trace.clean_corrupted import Runs, read
from kpatch.trace.memory import MemoryBudget


@dataclass
class _Job:
    """A cell of one fact, reduced to what can matter: its columns count from its first restored token."""

    fact: int
    place: int  # in the caller's list
    columns: int
    birth: int  # the first layer that is run
    edits: dict[tuple[Site, int], list[tuple[int, bool]]] = field(default_factory=dict)  # (column, clean?)


def trace_cells(
    runs: Runs,
    cells: Sequence[Sequence[Cell]],
    memory: MemoryBudget,
    advance: Advance = lambda amount: None,
    report: Reporter = SILENT,
) -> list[Tensor]:
    """P[answer] in each cell: for each fact of `runs` a tensor [its cells, samples], float64.

    Batches take what `memory` allows; where a device has less, they are halved.
    Raises BadInput when one cell is too much.
    """
    corrupted = [runs.probabilities[list(runs.corrupted(f))] for f in range(len(runs.items))]
    found = [part.expand(len(cells[f]), -1).clone() for f, part in enumerate(corrupted)]
    waiting: dict[int, list[_Job]] = defaultdict(list)
    for fact, several in enumerate(cells):
        for place, cell in enumerate(several):
            job = _reduce(runs, fact, place, cell)
            if job is None:
                advance(1)  # nothing that the noise has reached is changed
            else:
                waiting[job.columns].append(job)
    with few_columns_attention(runs.model):
        for columns, jobs in sorted(waiting.items()):
            run = partial(_run, runs, runs.suffix(columns))
            jobs.sort(key=lambda job: (job.birth, job.fact, job.place))
            for batch, result in memory.batches(jobs, runs, columns, run, report):
                for job, values in zip(batch, result, strict=True):
                    found[job.fact][job.place] = values
                advance(len(batch))
    return found


def _reduce(runs: Runs, fact: int, place: int, cell: Cell) -> _Job | None:
    """The cell without what cannot matter; None where nothing is left.

    That is: tokens before the noise, all that comes before the first restore, and the last layer's outputs that no
    one reads, those of any token but the last.
    """
    item = runs.items[fact]
    end, top = len(item.ids) - 1, runs.model.n_layers - 1
    restored = {p for p in cell.restore if p.token >= item.first and (p.layer < top or p.token == end)}
    if not restored:
        return None
    token = min(point.token for point in restored)
    job = _Job(fact, place, end + 1 - token, min(_entering(point) for point in restored))
    frozen = {p for p in cell.freeze if p.token >= token and (p.layer < top or p.token == end)} - restored
    for points, clean in ((restored, True), (frozen, False)):
        for point in sorted(points, key=lambda point: (point.layer, point.token)):
            if _entering(point) >= job.birth:
                job.edits.setdefault((point.site, point.layer), []).append((point.token - token, clean))
    return job


def _entering(point: Point) -> int:
    """The first layer whose call a point changes: a state changes what enters the next."""
    return point.layer + (point.site == "state")


@dataclass
class _Edits:
    """Values to set at one site of one layer: `values` [m, d] at (rows, columns) of a batch."""

    rows: Tensor
    columns: Tensor
    values: Tensor

    def put(self, into: Tensor) -> None:
        into[self.rows, self.columns] = self.values.to(into.dtype)


@torch.no_grad()
def _run(runs: Runs, calls: Calls, jobs: Sequence[_Job]) -> Tensor:
    """P[answer] of jobs in order of birth, all with equally many columns: [jobs, samples]."""
    model, samples, columns = runs.model, runs.samples, jobs[0].columns
    rows = torch.tensor([row for job in jobs for row in runs.corrupted(job.fact)], device=model.device)
    spots = _spots(jobs)
    hidden = runs.entering[0].new_empty(0, columns, model.width)
    alive = 0
    for layer in range(jobs[0].birth, model.n_layers + 1):
        born = alive
        while born < len(jobs) and jobs[born].birth == layer:
            born += 1
        if born > alive:
            joining = rows[alive * samples : born * samples]
            hidden = torch.cat([hidden, runs.entering[layer][joining, -columns:]])
            alive = born
        entering = _edits(runs, jobs, spots, rows, alive, "state", layer - 1)
        if entering is not None:
            entering.put(hidden)
        if layer == model.n_layers:
            break
        attn = _edits(runs, jobs, spots, rows, alive, "attn", layer)
        mlp = _edits(runs, jobs, spots, rows, alive, "mlp", layer)
        with _outputs_set(model, layer, hidden.shape, attn, mlp), _last_column(model, layer, hidden, mlp):
            hidden = calls.run_rows(hidden, layer, rows[: alive * samples])
    return read(model, hidden[:, -1], runs.answers[rows]).view(len(jobs), samples)


Spots = dict[tuple[Site, int], list[tuple[int, int, bool]]]  # at a site of a layer: job, column, clean?


def _spots(jobs: Sequence[_Job]) -> Spots:
    found: Spots = defaultdict(list)
    for number, job in enumerate(jobs):
        for key, several in job.edits.items():
            found[key] += [(number, column, clean) for column, clean in several]
    return found


def _edits(
    runs: Runs, jobs: Sequence[_Job], spots: Spots, rows: Tensor, alive: int, site: Site, layer: int
) -> _Edits | None:
    """What is set at one site of one layer in the first `alive` jobs of a batch; None: nothing."""
    chosen = [spot for spot in spots.get((site, layer), ()) if spot[0] < alive]
    if not chosen:
        return None
    device, samples, width = rows.device, runs.samples, jobs[0].columns
    job = torch.tensor([spot[0] for spot in chosen], device=device)
    clean = torch.tensor([jobs[spot[0]].fact if spot[2] else -1 for spot in chosen], device=device)
    column = torch.tensor([spot[1] for spot in chosen], device=device).repeat_interleave(samples)
    at = (job[:, None] * samples + torch.arange(samples, device=device)).flatten()  # (m,)
    source = clean.repeat_interleave(samples)
    source = torch.where(source < 0, rows[at], source)  # clean rows come first, one a fact
    values = runs.values[site][layer][source, runs.width - width + column]
    return _Edits(at, column, values)


@contextmanager
def _outputs_set(
    model: Model, layer: int, shape: Sequence[int], attn: _Edits | None, mlp: _Edits | None
) -> Iterator[None]:
    """While open, a^l and m^l of one layer have the given values where they join the residual stream."""
    with ExitStack() as stack:
        for module, edits in ((model.attn_out(layer), attn), (model.mlp_out(layer), mlp)):
            if edits is None:
                continue

            def hook(module: nn.Module, inputs: Any, out: Any, edits: _Edits = edits) -> None:
                out = out[0] if isinstance(out, tuple) else out  # Llama 4's experts say where they sent the tokens
                edits.put(out.view(shape[0], -1, out.shape[-1])[:, -shape[1] :])  # the last of whole rows

            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _last_column(model: Model, layer: int, hidden: Tensor, mlp: _Edits | None) -> Any:
    """In the last layer only the last column is read, so only there its MLP is run."""
    count, columns = hidden.shape[:2]
    if layer < model.n_layers - 1 or columns == 1 or mlp is not None:
        return nullcontext()
    tokens = torch.arange(columns - 1, count * columns, columns, device=hidden.device)
    return packed_mlps(model, layer, layer + 1, tokens, tokens)

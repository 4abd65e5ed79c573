"""The one engine of all grids and curves: corrupted runs with some vectors set, many cells, samples and facts at once.

A cell leaves everything before its first restored token and below its first restored layer as the corrupted run had
it, so only the layers above and the columns from there on are run, on the kept keys and values of what comes before.
Where the subject's first token is restored, its column stays as in the clean run: then the columns behind it are run,
on the clean run's keys and values. MLP outputs that are set, or that nobody reads, are not computed.
Cells with equally many columns share a batch; a cell joins at its layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kpatch.models.fast_forward import few_columns_attention, packed_mlps
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
    behind_clean: bool = False  # what comes before its columns is the clean run's, not the corrupted one's
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
            elif job.columns == 0:
                found[fact][place] = runs.probabilities[fact]
                advance(1)
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
    return _behind_clean(job) if token == item.first else job


def _behind_clean(job: _Job) -> _Job:
    """A job of the subject's first token without that column, where nothing but its state is restored there.

    No token before it has noise, so its column stays clean above the restored layer.
    """
    restored: tuple[Site, int] = ("state", job.birth - 1)
    if [(key, clean) for key, several in job.edits.items() for column, clean in several if column == 0] != [
        (restored, True)
    ]:
        return job
    rest = {key: [(column - 1, clean) for column, clean in several if column] for key, several in job.edits.items()}
    edits = {key: several for key, several in rest.items() if several}
    return replace(job, columns=job.columns - 1, behind_clean=True, edits=edits)


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
        on = into.device
        into[self.rows.to(on), self.columns.to(on)] = self.values.to(into)


@torch.no_grad()
def _run(runs: Runs, calls: Calls, jobs: Sequence[_Job]) -> Tensor:
    """P[answer] of jobs in order of birth, all with equally many columns: [jobs, samples]."""
    model, samples, columns = runs.model, runs.samples, jobs[0].columns
    rows = torch.tensor([row for job in jobs for row in runs.corrupted(job.fact)], device=model.device)
    # Where the keys and values before the columns come from; clean rows come first, one a fact
    sources = [[job.fact] * samples if job.behind_clean else runs.corrupted(job.fact) for job in jobs]
    before = torch.tensor([row for source in sources for row in source], device=model.device)
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
        with _outputs_set(runs, layer, hidden.shape, attn, mlp):
            hidden = calls.run_rows(hidden, layer, before[: alive * samples])
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
    runs: Runs, layer: int, shape: Sequence[int], attn: _Edits | None, mlp: _Edits | None
) -> Iterator[None]:
    """While open, a^l and m^l of one layer have the given values where they join the residual stream.

    The MLP runs on no token whose output is set, and in the last layer on the last column alone, the only one read.
    """
    model = runs.model
    mlp_out = model.mlp_out(layer)
    with ExitStack() as stack:
        wanted = torch.ones(*shape[:2], dtype=torch.bool, device=runs.entering[0].device)
        if layer == model.n_layers - 1:
            wanted[:, :-1] = False
        if mlp is not None and runs.bare_mlps[layer]:
            wanted[mlp.rows, mlp.columns] = False
            mlp_out = model.mlp(layer)  # the whole of it: within, there are the chosen tokens only
        if not wanted.all() and (mlp is None or runs.bare_mlps[layer]):
            tokens = wanted.flatten().nonzero().flatten()
            stack.enter_context(packed_mlps(model, layer, layer + 1, tokens, tokens))
        for module, edits in ((model.attn_out(layer), attn), (mlp_out, mlp)):
            if edits is None:
                continue

            def hook(module: nn.Module, inputs: Any, out: Any, edits: _Edits = edits) -> None:
                out = out[0] if isinstance(out, tuple) else out  # Llama 4's experts say where they sent the tokens
                edits.put(out.view(shape[0], -1, out.shape[-1])[:, -shape[1] :])  # the last of whole rows

            stack.callback(module.register_forward_hook(hook).remove)
        yield

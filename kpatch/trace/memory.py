"""How many cells run together: as many as a number of bytes allows, fewer where a device has less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.models.model import Model
from kpatch.reporter import Reporter

if TYPE_CHECKING:
    from kpatch.trace.clean_corrupted import Runs

DEFAULT_BUDGET = 1_000_000_000  # bytes, besides the model
# Tokens of a batch that fill a processor's cores; larger ones only take memory. A GPU takes what fits.
_ENOUGH = {"cpu": 2048}
_MOST = 1 << 15

Job = TypeVar("Job")


class MemoryBudget:
    """What batches may take, in bytes. It shrinks for good when a device runs out of memory, with one warning."""

    def __init__(self, budget: int = DEFAULT_BUDGET) -> None:
        self.budget = budget
        self.max_rows: int | None = None  # rows, once memory ran out

    def facts(self, model: Model, todo: Sequence[tuple[int, int]], samples: int) -> int:
        """How many of the next facts, each with (tokens, cells), are run together: one or more.

        Only as many as fill a batch, since what is interrupted is lost for all of them.
        """
        count = longest = work = 0
        for length, cells in todo:
            longest = max(longest, length)
            if count and (count + 1) * runs_bytes(model, longest, samples) > self.budget // 4:
                break
            count += 1
            work += cells * samples * length // 2
            if work >= _enough(model):
                break
        return count

    def rows(self, runs: Runs, columns: int) -> int:
        """Rows of a batch with `columns` columns."""
        fits = (self.budget // 2) // row_bytes(runs.model, columns, runs.width)
        fits = min(fits, _enough(runs.model) // columns)
        return max(1, min(fits, self.max_rows or fits))

    def batches(
        self, jobs: Sequence[Job], runs: Runs, columns: int, run: Callable[[Sequence[Job]], Tensor], report: Reporter
    ) -> Iterator[tuple[Sequence[Job], Tensor]]:
        """Run all jobs, batch after batch, halving batches that do not fit the device."""
        done = 0
        while done < len(jobs):
            count = max(1, self.rows(runs, columns) // runs.samples)
            batch = jobs[done : done + count]
            try:
                result = run(batch)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                self.halve(len(batch) * runs.samples, runs.samples, report, error)
                continue
            yield batch, result
            done += len(batch)

    def halve(self, rows: int, samples: int, report: Reporter, error: BaseException) -> None:
        """Allow half of what did not fit. Raises BadInput where that was one cell."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if rows <= samples:
            raise BadInput(
                "The samples of one cell do not fit in this device's memory together",
                hint="give fewer `samples`, or `device=cpu`",
            ) from error
        if self.max_rows is None:
            report.warn(f"out of memory with {rows:,} rows together: continuing with half of them")
        self.max_rows = max(samples, rows // 2)


def out_of_memory(error: BaseException) -> bool:
    """True for a device or a machine that has no memory left; on a CPU that is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def runs_bytes(model: Model, tokens: int, samples: int) -> int:
    """What the kept runs of one fact take: h, m, a and the cache's keys and values of every layer and token."""
    return (samples + 1) * tokens * model.n_layers * 5 * model.width * model.dtype.itemsize


def row_bytes(model: Model, columns: int, tokens: int) -> int:
    """What one row of a batch takes at its peak: about 10 vectors of width d and 4 of width f a column, the joined
    keys and values of all tokens, and the attention scores."""
    heads = int(getattr(model.config, "num_attention_heads", 1) or 1)
    numbers = (
        columns * (10 * model.width + 4 * model.mlp_width) + 6 * tokens * model.width + 2 * heads * columns * tokens
    )
    return numbers * model.dtype.itemsize


def _enough(model: Model) -> int:
    return _ENOUGH.get(model.device.type, _MOST)

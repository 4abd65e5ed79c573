"""Values for all groups of facts: in batches within a memory budget, each kept in the cache by its content.

The batches are the same on every run, so that an interrupted one goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kpatch import distributed
from kpatch.cache import atomic_write, cache_dir
from kpatch.edit.methods import DEFAULT_BUDGET
from kpatch.edit.problem import Search, Values
from kpatch.edit.requests import Group, in_batches
from kpatch.errors import BadInput
from kpatch.memory import give_back
from kpatch.models.fingerprint import weights_fingerprint
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Advance, Reporter

_PADDED = 1.4  # columns that run for each token, where rows are of several lengths


def column_bytes(model: Model, columns: int, prefix: int, layers: int) -> int:
    """What so many columns of a values batch, and of what stands before them, hold for the backward pass, in bytes.

    About 10 vectors of width d and 4 of width f a layer and column, and the prefix's keys and values.
    """
    size = model.dtype.itemsize
    per_column = layers * (10 * model.width + 4 * model.mlp_width) * size
    return columns * per_column + 2 * prefix * layers * model.width * size


def plan(model: Model, groups: Sequence[Group], lowest: int, budget: int = DEFAULT_BUDGET) -> list[list[int]]:
    """Batches of groups for a search that runs layers from `lowest` on: see `requests.in_batches`."""
    layers, vocabulary = model.n_layers - lowest, int(model.config.vocab_size)

    def need(group: Group) -> int:
        predicted = sum(len(row.ids) - row.prompt_len for row in group.rows) + 2 * len(group.drifts)
        rows = len(group.rows) + len(group.drifts)
        # Long rows run apart (`kpatch.edit.problem`), so that little is padded; 1.42 was measured on CounterFact
        columns = min(rows * group.columns, math.ceil(_PADDED * group.tokens))
        return column_bytes(model, columns, math.ceil(_PADDED * group.before), layers) + predicted * vocabulary * 4 * 4

    return in_batches(groups, lambda group: group.columns, need, budget)


_CODE = 6  # raise it when the same settings come to give other values


def find_values(
    model: Model,
    groups: Sequence[Group],
    goal: Search,
    *,
    budget: int,
    keep: bool = True,
    resume: bool = True,
    report: Reporter = SILENT,
) -> Values:
    """Values [n, v, d] of all groups. Memory goes with `budget` (bytes), not with the number of groups.

    Kept by what decides them: weights, rows of ids, the objective, and the batch they were found in, because the
    other rows of a batch affect the last bits. λ and the update decide nothing here.
    Several ranks share the batches, which are the same however many they are.
    Raises BadInput when one group alone does not fit in memory.
    """
    weights = weights_fingerprint(model, report) if keep else ""
    values = torch.empty(len(groups), goal.count, model.width)
    losses, steps = [0.0] * len(groups), [0] * len(groups)
    batches = plan(model, groups, goal.lowest, budget)
    own = sum(len(batch) for number, batch in enumerate(batches) if distributed.mine(number))
    with report.task("Finding values", own * goal.steps, "step") as advance:

        def find(batch: Sequence[int]) -> Values:
            members = [groups[index] for index in batch]
            path = cache_dir("values") / f"{_key(weights, model, members, goal)}.safetensors" if keep else None
            found = _read(path, (len(members), goal.count, model.width)) if path is not None and resume else None
            if found is None:
                found = _within_memory(model, members, goal, advance, report)
                give_back()
                if path is not None:
                    _write(path, found)
            else:
                advance(len(members) * goal.steps)
            return found

        for batch, found in zip(batches, distributed.share(batches, find), strict=True):
            values[batch] = found.values
            for index, loss, step in zip(batch, found.losses, found.steps, strict=True):
                losses[index], steps[index] = loss, step
    return Values(values, tuple(losses), tuple(steps))


def _within_memory(model: Model, groups: Sequence[Group], goal: Search, advance: Advance, report: Reporter) -> Values:
    """The search, in halves where a device has less memory than the budget allowed for."""
    try:
        return goal.search(model, groups, advance)
    except torch.OutOfMemoryError as error:
        if len(groups) == 1:
            raise BadInput(
                f"One fact about {groups[0].subject!r} does not fit in this device's memory",
                hint="shorten its prompts, or take another `device`: the CPU",
            ) from error
        torch.cuda.empty_cache()
        report.warn(f"out of memory with {len(groups)} facts together: continuing with half of them")
    half = len(groups) // 2
    parts = [_within_memory(model, part, goal, advance, report) for part in (groups[:half], groups[half:])]
    return Values(
        torch.cat([part.values for part in parts]), parts[0].losses + parts[1].losses, parts[0].steps + parts[1].steps
    )


def _key(weights: str, model: Model, groups: Sequence[Group], goal: Search) -> str:
    rows = [
        [[row.ids, row.subject_last, row.prompt_len] for row in (*group.rows, *group.drifts)] + [group.bare]
        for group in groups
    ]
    content = [_CODE, weights, model.precision, model.device.type, type(goal).__name__, asdict(goal), rows]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(path: Path, values: Values) -> None:
    tensors = {
        "values": values.values.contiguous(),
        "losses": torch.tensor(values.losses, dtype=torch.float64),
        "steps": torch.tensor(values.steps),
    }
    atomic_write(path, lambda temporary: save_file(tensors, temporary))


def _read(path: Path, shape: tuple[int, int, int]) -> Values | None:
    """Kept values, or None where there are none or they are not whole."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
        values, losses, steps = tensors["values"], tensors["losses"], tensors["steps"]
    except (OSError, SafetensorError, KeyError):
        return None
    if values.shape != shape or not torch.isfinite(values).all() or {len(losses), len(steps)} != {shape[0]}:
        return None
    return Values(values, tuple(losses.tolist()), tuple(int(step) for step in steps))

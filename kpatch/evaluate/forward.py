"""Rows through the network's own forward pass: in batches of little padding, the head only where logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kpatch.models.fast_forward import packed_mlps
from kpatch.models.model import Model

_ENOUGH = 1024  # tokens in a batch before padding may close it: smaller ones do not fill two cores


def batches(
    lengths: Sequence[int], columns: Sequence[int], batch_tokens: int, most_columns: int, filled: float = 0.8
) -> list[list[int]]:
    """Put indices of rows into batches, shortest rows first; `columns` says how many logits each row asks for.

    A batch holds at most `batch_tokens` tokens with its padding and `most_columns` columns of logits, unless a single
    row has more. It is closed before the share of real tokens in it falls below `filled`. Padding costs attention
    alone, since the MLPs leave it out.
    """
    result: list[list[int]] = []
    tokens = asked = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        length = lengths[index]
        padded = (len(result[-1]) + 1) * length if result else 0
        if (
            not result
            or padded > batch_tokens
            or asked + columns[index] > most_columns
            or (tokens >= _ENOUGH and tokens + length < filled * padded)
        ):
            result.append([])
            tokens = asked = 0
        result[-1].append(index)
        tokens += length
        asked += columns[index]
    return result


@torch.no_grad()
def logits_at(
    model: Model, ids: Tensor, rows: Tensor, columns: Tensor, real: Tensor | None = None, **arguments: Any
) -> tuple[Tensor, Any]:
    """Logits [P, V] in float32 after token (rows[p], columns[p]) of ids [B, T], and the network's whole output.

    `real` [B, T] is true where a token is not padding; where it is given, the MLPs leave padding out. `arguments` go
    to the network (mask, positions, cache). The head is the costliest matrix of a small model, and most columns are
    never asked for. So its input is cut down to P rows before it runs.
    """
    ran: list[bool] = []

    def pick(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden: Tensor = inputs[0]  # [B, T, d]
        ran.append(True)
        return hidden[rows.to(hidden.device), columns.to(hidden.device)].unsqueeze(0), *inputs[1:]

    arguments.setdefault("use_cache", False)
    handle = model.net.get_output_embeddings().register_forward_pre_hook(pick)
    packed: Any = nullcontext()
    if real is not None:
        read = torch.unique(rows * ids.shape[1] + columns).to(model.device)
        packed = packed_mlps(model, 0, model.n_layers, real.flatten().nonzero().flatten().to(model.device), read)
    try:
        with packed:
            out = model.net(input_ids=ids.to(model.device), **arguments)
    finally:
        handle.remove()
    # A network that multiplies by its embeddings and calls no head gives every column
    logits: Tensor = out.logits[0] if ran else out.logits[rows.to(out.logits.device), columns.to(out.logits.device)]
    return logits.float(), out


def vocabulary(model: Model) -> int:
    """V, the number of logits in a row."""
    return int(model.net.get_output_embeddings().weight.shape[0])


def window(model: Model) -> int | None:
    """The longest row that the network has positions for; None where its configuration does not say."""
    longest = getattr(model.config, "max_position_embeddings", None)
    return int(longest) if longest else None

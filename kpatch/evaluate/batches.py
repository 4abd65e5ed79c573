"""Rows of different lengths cut into batches that hold little padding."""

from __future__ import annotations

from collections.abc import Sequence

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

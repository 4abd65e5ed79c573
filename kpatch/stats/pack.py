"""Documents → rows of ids without padding: text after text, each row begun as the tokenizer begins one."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.models.load import Model
from kpatch.reporter import SILENT, Reporter

_DOCUMENTS = 256


def row_start(model: Model) -> list[int]:
    """What every row begins with: the BOS, where the tokenizer puts one in front of a text."""
    return [int(model.tokenizer("a").input_ids[0])] if model.adds_bos else []


def pack(
    model: Model, documents: Iterable[str], tokens: int, row: int, where: str = "", report: Reporter = SILENT
) -> Tensor:
    """The first `tokens` tokens of the documents as rows of `row`, end to end: [tokens] int32, row i from i·row on.

    The BOS counts as a token. Row i is the same whatever `tokens` is. Raises BadInput for less text than asked for.
    """
    start = row_start(model)
    inside = row - len(start)  # tokens of text in a row
    needed = tokens // row * inside + max(tokens % row - len(start), 0)
    ids = array("i")
    with report.task("Reading the corpus", needed, "tokens") as advance:
        for batch in _batches(documents, _DOCUMENTS):
            before = len(ids)
            for one in _encode(model.tokenizer, batch):
                ids.extend(one)
            advance(min(len(ids), needed) - before)
            if len(ids) >= needed:
                break
    if len(ids) < needed:
        found = len(ids) + len(start) * -(-len(ids) // inside)
        raise BadInput(
            "The corpus holds less text than asked for",
            where=where or None,
            details=[f"expected {tokens:,} tokens", f"found {found:,}"],
            hint=(f"--tokens {found} uses all of it; " if found else "") + "or give more text, or --corpus self",
        )
    text = torch.frombuffer(ids, dtype=torch.int32)[:needed] if needed else torch.zeros(0, dtype=torch.int32)
    begin = torch.tensor(start, dtype=torch.int32)
    pieces = [piece for at in range(0, needed, inside) for piece in (begin, text[at : at + inside])]
    packed = torch.cat([*pieces, begin])  # a last row shorter than its beginning has no text
    return packed[:tokens].clone()


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # Not verbose: texts longer than the model's context are what we cut rows from
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids  # type: ignore[no-any-return]


def _batches(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    stream = iter(documents)
    while batch := list(islice(stream, size)):
        yield batch

"""Text to take the covariance on: files and hub datasets, read document by document, as it is.

Documents → rows of ids without padding: text after text, each row begun as the tokenizer begins one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.models.fingerprint import file_sha256
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter

SELF = "self"
# A text without blank lines is cut at the end of a line after so many characters
_LONGEST = 1 << 16
_HUB_NAME = re.compile(
    r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
    r"(?::(?P<config>[\w.-]+))?"
    r"(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class Corpus:
    """A text by name, without any path; `identity` decides its content; `documents` reads it from the start.

    `remote` where that takes a network.
    """

    name: str
    identity: str
    documents: Callable[[], Iterator[str]]
    remote: bool = False


def open_corpus(name: str) -> Corpus:
    """The corpus called `name`: a .txt, .jsonl or .parquet file, or a hub dataset as owner/name[:config][@revision].

    JSON Lines and parquet give their column `text`. Raises BadInput for a file that is missing or of another kind, a
    dataset that cannot be reached, or a library that is not installed.
    """
    path = Path(name).expanduser()
    kind = path.suffix.lower()
    if path.is_file():
        if kind not in _READERS:
            raise BadInput(
                "The corpus is of an unknown kind", where=name, details=[f"expected one of {', '.join(_READERS)}"]
            )
        read = _READERS[kind]
        return Corpus(path.name, f"{kind} {file_sha256(path)}", lambda: read(path))
    if path.is_dir():
        raise BadInput("The corpus is a folder", where=name, details=[f"expected one file: {', '.join(_READERS)}"])
    match = _HUB_NAME.fullmatch(name)
    if kind in _READERS or name.startswith((".", "~", os.sep)) or match is None:
        raise BadInput(
            "The corpus was not found",
            where=name,
            hint="give a .txt, .jsonl or .parquet file, a hub dataset (owner/name), or self",
        )
    return _hub(match["repo"], match["config"], match["revision"])


def _text(path: Path) -> Iterator[str]:
    """Paragraphs with the blank lines that end them: put together they are the file again."""
    lines: list[str] = []
    size = 0
    with open(path, encoding="utf-8-sig", newline="\n") as stream:
        for line in _decoded(stream, path):
            lines.append(line)
            size += len(line)
            if not line.strip() or size > _LONGEST:
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def _decoded(stream: Iterator[str], path: Path) -> Iterator[str]:
    number = 0
    try:
        for number, line in enumerate(stream, 1):  # noqa: B007 - the error names it
            yield line
    except UnicodeDecodeError as error:
        raise BadInput(
            "The corpus is not UTF-8 text", where=f"{path.name}, after line {number}", details=[error.reason]
        ) from error
    except OSError as error:
        raise BadInput("The corpus cannot be read", where=str(path), details=[error.strerror or str(error)]) from error


def _json_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as stream:
        for number, line in enumerate(_decoded(stream, path), 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise BadInput("A line of the corpus is not JSON", where=where, details=[str(error)]) from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise BadInput("A line of the corpus has no text", where=where, details=['expected {"text": "…"}'])
            yield _record(record["text"])


def _parquet(path: Path) -> Iterator[str]:
    parquet = _library("pyarrow.parquet", "a parquet file")
    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if "text" not in columns:
            raise BadInput(
                "The corpus has no column 'text'", where=path.name, details=[f"found {', '.join(columns) or 'none'}"]
            )
        for batch in file.iter_batches(batch_size=1024, columns=["text"]):
            for value in batch.column(0):
                if value.is_valid:
                    yield _record(str(value.as_py()))
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise BadInput(
            "The corpus is no parquet file that can be read", where=path.name, details=[_first_line(error)]
        ) from error


def _hub(repo: str, config: str | None, revision: str | None) -> Corpus:
    """A dataset of the hub at one commit, its split `train`, streamed."""
    where = f"{repo}:{config}" if config else repo
    datasets = _library("datasets", "a hub dataset")
    try:
        if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
            from huggingface_hub import HfApi

            revision = str(HfApi().dataset_info(repo, revision=revision).sha)
    except Exception as error:  # network, hub and datasets raise what they like
        raise _unreachable(where, error) from error

    def documents() -> Iterator[str]:
        try:
            rows = datasets.load_dataset(repo, config, split="train", revision=revision, streaming=True)
            for row in rows:
                if not isinstance(row.get("text"), str):
                    raise BadInput(
                        "The corpus has no column 'text'", where=where, details=[f"found {', '.join(row) or 'none'}"]
                    )
                yield _record(row["text"])
        except BadInput:
            raise
        except Exception as error:
            raise _unreachable(where, error) from error

    return Corpus(where, f"hub {where}@{revision}", documents, remote=True)


def _unreachable(where: str, error: Exception) -> BadInput:
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    return BadInput(
        "The corpus could not be read from the hub",
        where=where,
        details=["HF_HUB_OFFLINE is set" if offline else _first_line(error)],
        hint="the default, `corpus=self`, needs no data; a text file needs no network",
    )


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(
            f"Reading {what} needs the package {name.partition('.')[0]}",
            hint='pip install "kpatch[corpus]"; .txt and .jsonl files need nothing',
        ) from error


def _record(text: str) -> str:
    """Records follow each other as paragraphs do."""
    return text + "\n\n"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}


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
    with report.task("Reading the corpus", needed, "token") as advance:
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
            hint=(f"`tokens={found}` uses all of it; " if found else "") + "or give more text, or `corpus=self`",
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

"""The text that statistics are taken on: the first tokens of a corpus, or of what the model writes, in equal rows.

All that decides the text and what a model makes of it names a folder of the cache, which the statistics share.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.models.fingerprint import tokenizer_hash, weights_fingerprint
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Advance, Reporter
from kpatch.stats.cache import StatisticsCache, canonical
from kpatch.stats.corpus import SELF, Corpus, open_corpus, pack
from kpatch.stats.self_text import group_rows, sample_group

# Anything that changes keys, sums or the text they are taken on changes this number.
VERSION = 2
ROW = 256
# Sampling goes one token at a time through all rows at once: half as long is a third faster, and was as good for edits
SELF_ROW = 128
_BEGINNING = "beginning.safetensors"
_KEPT = 1 << 16  # tokens of a corpus


@dataclass(frozen=True)
class Text:
    """The first `tokens` tokens of a corpus, or of what the model itself writes (no `source`), in rows of `row`.

    `settings` are all that decides the text and its keys but the number of tokens; `cache` is their folder.
    """

    model: Model
    source: Corpus | None
    tokens: int
    row: int
    seed: int
    settings: dict[str, Any]
    cache: StatisticsCache
    report: Reporter

    @property
    def name(self) -> str:
        return SELF if self.source is None else self.source.name

    @property
    def id(self) -> str:
        """SHA-256 of the settings and the number of tokens."""
        return hashlib.sha256(canonical({**self.settings, "tokens": self.tokens}).encode()).hexdigest()

    def ids(self) -> Tensor:
        """The rows, end to end: [tokens] int32."""
        if self.source is not None:
            return self._read(self.source)
        sampled = self.sample()
        groups = [
            self.cache.group(number, partial(sampled.__getitem__, number))  # what other ranks have sampled is kept
            if number in sampled
            else self._group(number)
            for number in self._numbers()
        ]
        return torch.cat(groups).flatten()[: self.tokens]

    def _read(self, source: Corpus) -> Tensor:
        """The first tokens of a corpus; of one on the hub the beginning is kept, for what wants no more of it."""
        kept = self.cache.kept(_BEGINNING, lambda _, tensors: tensors["ids"]) if source.remote else None
        if kept is not None and len(kept) >= self.tokens:
            return kept[: self.tokens]
        ids = pack(self.model, source.documents(), self.tokens, self.row, source.name, self.report)
        if source.remote and (kept is None or len(kept) < min(len(ids), _KEPT)):
            self.cache.keep(_BEGINNING, {"ids": ids[:_KEPT].clone()}, {})
        return ids

    def sample(self) -> dict[int, Tensor]:
        """The groups of text that rank 0's cache lacks, each [G, row], sampled by all ranks."""
        numbers = self._numbers()
        new = distributed.main_does(lambda: [number for number in numbers if not self.cache.has_group(number)])
        if not new:
            return {}
        own = sum(distributed.mine(place) for place in range(len(new))) * group_rows(self.model, self.row) * self.row
        with self.report.task("Sampling text from the model", own, "token") as advance:
            made = distributed.share(new, lambda number: self._group(number, advance))
        return dict(zip(new, made, strict=True))

    def _numbers(self) -> range:
        return range(-(-self.tokens // (group_rows(self.model, self.row) * self.row)))

    def _group(self, number: int, advance: Advance = lambda amount: None) -> Tensor:
        return self.cache.group(number, lambda: sample_group(self.model, self.row, self.seed, number, advance))


def open_text(
    model: Model,
    corpus: str,
    tokens: int,
    *,
    seed: int = 0,
    row: int | None = None,
    report: Reporter = SILENT,
    use_cache: bool = True,
) -> Text:
    """The first `tokens` tokens of `corpus`: self, or what `open_corpus` takes; `row` tokens see each other.

    Without `row`, 256 do (128 of self), fewer where the model takes fewer. Nothing is read or sampled yet. Raises
    BadInput as `open_corpus` does.
    """
    row = row or (SELF_ROW if corpus == SELF else ROW)
    row = max(2, min(row, int(getattr(model.config, "max_position_embeddings", None) or row)))
    source = None if corpus == SELF else open_corpus(corpus)
    settings = _settings(model, source, row, seed, report)
    about = {"model": model.name, "corpus": source.name if source is not None else SELF}
    cache = StatisticsCache(settings, about, keep=use_cache and distributed.is_main(), report=report)
    return Text(model, source, tokens, row, seed, settings, cache, report)


def _settings(model: Model, source: Corpus | None, row: int, seed: int, report: Reporter) -> dict[str, Any]:
    """All that decides the text and its keys."""
    config = json.loads(model.net.config.to_json_string(use_diff=True))
    for volatile in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    settings: dict[str, Any] = {
        "version": VERSION,
        "weights": weights_fingerprint(model, report),
        "config": hashlib.sha256(canonical(config).encode()).hexdigest(),
        "tokenizer": tokenizer_hash(model.tokenizer),
        "dtype": model.precision,
        "corpus": source.identity if source is not None else SELF,
        "row": row,
    }
    return settings if source is not None else {**settings, "seed": seed, "group": group_rows(model, row), "draws": 2}

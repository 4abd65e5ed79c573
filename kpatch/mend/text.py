"""Rows of text that an edited model must go on as before: its own writing, or a corpus."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kpatch.cache import atomic_write, cache_dir
from kpatch.mend.data import text_rows
from kpatch.mend.rows import Ids
from kpatch.models.fingerprint import weights_fingerprint
from kpatch.models.model import Model, tokenizer_hash
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.corpus import SELF, open_corpus, pack
from kpatch.stats.self_text import group_rows, sample_group

_CODE = 1  # raise it when the same settings come to give another text


def locality_text(
    model: Model, corpus: str, seed: int, size: tuple[int, int], report: Reporter = SILENT
) -> tuple[Ids, ...]:
    """Rows of text, as many at most and as long as `size` says.

    They are what the model writes by itself, which is kept in the cache, or the beginning of a corpus.
    Raises BadInput for a corpus that cannot be read or is too short.
    """
    count, row = size
    row = max(2, min(row, int(getattr(model.config, "max_position_embeddings", None) or row)))
    if corpus != SELF:
        source = open_corpus(corpus)
        return text_rows(pack(model, source.documents(), count * row, row, source.name, report).view(-1, row))
    content = [_CODE, weights_fingerprint(model, report), tokenizer_hash(model.tokenizer), str(model.dtype)]
    name = hashlib.sha256(json.dumps([*content, model.device.type, seed, row]).encode()).hexdigest()
    path = cache_dir("mend") / f"text-{name}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        return text_rows(load_file(path)["ids"])[:count]
    with report.task("Sampling text from the model", group_rows(model, row) * row, "token") as advance:
        ids: torch.Tensor = sample_group(model, row, seed, 0, advance)
    atomic_write(path, lambda temporary: save_file({"ids": ids}, temporary))
    return text_rows(ids)[:count]

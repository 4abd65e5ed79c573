"""E_subj[k k^T]: the keys of well-known subjects at their last token, which an edit of other subjects must not move.

Every subject that comes with kpatch stands in statements of its own. Those that a patch is about, and those that its
neighbors name, are taken out of the sum: the former are what it changes, the latter are there to measure it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from kpatch.facts.conflicts import words_of
from kpatch.facts.fact import Fact
from kpatch.facts.tokens import Encoded, Item, encode_many
from kpatch.models.fingerprint import tokenizer_hash, weights_fingerprint
from kpatch.models.mixed_precision import mixed_precision
from kpatch.models.model import Model
from kpatch.models.partial_forward import align, run_to
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.cache import LayerSums, StatisticsCache
from kpatch.stats.moment import SecondMoment
from kpatch.stats.subjects import statements, subjects

_ROWS = 256  # statements at once
_TAKEN = 2  # of so many subjects in the list, one: 2,600 hold what all of them would, in half the time
_VERSION = 1  # raise it when the same settings come to give other sums


def told() -> tuple[tuple[str, str], ...]:
    """(statement with {}, name) of every subject that is taken: one each, the statements of its kind in turn."""
    everyone = enumerate(subjects())
    return tuple(
        (statements(one)[number // _TAKEN % len(statements(one))], one.name)
        for number, one in everyone
        if number % _TAKEN == 0
    )


def left_out(facts: Sequence[Fact]) -> frozenset[str]:
    """Names of shipped subjects that the facts are about or that their neighbors name."""
    texts = [fact.subject for fact in facts]
    texts += [neighbor.prompt for fact in facts for neighbor in fact.neighbors]
    named = " ".join(f" {' '.join(words_of(text))} " for text in texts)
    return frozenset(name for _, name in told() if f" {_without_article(name)} " in named)


def _without_article(name: str) -> str:
    words = words_of(name)
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)


def subject_moments(
    model: Model, layers: Sequence[int], facts: Sequence[Fact], report: Reporter = SILENT
) -> dict[int, SecondMoment]:
    """Σ k k^T by layer over the subjects that the facts leave untouched, one key each.

    The sum over all subjects is kept in the cache; what is left out is run again and subtracted, in float64.
    A subject that is the first token of its text is passed over: its key there is that of the attention sink.
    """
    everyone, out = told(), left_out(facts)
    whole = _whole(model, layers, everyone, report)
    some = _sums(model, layers, [row for row in everyone if row[1] in out], report)
    return {layer: _without(whole[layer], some[layer]) for layer in layers}


def _whole(
    model: Model, layers: Sequence[int], everyone: Sequence[tuple[str, str]], report: Reporter
) -> dict[int, SecondMoment]:
    settings = {
        "subjects": _VERSION,
        "statements": hashlib.sha256(json.dumps(everyone).encode()).hexdigest(),
        "weights": weights_fingerprint(model, report),
        "tokenizer": tokenizer_hash(model.tokenizer),
        "dtype": model.precision,
    }
    cache = StatisticsCache(settings, {"model": model.name, "corpus": "subjects"}, keep=True, report=report)
    with cache.locked():
        count = len(everyone)
        kept = {layer: cache.finished(layer, count, model.key_width(layer)) for layer in layers}
        found = {layer: sums.moment() for layer, sums in kept.items() if sums is not None}
        missing = [layer for layer in layers if layer not in found]
        if missing:
            found |= _sums(model, missing, everyone, report)
            for layer in missing:
                cache.write(LayerSums(layer, found[layer], _ROWS, count), count)
    return found


@torch.no_grad()
def _sums(
    model: Model, layers: Sequence[int], spoken: Sequence[tuple[str, str]], report: Reporter
) -> dict[int, SecondMoment]:
    sums = {layer: SecondMoment(model.key_width(layer)) for layer in layers}
    rows = encode_many(model.tokenizer, [Item(template, name) for template, name in spoken])
    rows = sorted((row for row in rows if row.subject_last > 0), key=lambda row: row.subject_last)
    with report.task("Keys of other subjects", len(rows), "subject") as advance, mixed_precision(model):
        for begin in range(0, len(rows), _ROWS):
            some = rows[begin : begin + _ROWS]
            for layer, keys in keys_of(model, layers, some).items():
                sums[layer].add(keys)
            advance(len(some))
    return sums


@torch.no_grad()
def keys_of(model: Model, layers: Sequence[int], rows: Sequence[Encoded]) -> dict[int, Tensor]:
    """Keys [n, f] by layer at the last token of the subject."""
    ids = [row.ids[: row.subject_last + 1] for row in rows]
    batch = align(ids, [len(row) - 1 for row in ids], model.pad_id, model.device)
    return {layer: keys[:, -1].cpu() for layer, keys in run_to(model, max(layers), batch, list(layers)).items()}


def _without(whole: SecondMoment, some: SecondMoment) -> SecondMoment:
    return SecondMoment.from_total(whole.total - some.total, whole.count - some.count)

"""The data sets that can be read: one row each, in the order of detection.

A row's function takes a record as it was published and gives the facts in it, with the keys of a fact file. Nothing is
checked there but what is needed to find the parts; the rules for facts are those of every fact file. Scalars arrive as
text, null as "".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kpatch.facts.fact import FACT_KEYS
from kpatch.facts.importers.counterfact import akew, counterfact, easyedit, known, mquake, request
from kpatch.facts.importers.grouped import RIPPLE, cknowedit, knowedit, ripple, uniedit
from kpatch.facts.importers.questions import hallu, wikibigedit, zsre
from kpatch.facts.importers.record import Draft

Raw = Mapping[str, Any]


class Format(NamedTuple):
    """A data set's name, what it is, whether a record is one of its own, and the facts in a record."""

    name: str
    about: str
    fits: Callable[[Raw], bool]
    facts: Callable[[Raw, str], list[Draft]]


def _fact(record: Raw, _: str) -> list[Draft]:
    return [{key: record[key] for key in record}]


def _has(*keys: str) -> Callable[[Raw], bool]:
    return lambda record: all(key in record for key in keys)


def _is_akew(record: Raw) -> bool:
    edits = record.get("requested_rewrite")
    edit = edits[0] if isinstance(edits, list) and edits else edits
    return isinstance(edit, Mapping) and "fact_new_uns" in edit


def _is_knowedit(record: Raw) -> bool:
    groups = (record.get("portability"), record.get("locality"))
    return any(isinstance(group, Mapping) for group in groups) or "labels" in record or "concept" in record


def _is_uniedit(record: Raw) -> bool:
    return isinstance(record.get("edit"), Mapping) and "subject" in record["edit"]


def _is_ripple(record: Raw) -> bool:
    return ("target_new" in record or "edit" in record) and any(isinstance(record.get(key), list) for key in RIPPLE)


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("akew", "AKEW, with a text about each answer", _is_akew, akew),
        Format(
            "counterfact",
            "CounterFact and multi_counterfact, as published",
            lambda record: isinstance(record.get("requested_rewrite"), Mapping),
            counterfact,
        ),
        Format("mquake", "the edits of MQuAKE", _has("requested_rewrite"), mquake),
        Format("zsre", "zsRE in MEND's form", _has("src", "alt", "answers"), zsre),
        Format("wikibigedit", "WikiBigEdit", _has("update", "ans"), wikibigedit),
        Format("hallu", "HalluEditBench", _has("question", "object", "subject"), hallu),
        Format("known", "known facts for causal tracing", _has("attribute", "prompt"), known),
        Format("uniedit", "UniEdit", _is_uniedit, uniedit),
        Format("cknowedit", "CKnowEdit", _has("prompt", "target_old", "target_new"), cknowedit),
        Format("ripple", "RippleEdits, as published or in the flat shape", _is_ripple, ripple),
        Format("knowedit", "KnowEdit", _is_knowedit, knowedit),
        Format(
            "memit",
            "requests as the authors' code takes them",
            lambda record: isinstance(record.get("target_new"), Mapping),
            request,
        ),
        Format("easyedit", "EasyEdit's flat form", _has("prompt", "target_new"), easyedit),
        Format(
            "facts",
            "a fact file of kpatch",
            lambda record: _has("subject", "target")(record) and set(record) <= set(FACT_KEYS),
            _fact,
        ),
    )
}

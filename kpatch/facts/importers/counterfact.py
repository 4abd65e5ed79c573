"""CounterFact and its kin: records with one rewrite each, nested as published or flat.

CounterFact and multi_counterfact: Meng et al. 2022 and 2023. Bare requests are what their code takes. MQuAKE: Zhong
et al. 2023. AKEW: Wu et al. 2024, the same records with a text about each new answer. Known facts: Meng et al. 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpatch.facts.fact import fill
from kpatch.facts.importers.record import (
    Draft,
    answer_of,
    draft,
    neighbors,
    object_of,
    slotted,
    texts_of,
)

_Record = Mapping[str, Any]
# Keys that the flat form has no name for keep ours
_OWN = ("negated", "reversed", "choices", "yes_question", "no_question", "same_subject")


def counterfact(record: _Record, _: str) -> list[Draft]:
    fact = _rewrite(object_of(record["requested_rewrite"], "requested_rewrite"))
    fact["id"] = str(record.get("case_id", ""))
    fact["paraphrases"] = [*fact.get("paraphrases", []), *texts_of(record.get("paraphrase_prompts"))]
    fact["neighbors"] = neighbors(record.get("neighborhood_prompts"), fact.get("was", ""))
    fact["openings"] = list(dict.fromkeys(texts_of(record.get("generation_prompts"))))
    return [fact]


def mquake(record: _Record, _: str) -> list[Draft]:
    """Multi-hop questions have no place in a fact file; the edits do."""
    facts = []
    for number, edit in enumerate(record["requested_rewrite"]):
        fact = _rewrite(object_of(edit, "requested_rewrite"))
        fact["id"] = f"{record.get('case_id', '')}-{number}".lstrip("-")
        facts.append(fact)
    return facts


def akew(record: _Record, target: str) -> list[Draft]:
    """As CounterFact or MQuAKE, according to whether a record has one rewrite or a list."""
    nested = isinstance(record["requested_rewrite"], list)
    return (mquake if nested else counterfact)(record, target)


def request(record: _Record, _: str) -> list[Draft]:
    return [_rewrite(record)]


def _rewrite(edit: _Record) -> Draft:
    return draft(
        edit.get("subject"),
        edit.get("prompt"),
        edit.get("target_new"),
        edit.get("target_true", ""),
        relation=edit.get("relation_id", ""),
        paraphrases=texts_of(edit.get("question")),
        references=texts_of(edit.get("fact_new_uns")),
    )


def easyedit(record: _Record, _: str) -> list[Draft]:
    """The flat form of CounterFact that EasyEdit reads; lists may stand where it has one text."""
    return [
        draft(
            record.get("subject"),
            record.get("prompt"),
            record.get("target_new"),
            record.get("ground_truth", ""),
            space=record.get("space", ""),
            relation=record.get("relation_id", ""),
            id=str(record.get("case_id", "")),
            source=record.get("source", ""),
            paraphrases=texts_of(record.get("rephrase_prompt")),
            neighbors=neighbors(record.get("locality_prompt"), record.get("locality_ground_truth", "")),
            openings=texts_of(record.get("generation_prompts")),
            references=texts_of(record.get("references")),
            hops=_hops(record),
            **{key: record.get(key, "") for key in _OWN},
        )
    ]


def _hops(record: _Record) -> list[Draft]:
    """Without an answer there is no hop, and its prompt is reported as left out."""
    answer = record.get("portability_ground_truth", "")
    return neighbors(record.get("portability_prompt"), answer) if answer else []


def to_easyedit(fact: _Record) -> dict[str, Any]:
    """A fact's data in EasyEdit's flat form: what `easyedit` reads back."""
    subject, prompt = fact["subject"], fill(fact["prompt"], fact["subject"])
    sides: list[Draft] = fact.get("neighbors", [])
    record = {
        "case_id": fact.get("id"),
        "prompt": prompt if slotted(prompt, subject) == (fact["prompt"], subject) else fact["prompt"],
        "target_new": fact["target"],
        "space": fact.get("space"),
        "subject": subject,
        "ground_truth": fact.get("was"),
        "rephrase_prompt": _one([fill(text, subject) for text in fact.get("paraphrases", [])]),
        "locality_prompt": _one([side["prompt"] for side in sides]),
        "locality_ground_truth": _one([side.get("target", "") for side in sides]),
        "relation_id": fact.get("relation"),
        "source": fact.get("source"),
        "generation_prompts": [fill(text, subject) for text in fact.get("openings", [])],
        "references": fact.get("references"),
        "portability_prompt": _one([hop["prompt"] for hop in fact.get("hops", [])]),
        "portability_ground_truth": _one([hop["target"] for hop in fact.get("hops", [])]),
        **{key: fact.get(key) for key in _OWN},
    }
    return {key: value for key, value in record.items() if value not in (None, [], "")}


def known(record: _Record, _: str) -> list[Draft]:
    """Known facts for causal tracing."""
    more = {"relation": record.get("relation_id", ""), "id": str(record.get("known_id", ""))}
    return [draft(record.get("subject"), record.get("prompt"), answer_of(record.get("attribute")), **more)]


def _one(texts: list[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else texts

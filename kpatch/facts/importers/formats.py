"""One small function per data set: a record as it was published → the facts in it, as a fact file has them.

Nothing is checked here but what is needed to find the parts; the rules for facts are those of every fact file.
Each source is named at its function; scalars arrive as text, null as "".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from kpatch.facts.fact import FACT_KEYS, SLOT, fill

Record = Mapping[str, Any]
Draft = dict[str, Any]
ALT, ANSWERS = "alt", "answers"


class RecordError(ValueError):
    """A record lacks what its format says it has; the message is for the user."""


class Format(NamedTuple):
    """A data set's name, what it is, how one of its records is told, and the facts in a record."""

    name: str
    about: str
    fits: Callable[[Record], bool]
    facts: Callable[[Record, str], list[Draft]]


def slotted(prompt: str, subject: str) -> tuple[str, str]:
    """The prompt with {} where the subject first stands as a word, and the subject as the prompt writes it.

    A prompt that has its {} or does not name the subject comes back as it is.
    """
    if SLOT in prompt or not subject:
        return prompt, subject
    word = rf"(?<!\w){re.escape(subject)}(?!\w)"
    patterns = ((word, 0), (re.escape(subject), 0), (word, re.IGNORECASE))
    found = next((match for pattern, flags in patterns if (match := re.search(pattern, prompt, flags))), None)
    return (
        (prompt, subject) if found is None else (f"{prompt[: found.start()]}{SLOT}{prompt[found.end() :]}", found[0])
    )


def draft(subject: Any, prompt: Any, target: Any, was: Any = "", **more: Any) -> Draft:
    """A fact's data, with the subject's place found and nothing empty in it."""
    subject, prompt = _text(subject, "subject"), _text(prompt, "prompt")
    prompt, subject = slotted(prompt, subject)
    found = {"subject": subject, "prompt": prompt, "target": _value(target), "was": _value(was), **more}
    return {key: value for key, value in found.items() if value not in ("", [], None)}


def neighbors(prompts: Any, targets: Any) -> list[Draft]:
    """Neighbors from prompts and their answers, each one text or a list; one answer may serve all prompts."""
    texts = _list(prompts)
    answers = _list(targets) if isinstance(targets, list) else [targets] * len(texts)
    if len(answers) != len(texts):
        raise RecordError(f"{len(texts)} neighborhood prompts have {len(answers)} answers")
    pairs = zip(texts, answers, strict=True)
    return [{"prompt": text, **({"target": answer} if answer else {})} for text, answer in pairs if text]


# CounterFact and multi_counterfact: Meng et al. 2022 and 2023. Bare requests are what their code takes.


def counterfact(record: Record, _: str) -> list[Draft]:
    edit = _mapping(record["requested_rewrite"], "requested_rewrite")
    fact = _rewrite(edit)
    fact["id"] = str(record.get("case_id", ""))
    fact["paraphrases"] = _list(record.get("paraphrase_prompts"))
    fact["neighbors"] = neighbors(record.get("neighborhood_prompts"), fact.get("was", ""))
    fact["openings"] = list(dict.fromkeys(_list(record.get("generation_prompts"))))
    return [fact]


def request(record: Record, _: str) -> list[Draft]:
    return [_rewrite(record)]


def _rewrite(edit: Record) -> Draft:
    more = {"relation": edit.get("relation_id", "")}
    return draft(edit.get("subject"), edit.get("prompt"), edit.get("target_new"), edit.get("target_true", ""), **more)


# MQuAKE: Zhong et al. 2023. Its multi-hop questions have no place in a fact file; the edits do.


def mquake(record: Record, _: str) -> list[Draft]:
    facts = []
    for number, edit in enumerate(record["requested_rewrite"]):
        fact = _rewrite(_mapping(edit, "requested_rewrite"))
        fact["id"] = f"{record.get('case_id', '')}-{number}".lstrip("-")
        fact["paraphrases"] = _list(edit.get("question"))
        facts.append(fact)
    return facts


# The flat form of CounterFact that EasyEdit reads; lists may stand where it has one text.


def easyedit(record: Record, _: str) -> list[Draft]:
    return [
        draft(
            record.get("subject"),
            record.get("prompt"),
            record.get("target_new"),
            record.get("ground_truth", ""),
            relation=record.get("relation_id", ""),
            id=str(record.get("case_id", "")),
            source=record.get("source", ""),
            paraphrases=_list(record.get("rephrase_prompt")),
            neighbors=neighbors(record.get("locality_prompt"), record.get("locality_ground_truth", "")),
            openings=_list(record.get("generation_prompts")),
            references=_list(record.get("references")),
        )
    ]


def to_easyedit(fact: Record) -> dict[str, Any]:
    """A fact's data in EasyEdit's flat form: what `easyedit` reads back."""
    subject, prompt = fact["subject"], fill(fact["prompt"], fact["subject"])
    sides: list[Draft] = fact.get("neighbors", [])
    record = {
        "case_id": fact.get("id"),
        "prompt": prompt if slotted(prompt, subject) == (fact["prompt"], subject) else fact["prompt"],
        "target_new": fact["target"],
        "subject": subject,
        "ground_truth": fact.get("was"),
        "rephrase_prompt": _one([fill(text, subject) for text in fact.get("paraphrases", [])]),
        "locality_prompt": _one([side["prompt"] for side in sides]),
        "locality_ground_truth": _one([side.get("target", "") for side in sides]),
        "relation_id": fact.get("relation"),
        "source": fact.get("source"),
        "generation_prompts": [fill(text, subject) for text in fact.get("openings", [])],
        "references": fact.get("references"),
    }
    return {key: value for key, value in record.items() if value not in (None, [], "")}


# zsRE as MEND evaluates on it: Mitchell et al. 2022. MEMIT teaches the true answer, EasyEdit the false `alt`.


def zsre(record: Record, target: str) -> list[Draft]:
    answers = _list(record.get("answers"))
    true = answers[0] if answers else ""
    wanted, was = (true, "") if target == ANSWERS else (record.get("alt", ""), true)
    question = str(record.get("loc", ""))
    question += "?" * (bool(question) and not question.endswith("?"))  # as in MEMIT's own reading of the set
    return [
        draft(
            record.get("subject"),
            record.get("src"),
            wanted,
            was,
            paraphrases=_list(record.get("rephrase")),
            neighbors=neighbors(question, record.get("loc_ans", "")),
        )
    ]


# Known facts for causal tracing: Meng et al. 2022.


def known(record: Record, _: str) -> list[Draft]:
    more = {"relation": record.get("relation_id", ""), "id": str(record.get("known_id", ""))}
    return [draft(record.get("subject"), record.get("prompt"), record.get("attribute"), **more)]


# KnowEdit: Zhang et al. 2024. Names differ between its parts; answers are lists of lists.


def knowedit(record: Record, _: str) -> list[Draft]:
    target = _value(record.get("target_new") or record.get("labels"))
    aliases = _items(record.get("portability"), ("Subject_Aliasing",))
    paraphrases = _list(record.get("rephrase") or record.get("rephrase_prompt"))
    paraphrases += [prompt for prompt, answer in aliases if answer == target]
    return [
        draft(
            record.get("subject") or record.get("concept"),
            record.get("prompt") or record.get("text"),
            target,
            record.get("ground_truth", ""),
            id=str(record.get("case_id", "")),
            paraphrases=paraphrases,
            neighbors=[
                {"prompt": prompt, **({"target": answer} if answer else {})}
                for prompt, answer in _items(record.get("locality"))
            ],
        )
    ]


def _items(groups: Any, names: tuple[str, ...] | None = None) -> Iterator[tuple[str, str]]:
    """Prompts with their first answers from {name: [{prompt, ground_truth}]}; a group may hold lists of such."""
    for name, items in (groups or {}).items():
        if names is None or name in names:
            for item in _flat(items):
                if isinstance(item, Mapping) and item.get("prompt"):
                    yield _text(item["prompt"], "prompt"), _value(item.get("ground_truth", ""))


def fact(record: Record, _: str) -> list[Draft]:
    return [dict(record)]


def _has(*keys: str) -> Callable[[Record], bool]:
    return lambda record: all(key in record for key in keys)


# In the order of detection: the first that fits is taken.
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "counterfact",
            "CounterFact and multi_counterfact, as published",
            lambda record: isinstance(record.get("requested_rewrite"), Mapping),
            counterfact,
        ),
        Format("mquake", "the edits of MQuAKE", _has("requested_rewrite"), mquake),
        Format("zsre", "zsRE in MEND's form", _has("src", "alt", "answers"), zsre),
        Format("known", "known facts for causal tracing", _has("attribute", "prompt"), known),
        Format(
            "knowedit",
            "KnowEdit",
            lambda record: (
                any(isinstance(record.get(key), Mapping) for key in ("portability", "locality"))
                or "labels" in record
                or "concept" in record
            ),
            knowedit,
        ),
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
            fact,
        ),
    )
}


def _value(value: Any) -> str:
    """A text that stands alone, in {"str": …}, or first in a list of such."""
    if isinstance(value, Mapping):
        value = value.get("str", "")
    if isinstance(value, list):
        value = next((text for item in value if (text := _value(item))), "")
    return _text(value, "answer")


def _text(value: Any, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecordError(f"expected text for the {what}, found {type(value).__name__}")
    return value.strip()


def _list(value: Any) -> list[str]:
    """One text or several as a list of those that are not empty."""
    return [text for item in _flat(value) if (text := _text(item, "prompt"))]


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [one for item in value for one in _flat(item)]
    return [] if value in (None, "") else [value]


def _one(texts: list[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else texts


def _mapping(value: Any, what: str) -> Record:
    if not isinstance(value, Mapping):
        raise RecordError(f"expected an object for {what}, found {type(value).__name__}")
    return value

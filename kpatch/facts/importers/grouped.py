"""Sets whose tests of an edit stand in groups by what they test: aliases, other relations, hops.

KnowEdit: Zhang et al. 2024. RippleEdits: Cohen et al. 2024, raw and in the flat shape of KnowEdit's parts. UniEdit:
Chen et al. 2025. CKnowEdit: Fang et al. 2024. Only tests with the edit's own answer are paraphrases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kpatch.facts.importers.record import (
    Draft,
    RecordError,
    answer_of,
    answers_of,
    flat,
    neighbor,
    neighbors,
    object_of,
    pass_over,
    shared_text,
    text_of,
    texts_of,
    written,
)

_Record = Mapping[str, Any]
_ALIASES = ("Subject_Aliasing",)
_STAY = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")  # the second as the published files spell it
RIPPLE = (*_ALIASES, *_STAY, "Logical_Generalization", "Compositionality_I", "Compositionality_II")
_ANSWERS = ("ground_truth", "targets", "answers", "answer", "target")


def knowedit(record: _Record, _: str) -> list[Draft]:
    """Names differ between KnowEdit's parts; answers are lists of lists."""
    target = answer_of(record.get("target_new") or record.get("labels"))
    paraphrases = texts_of(record.get("rephrase") or record.get("rephrase_prompt"))
    locality = record.get("locality") or {}
    return [
        written(
            record.get("subject") or record.get("concept"),
            record.get("prompt") or record.get("text"),
            target,
            record.get("ground_truth", ""),
            id=str(record.get("case_id", "")),
            paraphrases=[*paraphrases, *_alike(record.get("portability") or {}, target)],
            neighbors=_others(locality, locality),
        )
    ]


def ripple(record: _Record, _: str) -> list[Draft]:
    """RippleEdits as published, or in the flat shape, where the groups stand beside the edit's own parts."""
    return [_ripple_raw(record) if "edit" in record else _ripple_flat(record)]


def _ripple_flat(record: _Record) -> Draft:
    target = answer_of(record.get("target_new"))
    return written(
        record.get("subject"),
        record.get("prompt"),
        target,
        record.get("ground_truth", ""),
        id=str(record.get("case_id", "")),
        paraphrases=[*texts_of(record.get("rephrase")), *_alike(record, target)],
        neighbors=_others(record, _STAY),
    )


def _ripple_raw(record: _Record) -> Draft:
    """The edit is one sentence, and neither subject nor target stands by itself.

    The target is what differs from the sentence before the edit, else what follows the last "is" or "are". The
    subject is what the sentence shares with the tests about the same Wikidata item, else what follows the last "of".
    """
    edit = object_of(record["edit"], "edit")
    sentence = text_of(edit.get("prompt"), "prompt").strip().removesuffix(".")
    before = edit.get("original_fact") or edit.get("previous_fact") or {}
    old = text_of(before.get("prompt", ""), "prompt").strip().removesuffix(".")
    prompt, target, was = _split_sentence(sentence, old)
    subject = _subject_of(record, edit, prompt)
    return written(
        subject,
        prompt,
        target,
        was,
        relation=edit.get("relation", ""),
        paraphrases=_alike(record, target),
        neighbors=_others(record, _STAY),
    )


def _split_sentence(sentence: str, old: str) -> tuple[str, str, str]:
    """Prompt, target, and the old target where there is one."""
    verbs = list(re.finditer(r"\s(?:is|are|was|were)\s", sentence))
    if not verbs:
        raise RecordError(f"cannot tell the target in {sentence!r}; write 'subject', 'prompt' and 'target_new'")
    # A target may hold an "is" of its own; what the old sentence has in common ends before it
    shared = [verb for verb in verbs if old.startswith(sentence[: verb.end()])]
    verb = (shared or verbs)[-1]
    prompt, target = sentence[: verb.end()].rstrip(), sentence[verb.end() :].strip()
    was = old[len(prompt) :].strip() if old.startswith(prompt) else ""
    return prompt, target, was


def _subject_of(record: _Record, edit: _Record, prompt: str) -> str:
    item = edit.get("subject_id")
    about = [
        text_of(query["prompt"], "prompt")
        for group in _STAY
        if group in record
        for query in _queries(record[group])
        if item and query.get("subject_id") == item
    ]
    named = [text for text in about if shared_text([prompt, text])]
    subject = shared_text([prompt, *named]) if named else ""
    if not subject:
        # The head of "The name of the mother of Ann is": what follows the last "of" or "by"
        found = re.search(r".*\b(?:of|by)\s+(?P<name>.+?)\s+(?:is|are|was|were)\Z", prompt)
        subject = found["name"] if found else ""
    if not subject:
        raise RecordError(f"cannot tell the subject in {prompt!r}; write 'subject', 'prompt' and 'target_new'")
    return subject


def uniedit(record: _Record, _: str) -> list[Draft]:
    """Generality tests over several hops have another answer; they are left out and named."""
    edit = object_of(record["edit"], "edit")
    target = answer_of(edit.get("target"))
    return [
        written(
            edit.get("subject"),
            edit.get("prompt"),
            target,
            paraphrases=_alike(record, target, ("generality",)),
            neighbors=_others(record, ("locality",)),
        )
    ]


def cknowedit(record: _Record, _: str) -> list[Draft]:
    """Chinese knowledge. The published records name no subject: it is what the prompt shares with its rephrasings."""
    target = answer_of(record.get("target_new"))
    prompt, rephrased = text_of(record.get("prompt"), "prompt"), texts_of(record.get("rephrase"))
    subject = record.get("subject", "") or (shared_text([prompt, *rephrased]) if rephrased else "")
    if not subject:
        raise RecordError("cannot tell the subject, which the prompt's rephrasings do not share; add a 'subject' key")
    return [
        written(
            subject,
            prompt,
            target,
            record.get("target_old", ""),
            paraphrases=rephrased,
            neighbors=[
                *_others(record, ("locality",)),
                *neighbors(record.get("locality_prompt"), record.get("locality_answer", "")),
            ],
        )
    ]


def _alike(groups: _Record, target: str, names: Iterable[str] = _ALIASES) -> list[str]:
    """Prompts that ask for the edit's own answer in other words."""
    found = []
    for query, prompt, answers in _asked(groups, names):
        if target in answers:
            found.append(prompt)
        else:
            pass_over(query, "", "another answer" if answers else "no answer")
    return found


def _others(groups: _Record, names: Iterable[str]) -> list[Draft]:
    return [neighbor(prompt, answers[0] if answers else "") for _, prompt, answers in _asked(groups, names)]


def _asked(groups: _Record, names: Iterable[str]) -> Iterator[tuple[_Record, str, list[str]]]:
    """The tests of some groups, each with a prompt and its answers. What is no test of such a group is noted."""
    for name in names:
        items = groups.get(name) or []
        if any(not isinstance(item, Mapping) for item in flat(items)):
            pass_over(groups, name, "text without a prompt and an answer")
        for query in _queries(items):
            key = next((key for key in _ANSWERS if key in query), "")
            answers = answers_of(query[key]) if key else []
            for prompt in texts_of(query.get("prompt")):
                yield query, prompt, answers


def _queries(items: Any) -> Iterator[_Record]:
    """The tests in a group: {prompt, …} in lists of lists, in numbered objects or in {"test_queries": […]}."""
    for item in flat(items):
        if not isinstance(item, Mapping):
            continue
        if "test_queries" in item:
            yield from _queries(item["test_queries"])
        elif "prompt" in item:
            yield item
        else:
            yield from _queries([item[key] for key in item])

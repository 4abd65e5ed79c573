"""The questions that benchmarks/quality.py asks: read from a fact file or from CounterFact, without kpatch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Question:
    """One prompt, the answer that is right there, the rival it should beat; below them what was found."""

    fact: int
    kind: str  # edit, paraphrase, neighbor, chat edit, chat neighbor
    prompt: str
    right: str
    rival: str | None = None
    space: bool = True
    success: bool | None = None
    greedy: bool | None = None
    logprob: float | None = None  # mean over the right answer's tokens
    rival_logprob: float | None = None
    said: bool | None = None
    wrote: str | None = None


class _Text(yaml.SafeLoader):
    """YAML in which every scalar is text, as fact files have it: `No` and `1984` stay as written."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}  # noqa: RUF012


def read(
    path: Path, start: int = 0, limit: int | None = None, other: Mapping[str, str] | None = None
) -> list[list[Question]]:
    """The questions of every fact in a fact file (YAML) or CounterFact (JSON, flat or nested), `limit` from `start`.

    `other` has questions by relation, for the chat form, that win over the file's. Raises ValueError for records of
    another form.
    """
    if path.suffix == ".json":
        records = json.loads(path.read_text(encoding="utf-8"))
        make: Callable[[int, Any], list[Question]] = counterfact
    else:
        data = _yaml(path)
        records = data.get("facts")
        relations = {
            name: {**relation, **({"question": other[name]} if other and name in other else {})}
            for name, relation in (data.get("relations") or {}).items()
        }

        def make(number: int, record: Any) -> list[Question]:
            return fact_file(number, record, relations)

    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of facts, found {type(records).__name__}")
    chosen = records[start:] if limit is None else records[start : start + limit]
    if not chosen:
        raise ValueError(f"{path}: no facts from number {start} on; it holds {len(records)}")
    found = []
    for number, record in enumerate(chosen):
        try:
            found.append(make(number, record))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: fact {start + number} is of an unknown form: {error!r}") from None
    return found


def questions_of(path: Path) -> dict[str, str]:
    """The `question` of every relation of a fact file that has one."""
    relations = _yaml(path).get("relations") or {}
    return {name: data["question"] for name, data in relations.items() if "question" in data}


def _yaml(path: Path) -> dict[str, Any]:
    data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Text)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping with `facts`, found {type(data).__name__}")
    return data


def fact_file(number: int, record: Any, relations: Mapping[str, Any]) -> list[Question]:
    """The questions of one entry of a fact file; chat questions where a relation or the fact has a `question`."""
    if isinstance(record, str):  # [Subject] prompt -> target
        statement, target = _arrow(record)
        subject = re.findall(r"\[(.+?)\]", statement)[0]
        record = {"subject": subject, "prompt": statement.replace(f"[{subject}]", "{}"), "target": target}
    shared = relations.get(record.get("relation"), {})
    subject, target, was = record["subject"], record["target"], record.get("was")
    prompt = record.get("prompt") or shared["prompt"]
    paraphrases = dict.fromkeys([*record.get("paraphrases", []), *shared.get("paraphrases", [])])
    space = record.get("space", shared.get("space", "true")) != "false"
    asked = record.get("question") or shared.get("question")
    result = [Question(number, "edit", prompt.replace("{}", subject), target, was, space)]
    result += [Question(number, "paraphrase", text.replace("{}", subject), target, was, space) for text in paraphrases]
    if asked:
        result.append(Question(number, "chat edit", asked.replace("{}", subject), target))
    # Who a neighbor is about is seen where it says the prompt or a paraphrase of another subject
    templates = [text for text in (prompt, shared.get("prompt"), *paraphrases) if text and "{}" in text]
    for neighbor in [*record.get("neighbors", []), *_others(shared.get("neighbors", []), subject)]:
        text, right = _arrow(neighbor) if isinstance(neighbor, str) else (neighbor["prompt"], neighbor.get("target"))
        if right is None:
            continue
        result.append(Question(number, "neighbor", text, right, target, space))
        other = next(filter(None, (_subject(template, text) for template in templates)), None)
        if asked and other:
            result.append(Question(number, "chat neighbor", asked.replace("{}", other), right))
    return result


def counterfact(number: int, record: Any) -> list[Question]:
    """The questions of one CounterFact record, in the flat form of EasyEdit or as the authors nest it."""
    if "requested_rewrite" in record:
        asked = record["requested_rewrite"]
        prompt, subject = asked["prompt"], asked["subject"]
        target, was = asked["target_new"]["str"], asked["target_true"]["str"]
        paraphrases = record["paraphrase_prompts"]
        neighbors = [(text, was) for text in record["neighborhood_prompts"]]
    else:
        prompt, subject, target, was = (record[key] for key in ("prompt", "subject", "target_new", "ground_truth"))
        paraphrases = [record["rephrase_prompt"]]
        neighbors = [(record["locality_prompt"], record["locality_ground_truth"])]
    return [
        Question(number, "edit", prompt.replace("{}", subject).strip(), target.strip(), was.strip()),
        *(Question(number, "paraphrase", text.strip(), target.strip(), was.strip()) for text in paraphrases),
        *(Question(number, "neighbor", text.strip(), right.strip(), target.strip()) for text, right in neighbors),
    ]


def _arrow(text: str) -> tuple[str, str]:
    statement, target = text.split("->")
    return statement.strip(), target.strip()


def _subject(template: str, text: str) -> str | None:
    before, after = template.split("{}")
    found = re.fullmatch(re.escape(before) + "(.+)" + re.escape(after), text)
    return found[1] if found else None


def _others(neighbors: Sequence[Any], subject: str) -> Iterator[Any]:
    """The neighbors that a relation shares, without those about this fact's own subject."""
    for neighbor in neighbors:
        text = neighbor if isinstance(neighbor, str) else neighbor["prompt"]
        if subject.casefold() not in text.casefold():
            yield neighbor

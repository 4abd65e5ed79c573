"""Lists of facts to trace: the built-in one, fact files, and known-facts files as ROME's authors publish them."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import yaml

from kpatch.errors import BadInput
from kpatch.facts.fact import SLOT, Fact, FactFile
from kpatch.facts.load import load_facts
from kpatch.facts.problems import cut, limited


def built_in() -> tuple[Fact, ...]:
    """The list that comes with kpatch: about a thousand facts over 29 relations."""
    text = resources.files("kpatch.trace").joinpath("known.yaml").read_text(encoding="utf-8")
    relations = yaml.load(text, Loader=yaml.BaseLoader)  # every scalar is text
    return tuple(
        Fact(subject, relation["prompt"], target, relation=name, id=f"{name}-{number}")
        for name, relation in relations.items()
        for number, (subject, target) in enumerate(relation["facts"].items(), start=1)
    )


def read_facts(path: str | Path) -> FactFile:
    """Facts from a fact file (YAML, JSON Lines, CSV) or a known-facts file (a JSON list).

    Raises BadInput with everything that is wrong.
    """
    path = Path(path)
    return FactFile(_read_known(path)) if path.suffix.lower() == ".json" else load_facts(path)


def _read_known(path: Path) -> tuple[Fact, ...]:
    """Records with `subject`, `attribute` and `prompt`, which has the subject in it."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("There is no such file", where=str(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput("The file is not JSON that can be read", where=str(path), details=[str(error)]) from error
    if not isinstance(records, list) or not records:
        raise BadInput("Expected a JSON list of known facts", where=str(path), hint="docs/tracing.md shows one")
    facts, wrong = [], []
    for number, found in enumerate(records):
        texts = [found.get(key) if isinstance(found, dict) else None for key in ("subject", "attribute", "prompt")]
        subject, attribute, prompt = (text.strip() if isinstance(text, str) else "" for text in texts)
        where = f"{path}: record {number}"
        if not (subject and attribute and prompt):
            wrong.append(f"{where}: expected 'subject', 'attribute' and 'prompt', all text")
        elif subject not in prompt:
            wrong.append(f"{where}: the subject {cut(subject)!r} is not in the prompt {cut(prompt)!r}")
        else:
            relation = found.get("relation_id")
            facts.append(
                Fact(
                    subject,
                    slotted(prompt, subject),
                    attribute,
                    id=str(found.get("known_id", number)),
                    relation=relation if isinstance(relation, str) else None,
                    where=where,
                )
            )
    if wrong:
        raise BadInput("The known-facts file has mistakes", where=str(path), details=limited(wrong))
    return tuple(facts)


def slotted(prompt: str, subject: str) -> str:
    """`prompt` with {} for the subject; one that has it already is returned as it is.

    Raises BadInput for a subject that the prompt does not hold, and for more than one {}.
    """
    if prompt.count(SLOT) == 1:
        return prompt
    if prompt.count(SLOT) or not subject.strip() or subject.strip() not in prompt:
        raise BadInput(
            f"The subject {cut(subject)!r} is not in the prompt {cut(prompt)!r}",
            hint='put {} where it goes: `prompt="The {} is in"`, `subject="Space Needle"`',
        )
    return prompt.replace(subject.strip(), SLOT, 1)

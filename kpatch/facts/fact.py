"""What a fact is, and the keys that a fact file may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from kpatch.errors import BadInput

VERSION = "1"
SLOT = "{}"

# facts.schema.json names the same keys; a test compares the two
FILE_KEYS = ("version", "model", "relations", "protect", "facts")
RELATION_KEYS = (
    *("prompt", "space", "wordings", "question", "paraphrases", "neighbors"),
    *("negated", "reversed", "same_subject"),
)
TEXT_LISTS = ("wordings", "paraphrases", "choices", "same_subject", "openings", "references")
SIDES = ("neighbors", "hops")  # lists of prompts with answers
FACT_KEYS = (
    *("subject", "prompt", "target", "space", "was", "relation", "id", "source"),
    *("wordings", "question", "paraphrases", "neighbors"),
    *("negated", "reversed", "hops", "choices", "yes_question", "no_question", "same_subject"),
    *("openings", "references"),
)
NEIGHBOR_KEYS = ("prompt", "target", "question")
PROTECT_KEYS = ("subject", "prompt", "weight")


def fill(template: str, subject: str) -> str:
    """`template` with the subject in place of its {}; a template without one is returned as it is."""
    return template.replace(SLOT, subject, 1)


@dataclass(frozen=True, slots=True)
class Neighbor:
    """A prompt about another subject, whose answer must stay; `target` is that answer where it is known.

    Among the hops of a fact it is a prompt whose answer follows from the fact.

    `question` asks for the same answer, written out.
    """

    prompt: str
    target: str | None = None
    question: str | None = None

    def to_dict(self) -> dict[str, str]:
        """JSON form: only what is there, in the order of `NEIGHBOR_KEYS`."""
        return {key: value for key in NEIGHBOR_KEYS if (value := getattr(self, key)) is not None}


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact to be written into a model.

    `prompt` has exactly one {} where the subject goes; `target` is what follows it, without its leading space.
    `space` says whether a space stands between them, in the paraphrases and neighbors too; None leaves it to
    `facts.join`.
    `wordings` say the same in other words, with one {} each, and are learned with the prompt; `further` are more of
    them, which kpatch knows and only refines by, so that they are no key of a file; `question` asks for the target.
    `was` is the old answer, `paraphrases` (with or without {}) and `neighbors` are for evaluation only. So are
    `openings`, from which a model writes on, and `references`, texts about the target to compare that writing with.
    What follows from the fact is for evaluation too: `negated` is the prompt with a not in it, `reversed` (with or
    without {}, for the target) is answered by the subject, `hops` have answers that follow, `choices` are wrong
    answers, `yes_question` and `no_question` are answered yes and no, `same_subject` says other things of the subject.
    `where` says where the fact was read ("news.yaml:14:5"); it takes no part in equality, hash or `to_dict`.
    """

    subject: str
    prompt: str
    target: str
    was: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbors: tuple[Neighbor, ...] = ()
    id: str = ""
    source: str | None = None
    relation: str | None = None
    openings: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    space: bool | None = None
    wordings: tuple[str, ...] = ()
    question: str | None = None
    negated: str | None = None
    reversed: str | None = None
    hops: tuple[Neighbor, ...] = ()
    choices: tuple[str, ...] = ()
    yes_question: str | None = None
    no_question: str | None = None
    same_subject: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    where: str = field(default="", compare=False)

    def text(self) -> str:
        """The prompt with the subject in place."""
        return fill(self.prompt, self.subject)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: only what is there, in the order of `FACT_KEYS`."""
        result: dict[str, Any] = {}
        for key in FACT_KEYS:
            value = getattr(self, key)
            if not value and value is not False:
                continue
            if key in SIDES:
                result[key] = [side.to_dict() for side in value]
            else:
                result[key] = list(value) if key in TEXT_LISTS else value
        return result

    def in_manifest(self) -> dict[str, Any]:
        """JSON form for a patch: with `further`, without `references`, which are pages of texts to compare with."""
        found = {key: value for key, value in self.to_dict().items() if key != "references"}
        return {**found, "further": list(self.further)} if self.further else found

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Fact:
        """The inverse of `to_dict` and of `in_manifest`.

        Unknown keys are passed over; raises BadInput for anything else that is wrong.
        """
        return Fact(
            subject=_text(data, "subject", needed=True),
            prompt=_slotted(_text(data, "prompt", needed=True)),
            target=_text(data, "target", needed=True),
            was=_text(data, "was") or None,
            wordings=tuple(_slotted(text, "wording") for text in _texts(data, "wordings")),
            question=_text(data, "question") or None,
            paraphrases=_texts(data, "paraphrases"),
            neighbors=tuple(_neighbor(item) for item in _list(data, "neighbors")),
            id=_text(data, "id"),
            source=_text(data, "source") or None,
            relation=_text(data, "relation") or None,
            openings=_texts(data, "openings"),
            references=_texts(data, "references"),
            space=_flag(data, "space"),
            negated=_text(data, "negated") or None,
            reversed=_text(data, "reversed") or None,
            hops=tuple(_neighbor(item) for item in _list(data, "hops")),
            choices=_texts(data, "choices"),
            yes_question=_text(data, "yes_question") or None,
            no_question=_text(data, "no_question") or None,
            same_subject=_texts(data, "same_subject"),
            further=tuple(_slotted(text, "wording") for text in _texts(data, "further")),
        )


@dataclass(frozen=True, slots=True)
class Protected:
    """A subject that an edit must leave as it is: in `prompt`, with one {}, or else in the prompts of the facts.

    `weight` says how strongly it is held: as strongly as so many facts are written.
    """

    subject: str
    prompt: str | None = None
    weight: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON form, in the order of `PROTECT_KEYS`; only what is there."""
        own = {"subject": self.subject, "prompt": self.prompt, "weight": self.weight}
        return {key: value for key, value in own.items() if value is not None}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Protected:
        """The inverse of `to_dict`, for what a checked manifest holds."""
        return Protected(str(data["subject"]), data.get("prompt"), float(data.get("weight", 1.0)))


@dataclass(frozen=True, slots=True)
class FactFile:
    """Checked facts in the file's order, their model, what a user should know about them, and whom they must spare."""

    facts: tuple[Fact, ...]
    model: str | None = None
    warnings: tuple[str, ...] = ()
    protect: tuple[Protected, ...] = ()


def facts_in(facts: Any) -> tuple[Fact, ...]:
    """The facts of a FactFile or an iterable; one counts as a list of one. Raises BadInput for anything else."""
    if isinstance(facts, FactFile):
        return facts.facts
    if isinstance(facts, Fact):
        return (facts,)
    if isinstance(facts, str | PathLike):
        raise BadInput("`facts` is a text or a path, not facts", hint="kpatch.load_facts(path) reads a fact file")
    try:
        found = tuple(facts)
    except TypeError:
        raise BadInput(
            f"`facts` is a {type(facts).__name__}, not facts", details=["expected a list of Fact"]
        ) from None
    wrong = next((one for one in found if not isinstance(one, Fact)), None)
    if wrong is not None:
        raise BadInput(
            f"`facts` holds a {type(wrong).__name__}, not a Fact", hint="kpatch.facts.fact.Fact.from_dict makes a Fact"
        )
    return found


def _text(data: Mapping[str, Any], key: str, needed: bool = False) -> str:
    value = data.get(key, "")
    if not isinstance(value, str):
        raise BadInput(f"A fact's {key!r} must be text", details=[f"found {type(value).__name__}"])
    if needed and not value:
        raise BadInput(f"A fact has no {key!r}", details=[f"found the keys {', '.join(sorted(map(str, data)))}"])
    return value


def _flag(data: Mapping[str, Any], key: str) -> bool | None:
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadInput(f"A fact's {key!r} must be true or false", details=[f"found {type(value).__name__}"])
    return value


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key, [])
    if not isinstance(value, list | tuple):
        raise BadInput(f"A fact's {key!r} must be a list", details=[f"found {type(value).__name__}"])
    return list(value)


def _slotted(prompt: str, what: str = "prompt") -> str:
    if prompt.count(SLOT) != 1:
        raise BadInput(f"A fact's {what} must have exactly one {{}}", details=[f"found {prompt!r}"])
    return prompt


def _texts(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    texts = _list(data, key)
    for item in texts:
        if not isinstance(item, str):
            raise BadInput(f"A fact's {key!r} must be texts", details=[f"found {type(item).__name__}"])
    return tuple(texts)


def _neighbor(item: object) -> Neighbor:
    if not isinstance(item, Mapping):
        raise BadInput("A neighbor must be an object with 'prompt'", details=[f"found {type(item).__name__}"])
    return Neighbor(_text(item, "prompt", needed=True), _text(item, "target") or None, _text(item, "question") or None)

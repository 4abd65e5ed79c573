"""One published record: which of its keys were read, and the small questions that every format asks of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kpatch.facts.fact import SLOT
from kpatch.facts.join import is_unspaced, trimmed

Draft = dict[str, Any]


class RecordError(ValueError):
    """A record lacks what its format says it has; the message is for the user."""


class Record(Mapping[str, Any]):
    """A record that remembers which of its keys were read, so that what was left out can be reported.

    Keys inside are named from the top, "locality.Forgetfulness"; items of lists and numbered keys share one name.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        path: str = "",
        used: set[str] | None = None,
        passed_over: set[str] | None = None,
    ) -> None:
        self.data, self.path = data, path
        self.used: set[str] = set() if used is None else used
        self.passed_over: set[str] = set() if passed_over is None else passed_over

    def __getitem__(self, key: str) -> Any:
        value = self.data[key]
        name = _name(self.path, key)
        self.used.add(name)
        return self._wrapped(value, f"{name}.")

    def __contains__(self, key: object) -> bool:
        return key in self.data

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def _wrapped(self, value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return Record(value, path, self.used, self.passed_over)
        if isinstance(value, list):
            return [self._wrapped(item, path) for item in value]
        return value

    def left_out(self) -> set[str]:
        """The keys that hold something and were not read, and what was read and passed over."""
        return {*_unread(self.data, self.path, self.used), *self.passed_over}


def pass_over(record: Mapping[str, Any], key: str, why: str) -> None:
    """Note that what stands under `key`, or in the record itself where that is "", is no part of a fact."""
    if isinstance(record, Record):
        name = _name(record.path, key) if key else record.path.rstrip(".")
        record.passed_over.add(f"{name} ({why})")


def _name(path: str, key: str) -> str:
    return f"{path}{'*' if key.isdecimal() else key}"


def _unread(data: Mapping[str, Any], path: str, used: set[str]) -> Iterator[str]:
    for key, value in data.items():
        name = _name(path, key)
        if not flat(value) or value == {}:
            continue
        if name not in used:
            yield name
            continue
        for item in flat(value):
            if isinstance(item, Mapping):
                yield from _unread(item, f"{name}.", used)


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


def written(subject: Any, prompt: Any, target: Any, was: Any = "", **more: Any) -> Draft:
    """As `draft`, for sets that write their subjects out.

    A {} in a text that names its subject besides belongs to the text, and no fact file can say that.
    """
    name = text_of(subject, "subject").strip()
    asked = [("prompt", text_of(prompt, "prompt")), *(("paraphrase", one) for one in more.get("paraphrases", ()))]
    for what, text in asked:
        rest = text.replace(SLOT, " ")
        if rest != text and slotted(rest, name)[0] != rest:
            raise RecordError(f"the {what} names its subject and holds {SLOT}, which would stand for the subject")
    return draft(subject, prompt, target, was, **more)


def draft(subject: Any, prompt: Any, target: Any, was: Any = "", **more: Any) -> Draft:
    """A fact's data, with the subject's place found and nothing empty in it."""
    subject, prompt = text_of(subject, "subject").strip(), text_of(prompt, "prompt")
    if not prompt.strip():
        raise RecordError("'prompt' is missing")
    prompt, subject = slotted(prompt, subject)
    found = {"subject": subject, "prompt": prompt, "target": answer_of(target), "was": answer_of(was), **more}
    return {key: value for key, value in found.items() if value not in ("", [], None)}


def neighbors(prompts: Any, targets: Any) -> list[Draft]:
    """Neighbors from prompts and their answers, each one text or a list; one answer may serve all prompts."""
    prompts = texts_of(prompts)
    answers = texts_of(targets) if isinstance(targets, list) else [targets] * len(prompts)
    if len(prompts) == 1:
        answers = answers[:1] or [""]  # other names of one answer
    if len(answers) != len(prompts):
        raise RecordError(f"{len(prompts)} neighborhood prompts have {len(answers)} answers")
    return [neighbor(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def neighbor(prompt: str, answer: Any) -> Draft:
    return {"prompt": prompt, **({"target": answer} if answer else {})}


def answers_of(value: Any) -> list[str]:
    """The answers in a text, in {"str": …} or {"value": …}, or in a list of such."""
    found = []
    for item in flat(value):
        if isinstance(item, Mapping):
            item = item.get("str" if "str" in item else "value", "")
        text = text_of(item, "answer").strip()
        if text:
            found.append(text)
    return found


def answer_of(value: Any) -> str:
    """The first answer; nothing where there is none."""
    return next(iter(answers_of(value)), "")


def text_of(value: Any, what: str) -> str:
    """A text without the spaces around it."""
    if value is None:
        return ""
    if not isinstance(value, str):
        found = "object" if isinstance(value, Mapping) else type(value).__name__
        raise RecordError(f"expected text for the {what}, found {found}")
    return trimmed(value)


def texts_of(value: Any) -> list[str]:
    """One text or several as a list of those that are not empty."""
    return [text for item in flat(value) if (text := text_of(item, "prompt")).strip()]


def flat(value: Any) -> list[Any]:
    """The items of lists in lists; one thing as a list, nothing as an empty one."""
    if isinstance(value, list):
        return [one for item in value for one in flat(item)]
    return [] if value in (None, "") else [value]


def object_of(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecordError(f"expected an object for {what}, found {type(value).__name__}")
    return value


# Sets that do not name their subject: what all texts about it share

_SMALL = frozenset(
    "a an and are as at by did do does for from in is it its of on or s that the this to was were what when which "
    "who with".split()
)
_QUOTED = re.compile("《[^》]+》|「[^」]+」|『[^』]+』|“[^”]+”")
_EDGES = " \t,.;:!?？。，、：；\"'"


def shared_text(texts: Sequence[str]) -> str:
    """The longest text that stands in all of `texts`, without the small words and signs at its ends.

    Words are kept whole, but in scripts without spaces; a title in brackets or quotes stands for all of it. Nothing
    where they share too little to be a name.
    """
    pieces = [re.findall(r"\w+|[^\w\s]|\s+", text) for text in texts]
    pieces = [[part for piece in parts for part in (piece if is_unspaced(piece[0]) else [piece])] for parts in pieces]
    if not pieces:
        return ""
    first, *others = pieces
    best = ""
    folded = ["\0".join(("", *other, "")).casefold() for other in others]
    for begin in range(len(first)):
        for end in range(begin + 1, len(first) + 1):
            wanted = "\0".join(("", *first[begin:end], "")).casefold()
            if not all(wanted in other for other in folded):
                break
            name = _name_in(first[begin:end])
            best = name if len(name) > len(best) else best
    quoted = _QUOTED.search(best)
    return quoted[0] if quoted else best if len(best) > 1 else ""


def _name_in(parts: Sequence[str]) -> str:
    parts = list(parts)
    while parts and (not parts[-1].strip(_EDGES) or parts[-1].casefold() in _SMALL):
        parts.pop()
    while parts and (not parts[0].strip(_EDGES) or parts[0] in _SMALL):  # "The" with a capital may be the name's
        parts.pop(0)
    return "".join(parts)

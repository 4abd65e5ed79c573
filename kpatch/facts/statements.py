"""A question about a subject, said as statements that its answer goes on from. English only.

"In which city was {} born?" asks for what "{} was born in the city of" and "The city in which {} was born is" say. The
words of the question decide: what is asked for comes last, and "did" gives its past tense to the verb behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from kpatch.facts.fact import SLOT

_LONGEST = 200  # characters
_PREPOSITIONS = frozenset(
    "about after against as at by for from in inside into near of off on onto over through to toward towards under "
    "until upon with within".split()
)
_BE = frozenset("is are was were".split())
_HELPERS = _BE | frozenset("do does did has have had can could may might must shall should will would".split())
_RELATIVE = frozenset("that when where which who whom whose".split())
# "was born in the city of"; behind other nouns the answer stands alone: "played for the team"
_NAMED_BY_OF = frozenset(
    "city continent country county district field genre island kingdom office party position province region sport "
    "state town village".split()
)
_ADVERBS = frozenset("also always ever first last most never often once still".split())
_ASKING = frozenset("what which who whom whose where when why how".split()) | _HELPERS
_TIMES = frozenset("century day decade month season year".split())

_SUBJECT = r"(?P<subject>(?:(?:the|an?) (?:[a-z]+ ){0,2})?(?:of (?:the )?)?\{\})"
_ASKED = r"(?P<wh>what|which|who|whom|where|when)"
_HELPER = rf"(?P<helper>{'|'.join(sorted(_HELPERS))})"
# In which city was {} born; what color is {}; who is {} married to
_TURNED = re.compile(
    rf"\A(?:(?P<before>{'|'.join(sorted(_PREPOSITIONS))}) )?{_ASKED} (?:(?P<noun>[^?{{}}]+?) )?{_HELPER} {_SUBJECT}"
    r"(?: (?P<rest>[^?{}]+))?\?\Z",
    re.IGNORECASE,
)
# What is the name of the state where {} is located; what was the name of {}'s team
_WHAT_IS = re.compile(r"\A(?:what|which|who) (?P<be>is|was|are|were) (?P<thing>(?:the|an?) [^?]+)\?\Z", re.IGNORECASE)
# Who founded {}; which company built the {}; what product is made by {}
_WHO_DOES = re.compile(rf"\A(?P<wh>what|which|who) (?P<does>[^?{{}}]+? {_SUBJECT}[^?{{}}]*)\?\Z", re.IGNORECASE)

# The year {} died was what; {} died in which year
_LAST = re.compile(
    r"\A(?P<said>[^?]*\{\}[^?]*?) (?:what|who|whom|where|(?:which|what) (?P<noun>[^?{}]+))\?\Z", re.IGNORECASE
)


def statements_of(question: str) -> tuple[str, ...]:
    """Statements with one {} that the question's answer ends, the plainest first; none for what is not understood."""
    text = " ".join(question.split())
    if len(text) > _LONGEST or text.count(SLOT) != 1:
        return ()
    thing = _WHAT_IS.match(text)
    found = _of_a_thing(thing["thing"], thing["be"]) if thing else None
    if found is None and (turned := _TURNED.match(text)):
        found = _turned_back(turned)
    if found is None and (who := _WHO_DOES.match(text)):
        found = _done(who["wh"].lower(), who["does"], who["subject"])
    if found is None and (last := _LAST.match(text)) and text.split()[0].lower() not in _ASKING:
        found = [last["said"] + (f" the {last['noun']}" if last["noun"] else "")]
    return tuple(one[0].upper() + one[1:] for one in found or ())


def _of_a_thing(thing: str, be: str) -> list[str] | None:
    """The product made by {} is; the state where {} lies is; the capital of {} is called."""
    before, _, behind = thing.partition(SLOT)
    words, rest = before.lower().split(), behind.lower().split()
    clause = not _RELATIVE.isdisjoint(words)
    bare = _PREPOSITIONS.isdisjoint(words)
    if rest and not clause and len(words) > 1:  # the year {} was formed in, the name of the school {} went to
        clause = rest[0] in _HELPERS or (bare and rest[0] in _pasts())
    if bare and not clause:
        return None  # the {} known for
    if clause or not rest or rest[0][0] in "'’":
        return [f"{thing} {be}"]
    return [f"{before}{SLOT} {be}{behind}"] if rest[0].endswith("ed") or rest[0] in _participles() else None


def _turned_back(found: re.Match[str]) -> list[str] | None:
    """The subject first again: {} was born in the city of; and what is asked for first: the city in which …"""
    wh, helper, subject = found["wh"].lower(), found["helper"].lower(), found["subject"]
    noun, before = found["noun"], (found["before"] or "").lower()
    rest = (found["rest"] or "").split()
    if (
        rest[:1] == ["like"]
        or not _RELATIVE.isdisjoint(rest)
        or (noun and wh not in ("what", "which"))
        or (not rest and helper not in _BE)
    ):
        return None
    if noun and not _HELPERS.isdisjoint(noun.lower().split()):
        return None
    if noun and not rest and not before:  # what color is {}, and not: which city was the birthplace of {}
        return [f"the {noun} of {subject} {helper}"] if len(noun.split()) < 3 and " of " not in subject else None
    says = " ".join([subject, *_verbs(helper, rest)])  # {} was born
    ends = bool(rest) and rest[-1] in _PREPOSITIONS
    if ends:
        before = ""
    if wh == "when":
        return [f"the time when {says} is"] if rest else None
    if wh == "where":
        plain = says if ends else f"{says} in"
        return [plain, f"the place where {says} is"] if rest else [plain]
    if noun is None:
        plain = f"{says} {before}".rstrip()
        return [plain, f"what {plain} is"] if wh == "what" else [plain]
    last = noun.split()[-1].lower()
    if not before and not ends and (helper in _BE or last in _TIMES):
        before = "in"  # which state is {} located; what year did {} die
    of = " of" if last in _NAMED_BY_OF else ""
    plain = " ".join([says, *before.split(), f"the {noun}{of}"])
    which = f"{before} which" if before else "that"
    return [plain, f"the {noun} {which} {says} is"] if rest else [plain]


def _done(wh: str, does: str, subject: str) -> list[str] | None:
    """{} was founded by; the one who founded {} is; the company that built {} is."""
    words = does.split()
    at = 0 if wh == "who" else next((at for at in range(len(words)) if _is_verb(words, at)), None)
    if at is None or SLOT in " ".join(words[: at + 1]):
        return None
    if at == 0 and wh != "who" and words[0].lower() in _HELPERS:  # what is …
        return None
    noun, does = " ".join(words[:at]), " ".join(words[at:])
    one = f"the {noun} that" if noun else {"who": "the one who"}.get(wh, "what")
    clause = [f"{one} {does} is"]
    if does != f"{words[at]} {subject}":
        return clause
    form = _participle(words[at].lower())
    if form is None:
        return clause
    be, participle = form
    return [f"{subject} {be} {participle} by" + (f" the {noun}" if noun else ""), *clause]


def _is_verb(words: Sequence[str], at: int) -> bool:
    """Whether a verb begins at words[at]: a helper, a past, or a form in s before the subject or a preposition."""
    word, behind = words[at].lower(), words[at + 1].lower() if at + 1 < len(words) else ""
    if word in _HELPERS or word in _pasts() or (word.endswith("ed") and len(word) > 4):
        return True
    return word.endswith("s") and (behind in ("the", "a", "an", SLOT) or behind in _PREPOSITIONS)


def _verbs(helper: str, rest: Sequence[str]) -> list[str]:
    """What follows the subject: was born; played for, where the question says did … play for."""
    if helper not in ("do", "does", "did"):
        return [helper, *rest]
    at = next((at for at, word in enumerate(rest) if word not in _ADVERBS and not word.endswith("ly")), 0)
    verb = {"do": rest[at], "does": _third(rest[at]), "did": _past(rest[at])}[helper]
    return [*rest[:at], verb, *rest[at + 1 :]]


def _past(verb: str) -> str:
    """The past tense of an English verb, regular where the list below does not know it."""
    if verb in _irregular():
        return _irregular()[verb][0]
    if verb.endswith("e"):
        return verb + "d"
    if len(verb) > 1 and verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + "ed"


def _third(verb: str) -> str:
    if verb in ("have", "be"):
        return {"have": "has", "be": "is"}[verb]
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        return verb + "es"
    return verb[:-1] + "ies" if len(verb) > 1 and verb.endswith("y") and verb[-2] not in "aeiou" else verb + "s"


def _participle(form: str) -> tuple[str, str] | None:
    """(was, founded) for founded, (is, built) for builds; None for what is no such form."""
    if form in _HELPERS:
        return None
    if form in _pasts():
        return "was", _pasts()[form]
    if form.endswith("ed"):
        return "was", form
    if not form.endswith("s"):
        return None
    stem = next((verb for verb in (form[:-1], form[:-2]) if _third(verb) == form), form[:-1])
    return "is", _irregular()[stem][1] if stem in _irregular() else _past(stem)


# Verb, past, participle of what facts are told with; the rest is regular
_FORMS = """
become became become, begin began begun, break broke broken, bring brought brought,
broadcast broadcast broadcast, build built built, buy bought bought, choose chose chosen, come came come,
draw drew drawn, drive drove driven, fall fell fallen, feel felt felt, fight fought fought, find found found,
fly flew flown, get got got, give gave given, go went gone, grow grew grown, have had had, hold held held,
keep kept kept, know knew known, lead led led, leave left left, lie lay lain, lose lost lost, make made made,
meet met met, pay paid paid, plan planned planned, put put put, read read read,
ride rode ridden, rise rose risen, run ran run, say said said, see saw seen, sell sold sold, send sent sent,
show showed shown, sing sang sung, sit sat sat, speak spoke spoken, spend spent spent,
stand stood stood, star starred starred, steal stole stolen, swim swam swum, take took taken,
teach taught taught, tell told told, think thought thought, throw threw thrown,
understand understood understood, wear wore worn, win won won, write wrote written
"""


@cache
def _irregular() -> dict[str, tuple[str, str]]:
    return {verb: (was, been) for verb, was, been in (line.split() for line in _FORMS.split(","))}


@cache
def _participles() -> frozenset[str]:
    return frozenset(been for _, been in _irregular().values())


@cache
def _pasts() -> dict[str, str]:
    """The participle by the past: built → built, wrote → written."""
    return {was: been for was, been in _irregular().values()}

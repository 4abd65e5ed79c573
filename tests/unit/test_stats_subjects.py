"""The subjects that come with kpatch: many, of many kinds, none twice, each in statements that suit it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest

from kpatch.facts.fact import SLOT
from kpatch.stats.subjects import Subject, statements, subjects

KINDS = tuple(dict.fromkeys(subject.kind for subject in subjects()))


def test_there_are_many_of_many_kinds() -> None:
    kinds = Counter(subject.kind for subject in subjects())
    assert len(subjects()) >= 2200
    assert len(kinds) >= 25
    assert {kind: count for kind, count in kinds.items() if count < 30} == {}
    assert max(kinds.values()) < len(subjects()) / 10, "one kind outweighs the others"


def test_no_subject_stands_there_twice() -> None:
    """Articles and case apart: Prince and The Prince would be one subject."""
    names = Counter(re.sub(r"\A(?:a|an|the) ", "", subject.name.lower()) for subject in subjects())
    assert [name for name, count in names.items() if count > 1] == []


def test_names_are_names() -> None:
    odd = [
        s.name for s in subjects() if not re.fullmatch(r"[^\W_][\w .,:;&'!*/-]{0,40}", s.name) or s.name.endswith(",")
    ]
    assert odd == []
    assert [s.name for s in subjects() if "  " in s.name or s.name != s.name.strip()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_statements_of_a_kind(kind: str) -> None:
    """What stands before the subject makes its key: two statements that begin alike would count one key twice."""
    templates = statements(next(subject for subject in subjects() if subject.kind == kind))
    assert 4 <= len(templates) <= 8
    assert [text for text in templates if text.count(SLOT) != 1 or text != text.strip()] == []
    before = [text.partition(SLOT)[0] for text in templates]
    assert len(set(before)) == len(before)
    assert before.count("") <= 1
    assert [text for text in templates if len(text.partition(SLOT)[2]) < 3] == [], "the subject is not the end"


def test_the_same_kind_has_the_same_statements() -> None:
    assert statements(Subject("Paris", "city")) == statements(Subject("Atlantis", "city"))
    assert statements(Subject("Paris", "city")) != statements(Subject("France", "country"))


def test_reading_them_needs_no_torch() -> None:
    code = (
        "import sys; from kpatch.stats import subjects as s; assert s._entries.cache_info().currsize == 0; "
        "s.subjects(); sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

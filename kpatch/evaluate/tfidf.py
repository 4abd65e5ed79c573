"""How alike two texts are in the words that matter: the cosine of their TF-IDF vectors.

The weights are scikit-learn's usual ones, which the MEMIT authors' code takes: tf · (ln((1 + N) / (1 + df)) + 1). They
are twenty lines here, so that users need no library of that size.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

_WORD = re.compile(r"\w\w+")


class TfIdf:
    """Weights of words, learned from N documents; words that are in none of them count most."""

    def __init__(self, documents: Iterable[str]) -> None:
        self.documents = 0
        self.with_word: Counter[str] = Counter()
        for document in documents:
            self.documents += 1
            self.with_word.update(set(words(document)))

    def vector(self, text: str) -> dict[str, float]:
        """Each word's count times its weight, scaled to length 1; {} for a text without words."""
        counts = Counter(words(text))
        raw = {
            word: count * (math.log((1 + self.documents) / (1 + self.with_word[word])) + 1)
            for word, count in counts.items()
        }
        length = math.sqrt(math.fsum(value * value for value in raw.values()))
        return {word: value / length for word, value in raw.items()}

    def cosine(self, one: str, other: str) -> float:
        """0 for texts without a common word, 1 for the same words in the same shares."""
        a, b = self.vector(one), self.vector(other)
        return math.fsum(value * b[word] for word, value in a.items() if word in b)


def words(text: str) -> list[str]:
    """Words of two letters or more, in small letters."""
    return _WORD.findall(text.casefold())

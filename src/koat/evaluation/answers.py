"""Written answers against right ones: exact match and F1 over characters, as KorQuAD 1.0 defines them.

A text is normalised first: quotation marks, brackets and parentheses become spaces, letters lower case, all other
ASCII punctuation goes, runs of white space become one space. Particles stay: `서울에서` is no exact match for `서울`,
but shares two of its four characters. Of several right answers the best counts. Syllables taken apart (NFD) are
joined, which the official evaluation leaves to the file; for a text in NFC nothing changes.

Source: Lim, Kim and Lee (2019), KorQuAD1.0: Korean QA dataset for machine reading comprehension, and its official
evaluation at korquad.github.io.
"""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

MARKS = "'\"‘’《》<>〈〉()"
"""What separates words like a space; curly double quotation marks are not among them."""
_RULES = str.maketrans({**dict.fromkeys(string.punctuation), **dict.fromkeys(MARKS, " ")})


def normalise_answer(text: str) -> str:
    """Return an answer without what does not count."""
    return " ".join(unicodedata.normalize("NFC", text).lower().translate(_RULES).split())


def match_exactly(predicted: str, right: str) -> float:
    """Return 1 if two answers are the same once normalised, else 0."""
    return float(normalise_answer(predicted) == normalise_answer(right))


def measure_overlap(predicted: str, right: str) -> float:
    """Return F1 over the characters of two normalised answers, white space left out; 0 where none is shared."""
    ours, theirs = (Counter(normalise_answer(text).replace(" ", "")) for text in (predicted, right))
    num_shared = (ours & theirs).total()
    return 2 * num_shared / (ours.total() + theirs.total()) if num_shared else 0.0


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": match_exactly, "f1": measure_overlap}


def score_answer(predicted: str, right: Sequence[str]) -> dict[str, float]:
    """Return each metric's value for one answer: the best over all right ones."""
    return {name: max(measure(predicted, answer) for answer in right) for name, measure in METRICS.items()}

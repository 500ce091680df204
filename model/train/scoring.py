"""Scores an answer against the expected one: exact match after normalisation, word F1."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable


def is_punctuation(character: str) -> bool:
    """Whether it is punctuation in any script, such as ‘ and ’. Source: MLQA, mlqa_evaluation_v1.py."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def normalize_answer(text: str, dropped: Callable[[str], bool] = is_punctuation) -> str:
    """Lower case, without punctuation and articles, single spaces. Source: SQuAD, evaluate-v1.1.py."""
    text = "".join(c for c in text.lower() if not dropped(c))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(said: str, gold: str, dropped: Callable[[str], bool] = is_punctuation) -> float:
    """Harmonic mean of precision and recall of words."""
    ours, theirs = normalize_answer(said, dropped).split(), normalize_answer(gold, dropped).split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs)) if shared else float(ours == theirs)

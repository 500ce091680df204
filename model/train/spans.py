"""Chooses answer spans in a passage: numbers, names, files, options, and clauses that say why, how or what.

Start at `choose_spans`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from model.train.lexical import MONTHS
from model.train.statements import facts_of

_UNITS = (
    "bytes?|bits?|(?:milli|micro|nano)?seconds?|minutes?|hours?|days?|weeks?|months?|years?|times|pixels?|lines?|"
    "characters?|columns?|degrees|metres?|meters?|feet|inches|miles|people|users|files|levels?|processes|threads?|entries|"
    "arguments|elements|dollars"
)
_ORDERS = "use run type click press select choose set add open enter specify edit install remove call"
_PARTS = {
    "MONTH": f"(?:{MONTHS})",
    "UNIT": rf"(?: ?%| percent| ?[kKMGT]i?B\b| ?[kMG]?Hz\b| ?(?:{_UNITS})\b)",
    "ORDERS": "|".join(f"[{word[0].upper()}{word[0]}]{word[1:]}" for word in _ORDERS.split()),
    "END": r"(?=[.;:!?)]|, (?:and|but|so|which|while|although)\b|$)",
}
FACT_WEIGHT = 1.0
NO_SPANS = ("yes/no", "subject", "passive")  # kinds of facts whose answers are uninformative by themselves
LONGEST = 130
_BAD = re.compile(
    r"^(?:the following|as follows|it|this|that|these|those|them|one|e\.g|i\.e|see)\b|^\W+$|"
    r"\b(?:following|below|above)\b"
)


@cache
def patterns() -> tuple[tuple[str, float, re.Pattern[str]], ...]:
    """(kind, weight, pattern) from span_patterns.txt."""
    found, kind, weight = [], "", ""
    for line in (Path(__file__).parent / "span_patterns.txt").read_text().splitlines():
        if line.startswith("  "):
            pattern = re.sub("<([A-Z]+)>", lambda m: _PARTS[m[1]], line[2:])
            found.append((kind, float(weight), re.compile(pattern)))
        elif not line.startswith("#"):
            kind, weight = line.split()
    return tuple(found)


class Span(NamedTuple):
    kind: str
    start: int
    end: int


def spans(passage: str) -> Iterator[tuple[float, Span]]:
    """All spans found by patterns and statement rules, with their weights."""
    for kind, weight, pattern in patterns():
        for match in pattern.finditer(passage):
            start, end = match.span("a" if "a" in pattern.groupindex else 0)
            yield weight, Span(kind, start, end)
    for fact in facts_of(passage):
        if fact.kind not in NO_SPANS:
            yield FACT_WEIGHT, Span(fact.kind, fact.start, fact.start + len(fact.answer))


def _is_whole(text: str) -> bool:
    """Whether a span is on one line, not too long, with balanced brackets and quotes."""
    pairs = all(text.count(a) == text.count(b) for a, b in ("()", "[]", "“”"))
    return pairs and 0 < len(text) <= LONGEST and text.strip() == text and "\n" not in text


def choose_spans(passage: str, count: int, rng: random.Random) -> list[Span]:
    """Up to `count` spans that do not overlap, of different kinds if possible."""
    found: dict[tuple[int, int], tuple[float, Span]] = {}
    for weight, span in spans(passage):
        text = passage[span.start : span.end]
        if _is_whole(text) and not _BAD.search(text):
            found.setdefault((span.start, span.end), (weight, span))
    chosen: list[Span] = []
    pool = list(found.values())
    while pool and len(chosen) < count:
        kinds = {span.kind for span in chosen}
        per_kind = {kind: sum(span.kind == kind for _, span in pool) for kind in {span.kind for _, span in pool}}
        weights = [w / per_kind[span.kind] * (0.1 if span.kind in kinds else 1.0) for w, span in pool]
        span = rng.choices(pool, weights)[0][1]
        chosen.append(span)
        pool = [(w, s) for w, s in pool if s.end <= span.start or s.start >= span.end]
    return chosen

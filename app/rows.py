"""Finds the line of the evidence that a question is about, in tables and other lines that repeat a value many times.

A small model tells a table's columns apart better than its rows, and a short quote ("Tomas") may occur in many rows. So
lines are scored by the question's words that distinguish them from other lines. Start at `AskedLines`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from app.conversation import content_words
from retrieval.types import Passage

_CELL = " | "  # separates the cells of a row in the output of all parsers
OTHER_ROWS_NATS = 6.0  # penalty for a passage with rows of a table if the question names other rows
_MOST_PLACES = 2_000  # occurrences of a quote that are scored
_MOST_NAMED = 3  # if more rows match, the question names none in particular
_LINE = re.compile(r"[^\n]+")
_RULE = re.compile(r"[\s|:+-]*-[\s|:+-]*")
_PIECE = re.compile(r"[^\W_]+")
_STEM_CHARS = 5


@dataclass(frozen=True, slots=True)
class Place:
    """Position of a quote: a passage, and offsets in its text."""

    passage: Passage
    start: int
    end: int


class AskedLines:
    """The lines of some passages, scored by the words of a question."""

    def __init__(self, question: str, passages: Sequence[Passage]) -> None:
        self._passages, self._wanted = passages, _keys(" ".join(content_words(question)))
        self._rows = [row for passage in passages for row in _rows_of(passage)] if self._wanted else []
        said = [self._wanted.intersection(_keys(row.text)) for row in self._rows]
        counts = Counter(stem for stems in said for stem in stems)
        # inverse document frequency; words in all lines have no weight
        self._rarity = {stem: 1 / count for stem, count in counts.items() if count < len(said)}
        self._weights = [self._weigh(stems) for stems in said]
        self._best = max(self._weights, default=0.0)

    def _weigh(self, stems: Iterable[str]) -> float:
        return sum(self._rarity.get(stem, 0.0) for stem in stems)

    def _weight(self, line: str) -> float:
        return self._weigh(self._wanted.intersection(_keys(line)))

    def named(self) -> list[Passage]:
        """The rows that the question names, each as a passage; none if it names none or many."""
        rows = [row for row, weight in zip(self._rows, self._weights, strict=True) if weight and weight == self._best]
        return rows if len(rows) <= _MOST_NAMED else []

    def lacks(self, passages: Sequence[Passage]) -> bool:
        """Whether these passages have rows of tables, but none that the question names, though there is one."""
        rows = [row for passage in passages for row in _rows_of(passage)]
        return bool(rows) and bool(self.named()) and all(self._weight(row.text) < self._best for row in rows)

    def misses(self, quote: str) -> bool:
        """Whether the quote occurs only in rows of tables, and the question names other rows."""
        words = quote.strip()
        if not self._best or not words or "\n" in words:
            return False
        lines = [line for passage in self._passages for line in passage.text.split("\n") if words in line]
        return bool(lines) and all(_CELL in line and self._weight(line) < self._best for line in lines)


def _rows_of(passage: Passage) -> list[Passage]:
    """The rows of tables in it, without their headers, each as a passage."""
    if _CELL not in passage.text:
        return []
    lines = list(_LINE.finditer(passage.text))
    pairs = zip(lines, [*(line[0] for line in lines[1:]), ""], strict=True)
    rows = [line for line, below in pairs if _CELL in line[0] and not _is_header(line[0], below)]
    return [_cut(passage, *row.span()) for row in rows]


def _is_header(line: str, below: str) -> bool:
    first = line.split(_CELL)[0].strip()
    ruled = _RULE.fullmatch(line) or _RULE.fullmatch(below)
    return ruled is not None or below.startswith(f"{first}: ")


def _cut(passage: Passage, start: int, end: int) -> Passage:
    first = passage.char_start
    return replace(passage, text=passage.text[start:end], char_start=first + start, char_end=first + end)


def choose_place(question: str, places: Iterable[Place]) -> Place | None:
    """The occurrence of a quote whose line shares most words with the question, weighted by rarity; the first of
    equals."""
    wanted = _keys(" ".join(content_words(question)))
    known = list(islice(places, _MOST_PLACES if wanted else 1))
    if len(known) < 2:
        return known[0] if known else None
    lines = [wanted.intersection(_keys(_line_of(place))) for place in known]
    counts = Counter(stem for line in lines for stem in line)
    weights = [sum(1 / counts[stem] for stem in line) for line in lines]
    return known[weights.index(max(weights))]


def _line_of(place: Place) -> str:
    text = place.passage.text
    start, end = text.rfind("\n", 0, place.start) + 1, text.find("\n", place.end)
    return text[start : end if end >= 0 else len(text)]


def places_of(pattern: re.Pattern[str], passages: Iterable[Passage]) -> Iterable[Place]:
    """All matches of the pattern."""
    for passage in passages:
        for found in pattern.finditer(passage.text):
            yield Place(passage, *found.span())


def _keys(text: str) -> set[str]:
    """Words truncated to a common stem; pieces with digits unchanged."""
    pieces = (piece.lower() for piece in _PIECE.findall(text))
    return {piece if any(map(str.isdigit, piece)) else piece[:_STEM_CHARS] for piece in pieces}

"""Lines of a PDF page -> paragraphs, by geometry, independent of PDFium.

A PDF has only positioned lines, no paragraphs. Wrapped lines are joined by a space, rows and list items stay lines,
paragraphs are separated by an empty line. When in doubt, a line stays a line; text is never dropped or reordered.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

CELL_GAP = " | "
HYPHEN_MARK = "\ufffe"  # PDFium's marker for a word hyphenated at the end of a line
_ITEM = re.compile(r"(?:[•◦▪‣·–—*-]|\(?\d{1,3}[.)]|\(?[a-z][.)])\s")
_SENTENCE_END = (".", "!", "?", ":", "…", ".”", '."', ".)")
_MIN_WRAPPED_CHARS = 36  # shorter lines are treated as labels, addresses, verse
_STRIP_POINTS = 18.0  # lines whose left edges differ by less than about this belong to one column
_MARKS = re.compile(r"[\ufffe\x02]|\xad(?=\s|$)")
_DIVIDED = re.compile(rf"(\w+){HYPHEN_MARK}\s*(\w+)")
_WORDS = re.compile(r"\w+(?:-\w+)*")


@dataclass(frozen=True, slots=True)
class Line:
    """Text and box in points, origin at the lower left of the page; a box of zeros is unknown.

    `first`, `units`: position and length in PDFium's text. `cells`: cells of a row, empty if there is only one.
    """

    text: str
    left: float
    bottom: float
    right: float
    top: float
    first: int = 0
    units: int = 0
    cells: tuple["Line", ...] = ()

    @property
    def is_row(self) -> bool:
        return bool(self.cells)

    @property
    def height(self) -> float:
        return self.top - self.bottom


def join_lines(lines: Sequence[Line]) -> str:
    """The page's text. Words hyphenated at the end of a line have a HYPHEN_MARK, for `join_hyphenated`."""
    if not lines:
        return ""
    pitches = [above.bottom - line.bottom for above, line in pairwise(lines)]
    pitch = median([value for value in pitches if value > 0] or [0.0])
    pieces = [_mark(lines[0].text)]
    for (above, line), right_edge in zip(pairwise(lines), _right_edges(lines)[:-1], strict=True):
        gap = _gap(above, line, pitch, right_edge)
        if pieces[-1].endswith(HYPHEN_MARK):
            gap = ""
        elif gap == " " and re.search(r"\w-$", above.text) and line.text[:1].islower():
            pieces[-1] = pieces[-1][:-1] + HYPHEN_MARK
            gap = ""
        pieces += (gap, _mark(line.text))
    return "".join(pieces)


def _mark(text: str) -> str:
    return _MARKS.sub(HYPHEN_MARK, text)


def _right_edges(lines: Sequence[Line]) -> list[float]:
    """For each line, the right edge of the longest line with about the same left edge."""
    by_strip: dict[int, float] = {}
    for line in lines:
        strip = int(line.left // _STRIP_POINTS)
        by_strip[strip] = max(line.right, by_strip.get(strip, 0.0))
    strips = [int(line.left // _STRIP_POINTS) for line in lines]
    return [max(by_strip.get(near, 0.0) for near in (strip - 1, strip, strip + 1)) for strip in strips]


def _gap(above: Line, line: Line, pitch: float, right_edge: float) -> str:
    """The separator of two lines: a space (wrapped), a line feed (row, item), an empty line (paragraph)."""
    if not above.height or not line.height:
        return "\n"
    drop = above.bottom - line.bottom
    if abs(drop) < 0.3 * line.height:
        return "\n"  # side by side: cells of a row
    if drop < 0:  # the next column, or a box beside the text
        return " " if _runs_on(above, line) else "\n\n"
    if drop > 1.35 * pitch or abs(line.height - above.height) > 0.15 * above.height:
        return "\n\n"
    if _ITEM.match(line.text):
        return "\n"
    if above.is_row or line.is_row:
        return "\n"
    if line.left > above.left + 0.6 * line.height and above.text.endswith(_SENTENCE_END):
        return "\n\n"  # indented first line
    is_full = len(above.text) >= _MIN_WRAPPED_CHARS and is_wrapped(above, line, right_edge)
    return " " if is_full or _runs_on(above, line) else "\n"


def is_wrapped(above: Line, line: Line, right_edge: float) -> bool:
    """Whether the first word of `line`, with a space, did not fit after `above`, or was hyphenated."""
    if _MARKS.search(above.text[-1:]):
        return True
    word_width = (line.right - line.left) * (len(line.text.split(maxsplit=1)[0]) + 1) / len(line.text)
    return above.right + word_width > right_edge


def _runs_on(above: Line, line: Line) -> bool:
    is_prose = len(above.text) >= _MIN_WRAPPED_CHARS and not above.is_row
    return is_prose and not above.text.endswith(_SENTENCE_END) and line.text[:1].islower()


def join_hyphenated(texts: Sequence[str]) -> list[str]:
    """Resolve HYPHEN_MARK in the texts of pages: "exam|ple" -> "example", but "well|known" -> "well-known" if the
    document has that elsewhere, or if a part is not an ordinary word (digits, capitals).
    """
    known = {word.casefold() for text in texts if HYPHEN_MARK in text for word in _WORDS.findall(text)}

    def join(match: re.Match[str]) -> str:
        first, second = match[1], match[2]
        compound = f"{first}-{second}"
        if compound.casefold() in known and (first + second).casefold() not in known:
            return compound
        is_word = first[-1].isalpha() and second[0].islower()
        return first + second if is_word else compound

    return [_DIVIDED.sub(join, text).replace(HYPHEN_MARK, "-") if HYPHEN_MARK in text else text for text in texts]

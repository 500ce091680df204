"""Lines of a PDF page with their positions, from PDFium; pdf_layout.py turns them into paragraphs.

Uses PDFium's raw functions with reused buffers, because each page takes about a hundred calls.
"""

import ctypes
import re
from dataclasses import replace
from itertools import pairwise

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from ingest.parse.pdf_columns import in_reading_order
from ingest.parse.pdf_layout import CELL_GAP, Line

_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
_CELL_GAP_HEIGHTS = 1.0  # width of a gap that separates cells of a row, in line heights
_LINES = re.compile(r"[^\ufffe\x02]*[\ufffe\x02]|[^\ufffe\x02]+$")  # PDFium has no line feed after a hyphen
_BLANKS = re.compile(r"\s+")


def read_lines(text_page: pdfium.PdfTextPage) -> list[Line]:
    """The page's lines in reading order; cells of a table row are separated by " | "."""
    text = text_page.get_text_range()
    return in_reading_order(_read_lines(_Places(text_page, _units(text)), text))


def char_ranges(text_page: pdfium.PdfTextPage) -> list[range]:
    """PDFium's character indices in the order of `read_lines`; one range if that is PDFium's own order."""
    text = text_page.get_text_range()
    places = _Places(text_page, _units(text))
    lines = in_reading_order(_read_lines(places, text))
    if all(above.first <= line.first for above, line in pairwise(lines)):
        return [range(text_page.count_chars())]
    return [places.chars(line.first, line.units) for line in lines]


def _read_lines(places: "_Places", text: str) -> list[Line]:
    lines, index = [], 0  # index in PDFium's text, UTF-16 units
    for raw in text.split("\n"):
        for piece in _LINES.findall(raw):
            if bare := piece.strip():
                lines.append(_read_line(places, bare, index + _units(piece[: piece.index(bare)])))
            index += _units(piece)
        index += 1
    return lines


class _Places:
    """Positions of characters, by their index in the page's text."""

    def __init__(self, text_page: pdfium.PdfTextPage, units: int) -> None:
        self._page = text_page.raw
        self._same = self._char_index(units - 1) == units - 1  # the text omits no characters
        self._box = pdfium_c.FS_RECTF()
        self._edges = [ctypes.c_double() for _ in range(4)]

    def _char_index(self, index: int) -> int:
        return pdfium_c.FPDFText_GetCharIndexFromTextIndex(self._page, index)

    def box(self, index: int) -> tuple[float, float, float, float] | None:
        """Left, bottom, right, top in points; the height is that of the font. None if PDFium has no box."""
        char = index if self._same else self._char_index(index)
        box = self._box
        if not pdfium_c.FPDFText_GetLooseCharBox(self._page, char, box):
            return None
        return box.left, box.bottom, box.right, box.top

    def chars(self, first: int, units: int) -> range:
        """PDFium's character indices of a piece of the text."""
        start, end = first, first + units - 1
        return range(start, end + 1) if self._same else range(self._char_index(start), self._char_index(end) + 1)

    def has_gap(self, first: int, units: int, width: float) -> bool:
        """Whether two runs of the line are that far apart; for most lines one call shows that there is one run."""
        chars = self.chars(first, units)
        count = pdfium_c.FPDFText_CountRects(self._page, chars.start, len(chars))
        if count < 2:
            return False
        return any(after[0] - before[1] > width for before, after in pairwise(map(self._run, range(count))))

    def _run(self, number: int) -> tuple[float, float]:
        """Left and right edge of one of the runs counted last."""
        left, top, right, bottom = self._edges
        pdfium_c.FPDFText_GetRect(self._page, number, left, top, right, bottom)
        return left.value, right.value


def _read_line(places: _Places, text: str, first: int) -> Line:
    """The line `text` that starts at PDFium's text index `first`."""
    line = _place(places, text, first)
    width = _CELL_GAP_HEIGHTS * line.height
    if not width or not places.has_gap(first, line.units, width):
        return line
    cells = _split_cells(places, text, first, width)
    return line if len(cells) < 2 else replace(line, text=CELL_GAP.join(cell.text for cell in cells), cells=cells)


def _place(places: _Places, text: str, first: int) -> Line:
    units = _units(text)
    shown = text if text.isascii() else text.translate(_LIGATURES)
    head, tail = places.box(first), places.box(first + units - 1)
    if head is None or tail is None:
        return Line(shown, 0.0, 0.0, 0.0, 0.0, first, units)
    return Line(shown, head[0], head[1], tail[2], head[3], first, units)


def _split_cells(places: _Places, text: str, first: int, width: float) -> tuple[Line, ...]:
    """Split the line at each space that is wider than `width`."""
    cells, start = [], 0
    for blank in _BLANKS.finditer(text):
        before = places.box(first + _units(text[: blank.start()]) - 1)
        after = places.box(first + _units(text[: blank.end()]))
        if before is not None and after is not None and after[0] - before[2] > width:
            cells.append(_place(places, text[start : blank.start()], first + _units(text[:start])))
            start = blank.end()
    return (*cells, _place(places, text[start:], first + _units(text[:start])))


def _units(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2

"""Lines of a PDF page with their places, as PDFium reads them; how they become paragraphs is in pdf_layout.py.

PDFium is asked through its plain functions with buffers that are used again: a page has a hundred questions.
"""

import ctypes
import re
from itertools import pairwise

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from ingest.parse.pdf_layout import Line

_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
_CELL_GAP = " | "
_CELL_GAP_HEIGHTS = 1.0  # a gap this wide, in heights of a line, parts the cells of a row
_BLANKS = re.compile(r"\s+")


def read_lines(text_page: pdfium.PdfTextPage) -> list[Line]:
    """The page's lines in PDFium's reading order; the cells of a table row are set apart by " | "."""
    text = text_page.get_text_range()
    places = _Places(text_page, _units(text))
    lines, index = [], 0  # index in PDFium's text, UTF-16 units
    for raw in text.split("\n"):
        if bare := raw.strip():
            lines.append(_read_line(places, bare, index + _units(raw[: raw.index(bare)])))
        index += _units(raw) + 1
    return lines


class _Places:
    """Where characters stand, by their index in the page's text."""

    def __init__(self, text_page: pdfium.PdfTextPage, units: int) -> None:
        self._page = text_page.raw
        self._same = self._char_index(units - 1) == units - 1  # no character before the last is left out of the text
        self._box = pdfium_c.FS_RECTF()
        self._edges = [ctypes.c_double() for _ in range(4)]

    def _char_index(self, index: int) -> int:
        return pdfium_c.FPDFText_GetCharIndexFromTextIndex(self._page, index)

    def box(self, index: int) -> tuple[float, float, float, float] | None:
        """Left, bottom, right, top in points; the height is the font's. None when PDFium has none."""
        char = index if self._same else self._char_index(index)
        box = self._box
        if not pdfium_c.FPDFText_GetLooseCharBox(self._page, char, box):
            return None
        return box.left, box.bottom, box.right, box.top

    def has_gap(self, first: int, units: int, width: float) -> bool:
        """Whether two runs of the line stand so far apart; one call tells for most lines that there is one run."""
        start, end = first, first + units - 1
        if not self._same:
            start, end = self._char_index(start), self._char_index(end)
        count = pdfium_c.FPDFText_CountRects(self._page, start, end - start + 1)
        if count < 2:
            return False
        return any(after[0] - before[1] > width for before, after in pairwise(map(self._run, range(count))))

    def _run(self, number: int) -> tuple[float, float]:
        """Left and right of one run of those counted last."""
        left, top, right, bottom = self._edges
        pdfium_c.FPDFText_GetRect(self._page, number, left, top, right, bottom)
        return left.value, right.value


def _read_line(places: _Places, text: str, first: int) -> Line:
    """The line `text` that starts at PDFium's text index `first`."""
    units = _units(text)
    head, tail = places.box(first), places.box(first + units - 1)
    if head is None or tail is None:
        return Line(text.translate(_LIGATURES), 0.0, 0.0, 0.0, 0.0)
    left, bottom, _, top = head
    width = _CELL_GAP_HEIGHTS * (top - bottom)
    cells = _split_cells(places, text, first, width) if places.has_gap(first, units, width) else [text]
    shown = _CELL_GAP.join(cells)
    return Line(
        shown if shown.isascii() else shown.translate(_LIGATURES), left, bottom, tail[2], top, is_row=len(cells) > 1
    )


def _split_cells(places: _Places, text: str, first: int, width: float) -> list[str]:
    """Cut the line at each blank that is much wider than a blank."""
    cells, start = [], 0
    for blank in _BLANKS.finditer(text):
        before = places.box(first + _units(text[: blank.start()]) - 1)
        after = places.box(first + _units(text[: blank.end()]))
        if before is not None and after is not None and after[0] - before[2] > width:
            cells.append(text[start : blank.start()])
            start = blank.end()
    return [*cells, text[start:]]


def _units(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2

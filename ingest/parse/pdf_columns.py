"""Restores the reading order of two-column pages whose lines are stored row by row, by geometry.

Most programs write column by column, and PDFium preserves the order. If the lines of two columns alternate, it returns
rows of two cells. These are a table unless both sides are running text that continues from line to line. When in doubt,
rows stay rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median

from ingest.parse.pdf_layout import CELL_GAP, Line, is_wrapped

_MIN_ROWS = 4
_MIN_CHARS = 20  # median line length of running text
_MIN_WRAPPED = 0.6  # share of lines that end where the next word did not fit
_MIN_RUNNING = 0.5  # share of lines that begin with a lower-case letter
_MAX_DROP = 2.0  # distance to the next line, in line heights
_MIN_GUTTER = 0.5  # width of the gutter, in line heights


def in_reading_order(lines: Sequence[Line]) -> list[Line]:
    """The lines, with the left column before the right one where rows are columns of running text."""
    ordered: list[Line] = []
    start = 0
    while start < len(lines):
        end, gutter = _find_block(lines, start)
        if end - start < _MIN_ROWS:
            ordered.append(lines[start])
            start += 1
            continue
        block = lines[start:end]
        sides = [_side(line, gutter, is_left=True) for line in block], [_side(line, gutter, False) for line in block]
        columns = [[cell for cell in side if cell] for side in sides]
        ordered += columns[0] + columns[1] if _are_columns(*sides) else block
        start = end
    return ordered


def _find_block(lines: Sequence[Line], start: int) -> tuple[int, float]:
    """(end, middle of the gutter) of the lines from `start` on that share a gutter; (start, 0) if there are none."""
    if len(lines[start].cells) != 2:
        return start, 0.0
    low, high, end = lines[start].cells[0].right, lines[start].cells[1].left, start + 1
    while end < len(lines):
        line = lines[end]
        if not 0 < lines[end - 1].bottom - line.bottom < _MAX_DROP * line.height:
            break
        cells, middle = line.cells or (line,), (low + high) / 2
        right_ends = [low, *(cell.right for cell in cells if cell.left < middle)]
        left_ends = [high, *(cell.left for cell in cells if cell.left >= middle)]
        if min(left_ends) - max(right_ends) < _MIN_GUTTER * line.height:
            break
        low, high, end = max(right_ends), min(left_ends), end + 1
    return end, (low + high) / 2


def _side(line: Line, gutter: float, is_left: bool) -> Line | None:
    """The part of the line on one side of the gutter."""
    cells = [cell for cell in line.cells or (line,) if (cell.left < gutter) == is_left]
    if len(cells) < 2:
        return cells[0] if cells else None
    first, last = cells[0], cells[-1]
    units = last.first + last.units - first.first
    text = CELL_GAP.join(cell.text for cell in cells)
    return replace(first, text=text, right=last.right, units=units, cells=tuple(cells))


def _are_columns(left: Sequence[Line | None], right: Sequence[Line | None]) -> bool:
    """Whether both sides are running text, and no row ends on both sides as in a table."""
    wrapped = [_wrapped(left), _wrapped(right)]
    rows = [(a, b) for a, b in zip(*wrapped, strict=True) if a is not None and b is not None]
    is_table = any(not a and not b for a, b in rows)
    return (
        len(rows) + 1 >= _MIN_ROWS and not is_table and _is_running(left, wrapped[0]) and _is_running(right, wrapped[1])
    )


def _wrapped(side: Sequence[Line | None]) -> list[bool | None]:
    """For each line except the last, whether it is wrapped; None if it or the next one is missing."""
    edge = max((line.right for line in side if line), default=0.0)
    return [is_wrapped(above, line, edge) if above and line else None for above, line in pairwise(side)]


def _is_running(side: Sequence[Line | None], wrapped: Sequence[bool | None]) -> bool:
    texts = [line.text for line in side if line]
    known = [value for value in wrapped if value is not None]
    if len(texts) < _MIN_ROWS or not known or median(map(len, texts)) < _MIN_CHARS:
        return False
    running = sum(text[:1].isalpha() and not text[:1].isupper() for text in texts[1:])
    return sum(known) >= _MIN_WRAPPED * len(known) and running >= _MIN_RUNNING * (len(texts) - 1)

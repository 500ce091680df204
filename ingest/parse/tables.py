"""Rows of cells -> self-contained lines: "Country: France | Per day: 60 EUR".

Shared by formats whose tables do not mark a header.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain, islice

from ingest.parse.blocks import BlockWriter, table_row_text

Row = Mapping[int, str]  # column -> text, without empty cells
_BLOCK_CHARS = 400  # so that a chunk ends between rows, not within one
_LOOK_AHEAD = 12
_VALUE = re.compile(r"[-+(]?[$€£¥]?\s?\d[\d\s.,:/'’-]*(?:[eE][-+]?\d+)?\s?[%€$£¥)]?|TRUE|FALSE|#\S+", re.I)

_YEAR = re.compile(r"(?:19|20)\d\d")


def write_rows(writer: BlockWriter, rows: Iterable[Row]) -> None:
    """Write one line per non-empty row, with each cell prefixed by its column header if the table has one.

    The header is the first row with as many cells as most of the following rows, if its cells are distinct words and
    years; rows above it (a title, a date) are written unchanged. For a table of words, a missing header cannot be
    detected.
    """
    rows = (row for row in rows if row)
    first = list(islice(rows, _LOOK_AHEAD))
    header_at = _find_header(first)
    header: Row = {} if header_at is None else first[header_at]
    filled = 0
    writer.end_block()
    for number, row in enumerate(chain(first, rows)):
        named = header_at is not None and number > header_at
        line = table_row_text([header.get(column, "") if named else "" for column in row], list(row.values()))
        if filled and filled + len(line) > _BLOCK_CHARS:
            writer.end_block()
            filled = 0
        writer.add_line(line)
        filled += len(line)
    writer.end_block()


def _find_header(rows: list[Row]) -> int | None:
    usual = Counter(len(row) for row in rows).most_common(1)[0][0] if rows else 0
    left = min((min(row) for row in rows), default=0)
    for number, row in enumerate(rows[:-1]):
        is_cornered = min(row) > left  # nothing stands above the names of the rows
        if len(row) < 2 or len(row) + is_cornered < usual:
            continue
        return number if _is_header(row, is_cornered) else None
    return None


def _is_header(row: Row, is_cornered: bool) -> bool:
    names = [" ".join(name.split()).casefold() for name in row.values()]
    words = [name for name in names if not _VALUE.fullmatch(name)]
    years = [name for name in names if _YEAR.fullmatch(name)]
    if len(set(names)) < len(names) or len(words) + len(years) < len(names):
        return False
    return not years or (len(years) > 1 and (is_cornered or bool(words)))

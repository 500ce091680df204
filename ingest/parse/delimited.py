"""CSV and TSV: one line per row, each cell with its column name. Encoding and delimiter are detected."""

import csv
import io
from collections import Counter
from collections.abc import Iterator

from ingest.parse.blocks import BlockWriter
from ingest.parse.tables import Row, write_rows
from ingest.parse.text import read_text
from retrieval.parsed import ParsedDocument

CSV = "text/csv"
TSV = "text/tab-separated-values"
_DELIMITERS = ",;\t|"
_SAMPLE_CHARS = 64 * 1024
_MAX_CELL_CHARS = 10_000_000


def parse_delimited(data: bytes, media_type: str) -> ParsedDocument:
    """Read the rows; text without columns stays plain text. Raises ParseError undecodable_text."""
    text = read_text(data)
    text, delimiter = _take_declaration(text)
    delimiter = delimiter or ("\t" if media_type == TSV and "\t" in text[:_SAMPLE_CHARS] else _guess_delimiter(text))
    if delimiter is None:
        return ParsedDocument(text=text, media_type=media_type)
    csv.field_size_limit(_MAX_CELL_CHARS)
    writer = BlockWriter()
    try:
        write_rows(writer, _read_rows(text, delimiter))
    except csv.Error:  # a cell over the limit: an open quote in a big file
        return ParsedDocument(text=text, media_type=media_type)
    return writer.finish(media_type)


def _take_declaration(text: str) -> tuple[str, str | None]:
    """Remove Excel's first line "sep=;", which declares the delimiter; returns the rest and the delimiter, if any."""
    first, _, rest = text.partition("\n")
    if len(first) == 5 and first[:4].lower() == "sep=":
        return rest, first[4]
    return text, None


def _guess_delimiter(text: str) -> str | None:
    """The delimiter that gives most rows of a sample the same number of cells, at least two; of equals, most cells."""
    sample = text[:_SAMPLE_CHARS]
    if len(text) > len(sample):
        sample = sample[: sample.rfind("\n") + 1] or sample
    best: tuple[float, int, str] | None = None
    for delimiter in _DELIMITERS:
        widths = Counter(len(row) for row in csv.reader(io.StringIO(sample), delimiter=delimiter) if any(row))
        if not widths:
            return None
        width, rows = widths.most_common(1)[0]
        if width > 1:
            candidate = (rows / widths.total(), width, delimiter)
            best = candidate if best is None or candidate[:2] > best[:2] else best
    return best[2] if best else None


def _read_rows(text: str, delimiter: str) -> Iterator[Row]:
    for cells in csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True):
        yield {column: cell for column, cell in enumerate(cells) if cell.strip()}

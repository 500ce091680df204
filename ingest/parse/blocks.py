"""Builds one text with exact offsets from paragraphs, lines, headings and pages; shared by most parsers."""

import re

from ingest.parse import MAX_OUTPUT_BYTES, output_too_large
from ingest.parse.decode import normalize_text
from retrieval.parsed import Heading, Page, ParsedDocument

_SPACE = re.compile(r"\s+")


class BlockWriter:
    """Text is added in pieces; blocks are separated by an empty line, lines within a block by a line feed.

    Raises ParseError output_too_large as soon as the limit is exceeded: repeated cells can expand to any length.
    """

    def __init__(self) -> None:
        self._text: list[str] = []
        self._length = 0
        self._pending: list[str] = []  # the line being written
        self._gap = ""  # written before the next line,
        self._mark = ""  # and at its beginning
        self._headings: list[Heading] = []
        self._pages: list[Page] = []

    def add(self, text: str, *, keep_space: bool = False) -> None:
        """Append to the current line. Runs of white space are collapsed to one space unless `keep_space`."""
        self._pending.append(text if keep_space else _SPACE.sub(" ", text))

    def take(self) -> str:
        """Take back the current line instead of writing it."""
        line = _clean("".join(self._pending))
        self._pending.clear()
        return line

    def begin_item(self, mark: str) -> None:
        """The next line written begins with `mark`, even if it is a block of its own."""
        self._mark = mark

    def end_line(self) -> None:
        self.add_line(self.take())

    def end_block(self) -> None:
        self.end_line()
        if self._length:
            self._gap = "\n\n"

    def end_page(self, label: str | None = None) -> None:
        """End the current page; pages are numbered from 1, and have an empty range if there is no text."""
        self.end_block()
        start = self._pages[-1].char_end if self._pages else 0
        if self._pages and start and self._length > start:
            start += len(self._gap)
        self._pages.append(Page(len(self._pages) + 1, label, start, self._length))

    def end_heading(self, level: int) -> None:
        """Write the current line as a block of its own that opens a section."""
        title = normalize_text(_SPACE.sub(" ", self.take()))
        if title:
            self._gap = "\n\n" if self._length else ""
            start = self._length + len(self._gap)
            self.add_line(title)
            self._headings.append(Heading(level, title, start))
            self._gap = "\n\n"

    def add_line(self, line: str) -> None:
        """Write one line, unless it is empty."""
        line = normalize_text(line)
        if line:
            line, self._mark = self._mark + line, ""
            self._text += (self._gap, line)
            self._length += len(self._gap) + len(line)
            self._gap = "\n"
            if self._length > MAX_OUTPUT_BYTES:
                raise output_too_large()

    def add_document(self, parsed: ParsedDocument, depth: int) -> None:
        """Append the text of a parsed document verbatim; its headings become `depth` levels deeper."""
        self.end_block()
        start = self._length + len(self._gap)
        self._text += (self._gap, parsed.text)
        self._length = start + len(parsed.text)
        self._headings += [Heading(h.level + depth, h.title, start + h.char_start) for h in parsed.headings]
        self._gap = "\n\n"

    def finish(self, media_type: str, *, title: str | None = None) -> ParsedDocument:
        """Title: the given one, else the first heading."""
        self.end_block()
        if title is None and self._headings:
            title = self._headings[0].title
        return ParsedDocument(
            text="".join(self._text),
            pages=tuple(self._pages),
            headings=tuple(self._headings),
            title=title,
            media_type=media_type,
        )


def table_row_text(header: list[str], cells: list[str]) -> str:
    """One row as a self-contained line: "Country: France | Per day: 60 EUR"; without a header only the cells."""
    cells = [" ".join(cell.split()) for cell in cells]
    if header:
        cells = [f"{name}: {cell}" if name and cell else cell for name, cell in zip(header, cells, strict=True)]
    return " | ".join(cell for cell in cells if cell)


def _clean(line: str) -> str:
    lines = [part.rstrip() for part in line.split("\n")]
    if len(lines) == 1:
        return re.sub(r" {2,}", " ", lines[0]).strip()
    while lines and not lines[0]:
        lines.pop(0)
    return "\n".join(lines).rstrip()

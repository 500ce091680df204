"""ODT: headings, paragraphs, lists and tables in order. Page layout is not stored, so there are no pages.

Text boxes and footnotes follow the paragraph they are anchored to.
"""

import re
from collections.abc import Iterator

from lxml import etree

from ingest.parse import ParseError, Source
from ingest.parse.archive import Package, open_package
from ingest.parse.blocks import BlockWriter
from ingest.parse.tables import write_rows
from retrieval.parsed import ParsedDocument

MEDIA_TYPE = "application/vnd.oasis.opendocument.text"
_TEXT = "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}"
_TABLE = "{urn:oasis:names:tc:opendocument:xmlns:table:1.0}"
_COVERED = f"{_TABLE}covered-table-cell"
_OFFICE = "{urn:oasis:names:tc:opendocument:xmlns:office:1.0}"
_DC_TITLE = "{http://purl.org/dc/elements/1.1/}title"
_NOTE, _BOX = f"{_TEXT}note", "{urn:oasis:names:tc:opendocument:xmlns:drawing:1.0}text-box"
_SKIPPED = frozenset(
    {f"{_TEXT}tracked-changes", f"{_OFFICE}annotation", f"{_TEXT}table-of-content"}
    | {f"{_TEXT}sequence-decls", f"{_TEXT}variable-decls", f"{_OFFICE}forms"}
)
_SPACE = re.compile(r"\s+")
_MAX_REPEAT = 1_000  # for spaces and cells that are stored with a repeat count


def parse_odt(source: Source) -> ParsedDocument:
    """Read the body; headers, comments and deleted text are left out.

    Raises ParseError broken_odt, encrypted_odt, zip_bomb.
    """
    with open_package(source, "odt", "OpenDocument text") as package:
        manifest = "META-INF/manifest.xml"
        if manifest in package and package.xml(manifest).find(".//{*}encryption-data") is not None:
            raise ParseError("encrypted_odt", "the document is protected by a password; remove it and upload it again")
        body = package.xml("content.xml").find(f"./{_OFFICE}body/{_OFFICE}text")
        if body is None:
            raise ValueError("content.xml holds no text")
        writer = BlockWriter()
        _write_body(writer, body)
        return writer.finish(MEDIA_TYPE, title=_title(package))


def _title(package: Package) -> str | None:
    if "meta.xml" not in package:
        return None
    return " ".join((package.xml("meta.xml").findtext(f".//{_DC_TITLE}") or "").split()) or None


def _write_body(writer: BlockWriter, body: etree._Element) -> None:
    walker = etree.iterwalk(body, events=("start",))
    last_list = None
    for _, element in walker:
        if element.tag in _SKIPPED:
            walker.skip_subtree()
        elif element.tag == f"{_TABLE}table":
            walker.skip_subtree()
            write_rows(writer, _rows(element))
            for note in element.iter(_NOTE):
                _write_note(writer, note)
        elif element.tag == _NOTE:
            walker.skip_subtree()
            _write_note(writer, element)
            last_list = None
        elif element.tag == f"{_TEXT}h":
            writer.end_block()
            writer.add(_text(element))
            level = element.get(f"{_TEXT}outline-level", "1")
            writer.end_heading(int(level) if level in "123456789" else 1)
            last_list = None
        elif element.tag == f"{_TEXT}p":
            outer = _outer_list(element)
            if outer is None or outer is not last_list:
                writer.end_block()
            is_item = outer is not None and element.getprevious() is None
            writer.add(("- " if is_item else "") + _text(element), keep_space=True)
            writer.end_line()
            last_list = outer


def _write_note(writer: BlockWriter, note: etree._Element) -> None:
    writer.end_block()
    writer.add_line("Footnote: " + " ".join(_text(paragraph) for paragraph in note.iter(f"{_TEXT}p")))
    writer.end_block()


def _outer_list(paragraph: etree._Element) -> etree._Element | None:
    """The outermost list around a paragraph, whose items become the lines of one block."""
    return next(iter(reversed([*paragraph.iterancestors(f"{_TEXT}list")])), None)


def _text(paragraph: etree._Element) -> str:
    """The text of a paragraph, without its text boxes and notes."""
    pieces: list[str] = []
    walker = etree.iterwalk(paragraph, events=("start", "end"))
    for event, element in walker:
        if event == "start":
            if element.tag in _SKIPPED or element.tag in (_NOTE, _BOX):
                walker.skip_subtree()
            elif isinstance(element.tag, str):  # no entity
                pieces += (_blank(element), _SPACE.sub(" ", element.text or ""))
        elif element is not paragraph:
            pieces.append(_SPACE.sub(" ", element.tail or ""))
    return "".join(pieces).strip()


def _blank(element: etree._Element) -> str:
    """The white space that an element stands for; in the XML itself, runs of white space mean one space."""
    if element.tag == f"{_TEXT}s":
        return " " * _count(element.get(f"{_TEXT}c", "1"))
    return {f"{_TEXT}tab": "\t", f"{_TEXT}line-break": "\n"}.get(element.tag, "")


def _rows(table: etree._Element) -> Iterator[dict[int, str]]:
    """Rows as column -> text; a cell merged over rows is in each of them."""
    above: dict[int, tuple[str, int]] = {}  # column -> (text, rows it still spans)
    for row in table.iter(f"{_TABLE}table-row"):
        cells, column, reaching = {}, 0, {}
        for cell in row.iterchildren(f"{_TABLE}table-cell", _COVERED):
            text, rows = " ".join(_text(item) for item in cell.iter(f"{_TEXT}p", f"{_TEXT}h")), 1
            if cell.tag == _COVERED:
                text, rows = above.get(column, (text, 1))
            else:
                rows = _count(cell.get(f"{_TABLE}number-rows-spanned", "1"))
            if rows > 1:
                reaching[column] = text, rows - 1
            repeat = _count(cell.get(f"{_TABLE}number-columns-repeated", "1"))
            for offset in range(repeat if text.strip() else 0):
                cells[column + offset] = text
            column += repeat
        above = reaching
        yield cells


def _count(number: str) -> int:
    return min(int(number), _MAX_REPEAT) if number.isdecimal() else 1

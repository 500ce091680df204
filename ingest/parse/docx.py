"""DOCX: headings, paragraphs, lists and tables in order. Word does not store page layout, so there are no pages.

Reads the parts of the zip directly (ECMA-376, WordprocessingML), with all tracked changes accepted, and including text
in form fields and content controls. Text boxes and footnotes follow the paragraph they are anchored to.
"""

from collections.abc import Iterator
from typing import NamedTuple

from lxml import etree

from ingest.parse import Source
from ingest.parse.archive import Package, open_package
from ingest.parse.blocks import BlockWriter, table_row_text
from retrieval.parsed import ParsedDocument

MEDIA_TYPE = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
_PARAGRAPH, _TABLE, _ROW, _CELL, _BOX = "p", "tbl", "tr", "tc", "txbxContent"
_SKIPPED = frozenset({"pPr", "rPr", "sdtPr", "del", "moveFrom", _BOX})  # within a paragraph
_UNWRAPPED = frozenset({"sdt", "sdtContent", "ins", "moveTo", "smartTag", "customXml"})  # around paragraphs and rows
_BLANK = {"tab": "\t", "ptab": "\t", "cr": "\n", "br": "\n", "noBreakHyphen": "-"}
_NOTES = {"footnoteReference": "footnotes", "endnoteReference": "endnotes"}
_DC_TITLE = "{http://purl.org/dc/elements/1.1/}title"


class _Parts(NamedTuple):
    """Parts that the body refers to."""

    styles: dict[str, str]  # id -> name, which is English and lower case even if ids are localized
    notes: dict[tuple[str, str], str]  # (kind, id) -> text of a footnote or an endnote


def parse_docx(source: Source) -> ParsedDocument:
    """Read the body; headers, footers, comments and deleted text are left out.

    Raises ParseError broken_docx, zip_bomb.
    """
    with open_package(source, "docx", "Word document") as package:
        root = dict(package.relations("").values())
        related = dict(package.relations(root["officeDocument"]).values())
        body = package.xml(root["officeDocument"]).find("./{*}body")
        if body is None:
            raise ValueError("it has no body")
        for double in list(body.iter("{*}Fallback")):  # duplicates of shapes, for older programs
            double.getparent().remove(double)
        notes = {
            (kind, _get(note, "id") or ""): " ".join(_texts(note)).strip()
            for kind in _NOTES.values()
            if related.get(kind) in package
            for note in package.xml(related[kind])
        }
        writer = BlockWriter()
        _write_blocks(writer, body, _Parts(_style_names(package, related.get("styles")), notes))
        core = root.get("core-properties")
        title = package.xml(core).findtext(f".//{_DC_TITLE}") if core in package else None
        return writer.finish(MEDIA_TYPE, title=(title or "").strip() or None)


def _style_names(package: Package, member: str | None) -> dict[str, str]:
    if member not in package:
        return {}
    names = ((style, style.find("./{*}name")) for style in package.xml(member).iterfind("./{*}style"))
    return {_get(style, "styleId") or "": (_get(name, "val") or "").lower() for style, name in names}


def _write_blocks(writer: BlockWriter, parent: etree._Element, parts: _Parts) -> None:
    in_list = False
    for item in _children(parent, _PARAGRAPH, _TABLE):
        if _name(item) == _TABLE:
            _write_table(writer, item)
            in_list = False
        else:
            style_id = _get(item.find("./{*}pPr/{*}pStyle"), "val") or ""
            style = parts.styles.get(style_id, "")
            if style.startswith("toc "):
                continue  # a line of the table of contents
            is_item = item.find("./{*}pPr/{*}numPr") is not None or style_id.startswith("List")
            writer.end_line() if is_item and in_list else writer.end_block()
            writer.add(("- " if is_item else "") + _text(item), keep_space=True)
            if level := _heading_level(style):
                writer.end_heading(level)
            elif not is_item:
                writer.end_block()
            in_list = is_item
            for box in item.iter(f"{{*}}{_BOX}"):
                if next(box.iterancestors(f"{{*}}{_BOX}"), None) is None:
                    _write_blocks(writer, box, parts)
        for note in item.iter(*(f"{{*}}{name}" for name in _NOTES)):
            text = parts.notes.get((_NOTES[_name(note)], _get(note, "id") or ""))
            if text and next(note.iterancestors("{*}del", "{*}moveFrom"), None) is None:
                writer.end_block()
                writer.add_line(f"Footnote: {text}")
                writer.end_block()


def _heading_level(style: str) -> int:
    """1 for the title, N + 1 for "heading N", 0 for others."""
    number = style.removeprefix("heading ")
    return 1 if style == "title" else min(9, int(number)) + 1 if number != style and number.isdecimal() else 0


def _write_table(writer: BlockWriter, table: etree._Element) -> None:
    """One line per row. The first row is the header if none of its cells is empty and there are more rows."""
    writer.end_block()
    rows = list(_table_cells(table))
    header = rows[0] if len(rows) > 1 and all(rows[0]) and len(rows[0]) > 1 else []
    for number, cells in enumerate(rows):
        named = number > 0 and len(cells) == len(header)
        writer.add_line(table_row_text(header if named else [], cells))
    writer.end_block()


def _table_cells(table: etree._Element) -> Iterator[list[str]]:
    """The cell texts of each row; a cell merged over columns counts once, one merged over rows is in each of them."""
    above: dict[int, str] = {}
    for row in _children(table, _ROW):
        cells, column = [], 0
        for cell in _children(row, _CELL):
            merged = cell.find("./{*}tcPr/{*}vMerge")
            is_continued = merged is not None and _get(merged, "val") != "restart"
            text = above.get(column, "") if is_continued else "\n".join(_texts(cell))
            above[column] = text
            cells.append(text)
            span = _get(cell.find("./{*}tcPr/{*}gridSpan"), "val") or ""
            column += int(span) if span.isdecimal() else 1
        if row.find("./{*}trPr/{*}del") is None:
            yield cells


def _children(parent: etree._Element, *names: str) -> Iterator[etree._Element]:
    """Child elements with these names, looking through wrapper elements."""
    for child in parent:
        if _name(child) in names:
            yield child
        elif _name(child) in _UNWRAPPED:
            yield from _children(child, *names)


def _texts(parent: etree._Element) -> Iterator[str]:
    return (_text(paragraph) for paragraph in parent.iter(f"{{*}}{_PARAGRAPH}"))


def _text(paragraph: etree._Element) -> str:
    """The text of a paragraph, without its text boxes."""
    pieces: list[str] = []
    walker = etree.iterwalk(paragraph, events=("start",))
    for _, element in walker:
        name = _name(element)
        if name in _SKIPPED:
            walker.skip_subtree()
        elif name == "t":
            pieces.append(element.text or "")
        elif name != "br" or _get(element, "type") in (None, "textWrapping"):  # others end a page or a column
            pieces.append(_BLANK.get(name, ""))
    return "".join(pieces)


def _name(element: etree._Element) -> str:
    """The local name; namespaces differ between transitional and strict files."""
    return etree.QName(element).localname if isinstance(element.tag, str) else ""


def _get(element: etree._Element | None, name: str) -> str | None:
    """The attribute with this local name."""
    attributes = {} if element is None else element.attrib
    return next((value for key, value in attributes.items() if etree.QName(key).localname == name), None)

"""DOCX: headings, paragraphs, lists and tables in order. Word stores no page breaks, so there are no pages."""

import zipfile
from collections.abc import Iterator

import docx
from docx.document import Document as DocxDocument
from docx.opc.exceptions import PackageNotFoundError
from docx.table import Table
from docx.text.paragraph import Paragraph

from ingest.parse import ParseError, Source
from ingest.parse.archive import check_archive, open_source
from ingest.parse.blocks import BlockWriter, table_row_text
from retrieval.parsed import ParsedDocument

MEDIA_TYPE = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"


def parse_docx(source: Source) -> ParsedDocument:
    """Read the body; headers, footers, notes and comments are left out. Raises ParseError broken_docx, zip_bomb."""
    try:
        check_archive(source)
        document = docx.Document(open_source(source))
        return _read(document)
    except (ParseError, MemoryError):
        raise
    except (zipfile.BadZipFile, PackageNotFoundError) as error:
        raise _broken("it is no complete zip archive") from error
    except Exception as error:  # python-docx passes on whatever zlib, lxml or its own code stumble over
        raise _broken(f"{type(error).__name__}: {str(error)[:200]}") from error


def _read(document: DocxDocument) -> ParsedDocument:
    writer, levels = BlockWriter(), _heading_levels(document)
    in_list = False
    for item in document.iter_inner_content():
        if isinstance(item, Table):
            _write_table(writer, item)
            continue
        style = _style_id(item)
        is_item = _is_list_item(item)
        if is_item and in_list:
            writer.end_line()
        else:
            writer.end_block()
        writer.add(("- " if is_item else "") + item.text, keep_space=True)
        if style in levels:
            writer.end_heading(levels[style])
        elif not is_item:
            writer.end_block()
        in_list = is_item
    return writer.finish(MEDIA_TYPE, title=(document.core_properties.title or "").strip() or None)


def _style_id(paragraph: Paragraph) -> str | None:
    properties = paragraph._p.pPr
    return properties.pStyle.val if properties is not None and properties.pStyle is not None else None


def _is_list_item(paragraph: Paragraph) -> bool:
    properties = paragraph._p.pPr
    if properties is not None and properties.numPr is not None:
        return True
    return (_style_id(paragraph) or "").startswith("List")


def _heading_levels(document: DocxDocument) -> dict[str, int]:
    """Style id -> level: 1 for the title, N + 1 for the style named "heading N" in whatever language its id is."""
    levels = {}
    for style in document.styles:
        name = (style.name or "").lower()
        if name == "title":
            levels[style.style_id] = 1
        elif name.startswith("heading ") and name[8:].isdigit():
            levels[style.style_id] = min(9, int(name[8:])) + 1
    return levels


def _write_table(writer: BlockWriter, table: Table) -> None:
    """A line a row. The first row names the columns when none of its cells is empty and there are more rows."""
    writer.end_block()
    rows = list(_table_cells(table))
    header = rows[0] if len(rows) > 1 and all(rows[0]) and len(rows[0]) > 1 else []
    for number, cells in enumerate(rows):
        named = number > 0 and len(cells) == len(header)
        writer.add_line(table_row_text(header if named else [], cells))
    writer.end_block()


def _table_cells(table: Table) -> Iterator[list[str]]:
    """The texts of each row's cells; a cell merged over columns counts once."""
    for row in table.rows:
        seen, cells = None, []
        for cell in row.cells:
            if cell._tc is not seen:
                cells.append(cell.text)
            seen = cell._tc
        yield cells


def _broken(reason: str) -> ParseError:
    return ParseError(
        "broken_docx",
        f"the file is damaged or no Word document ({reason}); open it in a word processor and save it again as DOCX",
    )

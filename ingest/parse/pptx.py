"""PPTX: each slide is a page, with its title as heading, then its texts, tables and speaker notes in order.

Reads the parts of the zip directly (ECMA-376, PresentationML). Charts, diagrams and pictures are left out.
"""

from collections.abc import Iterator

from lxml import etree

from ingest.parse import ParseError, Report, Source
from ingest.parse.archive import Package, open_package
from ingest.parse.blocks import BlockWriter
from ingest.parse.tables import write_rows
from retrieval.parsed import ParsedDocument

MEDIA_TYPE = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
_PRESENTATION = "ppt/presentation.xml"
_TITLES = frozenset({"title", "ctrTitle"})
_FURNITURE = frozenset({"sldNum", "dt", "ftr", "hdr", "sldImg"})


def parse_pptx(source: Source, *, max_pages: int, report: Report) -> ParsedDocument:
    """Read all slides, including hidden ones. Raises ParseError broken_pptx, zip_bomb, too_many_pages."""
    with open_package(source, "pptx", "PowerPoint presentation") as package:
        slides = _slides(package)
        if len(slides) > max_pages:
            raise ParseError(
                "too_many_pages", f"{len(slides)} slides are over the limit of {max_pages}; split the presentation"
            )
        writer = BlockWriter()
        for number, slide in enumerate(slides, 1):
            _write_slide(writer, package.xml(slide))
            _write_notes(writer, package, slide)
            writer.end_page()
            report(number, len(slides))
        return writer.finish(MEDIA_TYPE)


def _slides(package: Package) -> list[str]:
    """Members in the order of the presentation, without duplicates."""
    relations = package.relations(_PRESENTATION)
    slides: dict[str, None] = {}
    for item in _all(package.xml(_PRESENTATION), "sldId"):
        relation = next((value for key, value in item.attrib.items() if key.endswith("}id")), "")
        kind, member = relations.get(relation, ("", ""))
        if kind == "slide":
            slides[member] = None
    return list(slides)


def _all(root: etree._Element, *names: str) -> list[etree._Element]:
    """Elements with these local names, in order; namespaces differ between transitional and strict files."""
    return list(root.iter(*(f"{{*}}{name}" for name in names)))


def _write_slide(writer: BlockWriter, slide: etree._Element) -> None:
    for double in _all(slide, "Fallback"):  # duplicates of shapes, for older programs
        double.getparent().remove(double)
    shapes = _all(slide, "sp", "graphicFrame")
    title = next((shape for shape in shapes if _placeholder(shape) in _TITLES and _paragraphs(shape)), None)
    if title is not None:
        writer.add(" ".join(text for _, text in _paragraphs(title)))
        writer.end_heading(1)
    for shape in shapes:
        if shape is title or _placeholder(shape) in _FURNITURE:
            continue
        writer.end_block()
        for table in _all(shape, "tbl"):
            write_rows(writer, _rows(table))
        if etree.QName(shape).localname == "sp":
            for level, text in _paragraphs(shape):
                writer.add_line("  " * level + ("- " if level else "") + text)


def _write_notes(writer: BlockWriter, package: Package, slide: str) -> None:
    member = next((member for kind, member in package.relations(slide).values() if kind == "notesSlide"), None)
    if member is None or member not in package:
        return
    writer.end_block()
    lead = "Notes: "
    for shape in _all(package.xml(member), "sp"):
        if _placeholder(shape) == "body":
            for _, text in _paragraphs(shape):
                writer.add_line(lead + text)
                lead = ""


def _placeholder(shape: etree._Element) -> str | None:
    """The placeholder type of a shape, by default "body"; None if it is not a placeholder."""
    found = shape.find("./{*}nvSpPr/{*}nvPr/{*}ph")
    return None if found is None else found.get("type", "body")


def _paragraphs(shape: etree._Element) -> list[tuple[int, str]]:
    """(list level, text) of the paragraphs that have text."""
    found = []
    for paragraph in _all(shape, "p"):
        text = _text(paragraph)
        properties = paragraph.find("./{*}pPr")
        level = properties.get("lvl", "0") if properties is not None else "0"
        if text:
            found.append((int(level) if level in "12345678" else 0, text))
    return found


def _rows(table: etree._Element) -> Iterator[dict[int, str]]:
    """Rows as column -> text; a cell merged over rows is in each of them."""
    above: dict[int, str] = {}
    for row in _all(table, "tr"):
        texts = {
            column: above.get(column, "")
            if cell.get("vMerge") in {"1", "true"}
            else " ".join(text for _, text in _paragraphs(cell))
            for column, cell in enumerate(_all(row, "tc"))
        }
        above = texts
        yield {column: text for column, text in texts.items() if text}


def _text(paragraph: etree._Element) -> str:
    pieces = (" " if etree.QName(item).localname == "br" else item.text or "" for item in _all(paragraph, "t", "br"))
    return " ".join("".join(pieces).split())

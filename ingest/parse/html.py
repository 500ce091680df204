"""HTML: the main text with headings, lists and tables, without scripts, styles, navigation and hidden parts.

Iterative, on the events of a tree walk. libxml2 stops at 2,048 nested elements; if that happens, the rest of the page
is reported as unread.
"""

import re
from collections.abc import Iterator

import lxml.html
from lxml import etree

from ingest.parse import ParseError
from ingest.parse.blocks import BlockWriter, table_row_text
from ingest.parse.text import read_text
from retrieval.parsed import ParsedDocument

_META_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w.:-]{2,40})", re.I)
_XML_DECLARATION = re.compile(r"\s*<\?xml[^>]*\?>")
_DROPPED = frozenset(
    {"head", "script", "style", "noscript", "template", "nav", "aside", "form", "button", "select", "textarea", "svg"}
    | {"math", "canvas", "video", "audio", "iframe", "object", "embed", "rt", "rp"}  # rt, rp: pronunciation
)
_TOO_DEEP = "the page nests more than 2,048 elements within each other"
_OUTSIDE_MAIN = frozenset({"header", "footer"})
_DROPPED_ROLES = frozenset({"navigation", "banner", "contentinfo", "search", "complementary"})
_DROPPED_CLASSES = frozenset(  # navigation and permalinks of DocBook, Sphinx, Bootstrap and MediaWiki
    {"navheader", "navfooter", "sphinxsidebar", "navbar", "breadcrumb", "breadcrumbs", "headerlink", "mw-editsection"}
)
_CONTENTS = frozenset({"toc", "contents", "table-of-contents"})
_BLOCKS = frozenset(
    {"html", "body", "main", "article", "section", "header", "footer", "div", "center", "fieldset", "address"}
    | {"p", "blockquote", "pre", "hr", "figure", "figcaption", "details", "summary", "dl", "caption"}
)
_TABLE_PARTS = frozenset({"table", "thead", "tbody", "tfoot", "tr", "td", "th"})
_HEADINGS = {f"h{level}": level for level in range(1, 7)}


def parse_html(data: bytes) -> ParsedDocument:
    """Read the main text. The title is <title>, else the first heading. Raises ParseError."""
    declared = _META_CHARSET.search(data[:2048])
    markup = _XML_DECLARATION.sub("", read_text(data, declared[1].decode("ascii") if declared else None), count=1)
    if not markup.strip():
        raise ParseError("empty_document", "the page holds no text; check that the right file was sent")
    parser = lxml.html.HTMLParser(remove_comments=True, remove_pis=True, huge_tree=True)
    try:
        tree = lxml.html.document_fromstring(markup, parser=parser)
    except etree.ParserError as error:
        raise ParseError("broken_html", f"the page cannot be read as HTML: {error}") from error
    title = " ".join((tree.findtext(".//title") or "").split())
    root = _main_part(tree)
    writer = BlockWriter()
    _write_text(root, writer, drop_outside=root.tag == "body")
    parsed = writer.finish("text/html", title=title or None)
    if parser.error_log.filter_types([etree.ErrorTypes.ERR_RESOURCE_LIMIT]):
        if not parsed.text.strip():
            raise ParseError("nested_too_deeply", f"{_TOO_DEEP}; save it as plain text or PDF and send that")
        return parsed._replace(unread=f"{_TOO_DEEP}: what follows there is not read")
    return parsed


def _main_part(tree: lxml.html.HtmlElement) -> lxml.html.HtmlElement:
    """<main>, or the only <article>, if it has text; else the body."""
    candidates = tree.xpath("//main | //*[@role='main']") or tree.xpath("//article")
    if len(candidates) == 1 and candidates[0].text_content().strip():
        return candidates[0]
    return tree.body if tree.body is not None else tree


def _is_dropped(element: lxml.html.HtmlElement, drop_outside: bool) -> bool:
    return (
        element.tag in _DROPPED
        or (drop_outside and element.tag in _OUTSIDE_MAIN and element.getparent().tag == "body")
        or element.get("hidden") is not None
        or element.get("aria-hidden") == "true"
        or element.get("role") in _DROPPED_ROLES
        or not _DROPPED_CLASSES.isdisjoint(element.get("class", "").split())
        or _repeats_headings(element)
    )


def _repeats_headings(element: lxml.html.HtmlElement) -> bool:
    """Whether it is a table of contents with links only within this page, which repeats its headings."""
    if _CONTENTS.isdisjoint(f"{element.get('class', '')} {element.get('id', '')}".lower().split()):
        return False
    links = [link for link in element.iter("a") if link.get("href")]
    linked = sum(len(link.text_content()) for link in links)
    is_list = 2 * linked > len(" ".join(element.text_content().split()))
    return is_list and all(link.get("href").startswith("#") for link in links)


def _events(root: lxml.html.HtmlElement, drop_outside: bool) -> Iterator[tuple[str, lxml.html.HtmlElement]]:
    """("start" | "end" | "tail", element) in document order, without dropped elements but with their tail text."""
    walker = etree.iterwalk(root, events=("start", "end"))
    for event, element in walker:
        if not isinstance(element.tag, str):
            continue
        dropped = element is not root and _is_dropped(element, drop_outside)
        if event == "start" and dropped:
            walker.skip_subtree()
        if not dropped:
            yield event, element
        if event == "end" and element is not root:
            yield "tail", element


def _write_text(root: lxml.html.HtmlElement, writer: BlockWriter, drop_outside: bool) -> None:
    """Write the tree as blocks. A table row is one line, with each cell prefixed by the header of its column."""
    table = _TableReader(writer)
    counters: list[int | None] = []  # of the open lists; None: unnumbered
    preformatted = 0
    for event, element in _events(root, drop_outside):
        tag = element.tag
        if event == "tail":
            writer.add(element.tail or "", keep_space=preformatted > 0)
            continue
        if tag in _TABLE_PARTS or table.in_row:
            table.read(event, element)
        elif tag in {"ol", "ul"}:
            writer.end_block()
            counters = [*counters, 0 if tag == "ol" else None] if event == "start" else counters[:-1]
        elif tag == "li":
            writer.end_line()
            if event == "start" and counters and counters[-1] is not None:
                counters[-1] += 1
            number = counters[-1] if counters else None
            writer.begin_item("" if event == "end" else f"{number}. " if number else "- ")
        else:
            _write_edge(writer, event, tag)
        preformatted += (tag == "pre") * (1 if event == "start" else -1)
        if event == "start":
            writer.add(element.text or "", keep_space=preformatted > 0)


def _write_edge(writer: BlockWriter, event: str, tag: str) -> None:
    """End lines and blocks at the start or end of elements other than lists and tables."""
    if tag == "br":
        if event == "start":
            writer.end_line()
    elif tag in _HEADINGS:
        if event == "start":
            writer.end_block()
        else:
            writer.end_heading(_HEADINGS[tag])
    elif tag in {"dt", "dd"}:
        writer.end_line()
    elif tag in _BLOCKS:
        writer.end_block()


class _TableReader:
    """Collects the cells of a row and writes it as one line. A nested table becomes part of its cell; in tables with a
    header, a cell merged over rows is in each of them."""

    def __init__(self, writer: BlockWriter) -> None:
        self._writer = writer
        self._header: list[str] = []
        self._cells: list[tuple[lxml.html.HtmlElement, str]] = []
        self._above: dict[int, tuple[str, int, int]] = {}  # column -> (cell, rows it still spans, columns)
        self._row: lxml.html.HtmlElement | None = None
        self._cell: lxml.html.HtmlElement | None = None

    @property
    def in_row(self) -> bool:
        return self._row is not None

    def read(self, event: str, element: lxml.html.HtmlElement) -> None:
        if self._row is None:
            if element.tag == "table":
                self._writer.end_block()
                self._header = []
            elif element.tag == "tr" and event == "start":
                self._writer.end_line()
                self._row, self._cells = element, []
            if element.tag != "tr":
                self._above = {}
        elif element is self._row:
            self._end_row()
        elif element is self._cell:
            self._cells.append((element, self._writer.take()))
            self._cell = None
        elif self._cell is None and element.tag in {"td", "th"}:
            self._writer.take()  # white space between cells
            self._cell = element
        elif element.tag in _BLOCKS or element.tag in _TABLE_PARTS or element.tag in {"br", "li"}:
            self._writer.add(" ")

    def _end_row(self) -> None:
        self._writer.take()
        cells, is_header = self._merge(), _is_header_row(self._row)
        is_named = not is_header and len(self._header) == len(cells)
        self._writer.add_line(table_row_text(self._header if is_named else [], cells))
        if is_header and len(cells) >= len(self._header):
            self._header = cells
        if not self._header:  # a layout table
            self._above = {}
        self._row = self._cell = None

    def _merge(self) -> list[str]:
        """The cells of the row, including those that span from rows above, each once regardless of its columns."""
        own, texts, column, above = iter(self._cells), [], 0, {}
        while column in self._above or (cell := next(own, None)) is not None:
            if column in self._above:
                text, rows, columns = self._above[column]
            else:
                text, rows, columns = cell[1], _span(cell[0], "rowspan"), _span(cell[0], "colspan")
            texts.append(text)
            if rows > 1:
                above[column] = text, rows - 1, columns
            column += columns
        self._above = above
        return texts


def _span(cell: lxml.html.HtmlElement, name: str) -> int:
    value = cell.get(name, "1").strip()
    return max(1, int(value)) if value.isascii() and value.isdecimal() and len(value) < 5 else 1


def _is_header_row(row: lxml.html.HtmlElement) -> bool:
    return all(cell.tag == "th" for cell in row) or row.getparent().tag == "thead"

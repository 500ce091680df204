"""Bytes -> ParsedDocument, one module per format. Services call `parse_in_child` (cage.py), which applies limits.

Each parser imports its library in its own module, so that a child process loads only the one it needs.
"""

from collections.abc import Callable
from pathlib import Path

from retrieval.parsed import ParsedDocument

Report = Callable[[int, int], None]  # (pages done, total pages)
MAX_OUTPUT_BYTES = 256 * 1024**2  # text of one document, including the records of pages and headings
Source = Path | bytes  # input of a parser; most read files incrementally


class ParseError(ValueError):
    """This document cannot be read. `code` is for programs, the message says what to do, `page` counts from 1.

    `retryable`: the same bytes may succeed later (a limit hit on a busy machine), as opposed to never.
    """

    def __init__(self, code: str, message: str, *, page: int | None = None, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.page = page
        self.retryable = retryable


def output_too_large(max_bytes: int = MAX_OUTPUT_BYTES) -> ParseError:
    return ParseError(
        "output_too_large", f"the document holds more than {max_bytes} bytes of text; split it into parts"
    )


def parse_file(path: Path, media_type: str, *, max_pages: int = 20_000, report: Report | None = None) -> ParsedDocument:
    """Parse one file in this process, without limits on time and memory. Raises ParseError.

    The text is normalized (decode.normalize_text) and is what gets stored; every offset refers to it.
    """
    return _parse(path, media_type, max_pages, report or (lambda done, total: None), depth=0)


def parse_bytes(data: bytes, media_type: str, *, max_pages: int = 20_000, depth: int = 0) -> ParsedDocument:
    """`parse_file` for data in memory; `depth`: number of enclosing archives and messages."""
    return _parse(data, media_type, max_pages, lambda done, total: None, depth)


def _parse(source: Source, media_type: str, max_pages: int, report: Report, depth: int) -> ParsedDocument:
    parsed = _parse_package(source, media_type, max_pages, report)
    if parsed is None:
        data = source if isinstance(source, bytes) else source.read_bytes()
        parsed = _parse_many(data, media_type, max_pages, depth) or _parse_text(data, media_type)
    if not parsed.text.strip():
        raise ParseError("empty_document", "the document holds no text; check that the right file was sent")
    return parsed


def _parse_many(data: bytes, media_type: str, max_pages: int, depth: int) -> ParsedDocument | None:
    """Parse formats that contain other documents; None for others."""
    match media_type:
        case "message/rfc822":
            from ingest.parse.mail import parse_mail

            return parse_mail(data, max_pages, depth)
        case "application/mbox":
            from ingest.parse.mail import parse_mailbox

            return parse_mailbox(data, max_pages, depth)
        case "application/zip" | "application/x-tar" | "application/gzip" | "application/x-bzip2" | "application/x-xz":
            from ingest.parse.members import parse_archive

            return parse_archive(data, media_type, max_pages, depth)
    return None


def _parse_package(source: Source, media_type: str, max_pages: int, report: Report) -> ParsedDocument | None:
    """Parse formats that are read incrementally from the file; None for others."""
    match media_type:
        case "application/pdf":
            from ingest.parse.pdf import parse_pdf

            return parse_pdf(source, max_pages=max_pages, report=report)
        case "application/vnd.openxmlformats-officedocument.wordprocessingml.document":
            from ingest.parse.docx import parse_docx

            return parse_docx(source)
        case "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet":
            from ingest.parse.xlsx import parse_xlsx

            return parse_xlsx(source)
        case "application/vnd.openxmlformats-officedocument.presentationml.presentation":
            from ingest.parse.pptx import parse_pptx

            return parse_pptx(source, max_pages=max_pages, report=report)
        case "application/epub+zip":
            from ingest.parse.epub import parse_epub

            return parse_epub(source, report=report)
        case "application/vnd.oasis.opendocument.text":
            from ingest.parse.odt import parse_odt

            return parse_odt(source)
    return None


def _parse_text(data: bytes, media_type: str) -> ParsedDocument:
    """Parse text formats; unknown ones as plain text."""
    match media_type:
        case "text/html":
            from ingest.parse.html import parse_html

            return parse_html(data)
        case "text/markdown":
            from ingest.parse.markdown import parse_markdown

            return parse_markdown(data)
        case "application/json":
            from ingest.parse.json_values import parse_json

            return parse_json(data)
        case "application/x-ipynb+json":
            from ingest.parse.notebook import parse_notebook

            return parse_notebook(data)
        case "text/troff":
            from ingest.parse.roff import parse_man_page

            return parse_man_page(data)
        case "text/csv" | "text/tab-separated-values":
            from ingest.parse.delimited import parse_delimited

            return parse_delimited(data, media_type)
        case "text/x-rst":
            from ingest.parse.rst import parse_rst

            return parse_rst(data)
        case "text/x-source":
            from ingest.parse.source import parse_source

            return parse_source(data)
        case "application/rtf":
            from ingest.parse.rtf import parse_rtf

            return parse_rtf(data)
    from ingest.parse.text import parse_text

    return parse_text(data, media_type)

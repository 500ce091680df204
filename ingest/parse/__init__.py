"""Bytes -> ParsedDocument, a file a format. `parse_in_child` (child.py) is how a service calls it: with limits.

A parser imports its library inside its own module, so that a child process loads only the one it needs.
"""

from collections.abc import Callable
from pathlib import Path

from retrieval.types import ParsedDocument

Report = Callable[[int, int], None]  # (pages done, pages in all)


class ParseError(ValueError):
    """This document cannot be read. `code` is for programs, the message says what to do, `page` counts from 1.

    `retryable`: the same bytes may succeed later (a limit hit on a busy machine), as opposed to never.
    """

    def __init__(self, code: str, message: str, *, page: int | None = None, retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.page = page
        self.retryable = retryable


def parse_file(path: Path, media_type: str, *, max_pages: int = 20_000, report: Report | None = None) -> ParsedDocument:
    """Parse one file in this process, without limits on time and memory. Raises ParseError.

    The text is normalized (decode.normalize_text) and is what gets stored; every offset refers to it.
    """
    report = report or (lambda done, total: None)
    match media_type:
        case "application/pdf":
            from ingest.parse.pdf import parse_pdf

            parsed = parse_pdf(path, max_pages=max_pages, report=report)
        case "application/vnd.openxmlformats-officedocument.wordprocessingml.document":
            from ingest.parse.docx import parse_docx

            parsed = parse_docx(path)
        case "text/html":
            from ingest.parse.html import parse_html

            parsed = parse_html(path.read_bytes())
        case "text/markdown":
            from ingest.parse.markdown import parse_markdown

            parsed = parse_markdown(path.read_bytes())
        case _:
            from ingest.parse.text import parse_text

            parsed = parse_text(path.read_bytes(), media_type)
    if not parsed.text.strip():
        raise ParseError("empty_document", "the document holds no text; check that the right file was sent")
    return parsed

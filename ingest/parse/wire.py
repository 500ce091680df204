"""A parsed document as JSON and back: what passes between the processes that parse."""

from typing import Any

from retrieval.parsed import Heading, Page, ParsedDocument


def to_json(parsed: ParsedDocument) -> dict[str, Any]:
    return parsed._asdict()  # of which pages and headings become lists


def from_json(data: dict[str, Any]) -> ParsedDocument:
    pages = tuple(Page(*page) for page in data["pages"])
    headings = tuple(Heading(*heading) for heading in data["headings"])
    return ParsedDocument(**{**data, "pages": pages, "headings": headings})

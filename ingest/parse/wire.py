"""Parsed documents to JSON and back, for passing them between processes."""

from typing import Any

from retrieval.parsed import Heading, Page, ParsedDocument


def to_json(parsed: ParsedDocument) -> dict[str, Any]:
    return parsed._asdict()  # in JSON, pages and headings become lists


def from_json(data: dict[str, Any]) -> ParsedDocument:
    pages = tuple(Page(*page) for page in data["pages"])
    headings = tuple(Heading(*heading) for heading in data["headings"])
    return ParsedDocument(**{**data, "pages": pages, "headings": headings})

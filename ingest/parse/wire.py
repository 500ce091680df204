"""A parsed document as JSON and back: what passes between the processes that parse."""

import dataclasses
from typing import Any

from retrieval.parsed import Heading, Page, ParsedDocument


def to_json(parsed: ParsedDocument) -> dict[str, Any]:
    return {
        "text": parsed.text,
        "pages": [dataclasses.astuple(page) for page in parsed.pages],
        "headings": [dataclasses.astuple(heading) for heading in parsed.headings],
        "title": parsed.title,
        "media_type": parsed.media_type,
        "unread": parsed.unread,
    }


def from_json(data: dict[str, Any]) -> ParsedDocument:
    pages = tuple(Page(*page) for page in data["pages"])
    headings = tuple(Heading(*heading) for heading in data["headings"])
    return ParsedDocument(**{**data, "pages": pages, "headings": headings})

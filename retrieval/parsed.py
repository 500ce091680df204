"""The result of parsing a document. A module of its own, because every parser process imports it.

Offsets are in characters (code points) of the text, end exclusive. Pages count from 1; formats without pages have none.
"""

from typing import NamedTuple


class Page(NamedTuple):
    page: int
    label: str | None
    char_start: int
    char_end: int


class Heading(NamedTuple):
    """`level` 1 is the outermost; its section runs from `char_start` to the next heading of the same or outer level."""

    level: int
    title: str
    char_start: int


class ParsedDocument(NamedTuple):
    """`unread`: what could not be read of the original, and why, as a message for its owner; None: nothing."""

    text: str
    pages: tuple[Page, ...] = ()
    headings: tuple[Heading, ...] = ()
    title: str | None = None
    media_type: str = "text/plain"
    unread: str | None = None

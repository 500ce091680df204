"""What reading a document gives. Apart from the other types, since each parser's process imports it anew.

Offsets are positions in the text, counted in characters (code points), end exclusive. Pages count from 1 and are empty
where the format has none.
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
    """`unread`: what of the original is not in the text and why, in words for its owner; None = nothing."""

    text: str
    pages: tuple[Page, ...] = ()
    headings: tuple[Heading, ...] = ()
    title: str | None = None
    media_type: str = "text/plain"
    unread: str | None = None

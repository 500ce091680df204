"""Locates a span of a document's text: its pages and headings."""

from bisect import bisect_right
from collections.abc import Sequence

from .types import Heading, Location, Page


def locate(pages: Sequence[Page], headings: Sequence[Heading], char_start: int, char_end: int) -> Location:
    """The location of text[char_start:char_end]; `pages` and `headings` are in text order.

    The headings are those above `char_start`. Text between two pages belongs to the earlier one.
    """
    page_start = page_end = None
    if pages:
        starts = [page.char_start for page in pages]
        last = max(char_start, char_end - 1)
        page_start = pages[max(0, bisect_right(starts, char_start) - 1)].page
        page_end = pages[max(0, bisect_right(starts, last) - 1)].page
    return Location(char_start, char_end, page_start, page_end, heading_path(headings, char_start))


def heading_path(headings: Sequence[Heading], position: int) -> tuple[str, ...]:
    """The titles of the headings above `position`, outermost first."""
    path: list[Heading] = []
    for heading in headings:
        if heading.char_start > position:
            break
        while path and path[-1].level >= heading.level:
            path.pop()
        path.append(heading)
    return tuple(heading.title for heading in path)

"""reStructuredText, kept verbatim. Section titles are lines underlined, or under- and overlined, with punctuation."""

import re

from ingest.parse.text import read_text
from retrieval.parsed import Heading, ParsedDocument

_ADORNMENT = re.compile(r"([!-/:-@\[-`{-~])\1*[ \t]*$")
_ROLE = re.compile(r":[\w:.+-]+:`([^`]*)`|[*`|]+|__?(?=\s|$)")
_TARGET = re.compile(r"\s*<[^<>]*>$")


def parse_rst(data: bytes) -> ParsedDocument:
    """Find the sections; the title is the first one. Raises ParseError undecodable_text.

    Levels are assigned to title styles in order of first occurrence.
    Source: reStructuredText Markup Specification, "Sections".
    """
    text = read_text(data)
    headings = _find_headings(text)
    title = headings[0].title if headings else None
    return ParsedDocument(text=text, headings=tuple(headings), title=title, media_type="text/x-rst")


def _find_headings(text: str) -> list[Heading]:
    lines, starts, position = text.split("\n"), [], 0
    for line in lines:
        starts.append(position)
        position += len(line) + 1
    headings: list[Heading] = []
    styles: dict[tuple[str, bool], int] = {}
    for number in range(1, len(lines)):
        title, under = lines[number - 1], lines[number]
        if not _is_underlined(title, under):
            continue
        above = lines[number - 2] if number > 1 else ""
        overlined = bool(above) and above.rstrip() == under.rstrip()
        if not overlined and (above.strip() or title[0].isspace()):
            continue  # the last line of a paragraph, or of a table
        level = styles.setdefault((under[0], overlined), len(styles) + 1)
        if plain := _plain(title):
            headings.append(Heading(level, plain, starts[number - 2 if overlined else number - 1]))
    return headings


def _is_underlined(title: str, under: str) -> bool:
    bare = under.rstrip()
    return (
        bool(title.strip())
        and _ADORNMENT.match(under) is not None
        and _ADORNMENT.match(title) is None
        and len(bare) >= min(4, len(title.rstrip()))
        and len(bare) >= len(title.strip()) - 2
    )


def _plain(title: str) -> str:
    unmarked = _ROLE.sub(lambda match: _TARGET.sub("", match[1]) if match[1] else "", title)
    return " ".join(unmarked.split())

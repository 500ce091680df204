"""Markdown, kept verbatim: quotes are what the author typed. Headings are found outside of code fences."""

import re

from ingest.parse.text import read_text
from retrieval.parsed import Heading, ParsedDocument

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_SETEXT = re.compile(r" {0,3}(=+|-{2,})[ \t]*$")
_NOT_A_PARAGRAPH = re.compile(r" {0,3}(?:[-*+>|#]|\d+[.)]|`{3}|~{3})| {4}|\t")
_INLINE = re.compile(r"\[([^\]]*)\]\([^)]*\)|[*`]+")
_FRONT_MATTER = re.compile(r"---\n.*?\n---\n", re.S)


def parse_markdown(data: bytes) -> ParsedDocument:
    """Find ATX and setext headings; the title is the first one. Raises ParseError undecodable_text."""
    text = read_text(data)
    headings = tuple(find_headings(text))
    return ParsedDocument(
        text=text, headings=headings, title=headings[0].title if headings else None, media_type="text/markdown"
    )


def find_headings(text: str) -> list[Heading]:
    """Headings of normalized text, in order."""
    headings: list[Heading] = []
    front_matter = _FRONT_MATTER.match(text)
    start, fence = (front_matter.end() if front_matter else 0), ""
    previous, previous_start = "", start  # the line above, if it can be the text of a setext heading
    for line in text[start:].splitlines(keepends=True):
        bare = line.rstrip("\n")
        if fence:
            closing = _FENCE.match(bare)
            if closing and closing[1].startswith(fence) and bare.strip() == closing[1]:
                fence = ""
        elif opening := _FENCE.match(bare):
            fence = opening[1]
        elif atx := _ATX.match(bare):
            headings.append(Heading(len(atx[1]), _plain(atx[2] or ""), start))
        elif previous and (underline := _SETEXT.match(bare)):
            headings.append(Heading(1 if underline[1][0] == "=" else 2, _plain(previous), previous_start))
        usable = not fence and bare.strip() and not _NOT_A_PARAGRAPH.match(bare) and not _SETEXT.match(bare)
        previous, previous_start = (bare, start) if usable else ("", start)
        start += len(line)
    return [heading for heading in headings if heading.title]


def _plain(title: str) -> str:
    return " ".join(_INLINE.sub(lambda match: match[1] or "", title).split())

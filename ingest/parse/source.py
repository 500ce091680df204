"""Source code in any language, verbatim; classes, functions and types become sections.

A heuristic, not a parser: a line that looks like a definition is treated as one.
"""

import re

from ingest.parse.text import read_text
from retrieval.parsed import Heading, ParsedDocument

_MODIFIERS = (
    r"(?:(?:export|default|pub(?:\([^)]*\))?|public|private|protected|internal|static|final|abstract|async|unsafe|"
    r"override|open|sealed|data|partial|virtual|inline|extern|const|local)\s+)*"
)
_NAMED = re.compile(
    rf"(?P<indent>[ \t]*){_MODIFIERS}(?:class|def|func|fn|fun|function|interface|trait|struct|enum|impl|module|"
    r"namespace|protocol|object|record|sub)\b\*?\s+(?:\([^)]*\)\s*)?(?P<name>[A-Za-z_$][\w$.:!?]*)"
)
_C_FUNCTION = re.compile(
    r"(?!(?:if|for|while|switch|return|else|do|case|typedef)\b)[A-Za-z_][\w:<>,*&\s\[\]]*?[\s*&]"
    r"(?P<name>~?[A-Za-z_][\w:~]*)\s*\([^;{}]*(?:\)[^;]*)?\{?\s*$"
)
_SHELL_FUNCTION = re.compile(r"(?P<name>[A-Za-z_][\w-]*)\s*\(\)\s*\{?\s*$")
_SQL_OBJECT = re.compile(
    r"CREATE\s+(?:OR\s+REPLACE\s+)?(?:TEMP(?:ORARY)?\s+)?(?:UNIQUE\s+)?(?:TABLE|VIEW|INDEX|FUNCTION|PROCEDURE|TRIGGER)\s+"
    r"(?:IF\s+NOT\s+EXISTS\s+)?(?P<name>[\w.\"`\[\]]+)",
    re.I,
)
_TABLE = re.compile(r"\[\[?(?P<name>[\w.\"' -]+)\]\]?\s*(?:#.*)?$")
_MAX_LINE = 300
_TAB = 4


def parse_source(data: bytes) -> ParsedDocument:
    """Find definitions; deeper indentation means a nested section. Raises ParseError undecodable_text."""
    text = read_text(data)
    return ParsedDocument(text=text, headings=tuple(_find_definitions(text)), media_type="text/x-source")


def _find_definitions(text: str) -> list[Heading]:
    headings: list[Heading] = []
    outer: list[int] = []  # indents of the enclosing definitions
    start = 0
    for line in text.split("\n"):
        if len(line) <= _MAX_LINE and (found := _match(line)):
            name, indent = found
            while outer and outer[-1] >= indent:
                outer.pop()
            outer.append(indent)
            headings.append(Heading(len(outer), name, start))
        start += len(line) + 1
    return headings


def _match(line: str) -> tuple[str, int] | None:
    """Name and indent of the definition that begins in this line."""
    if named := _NAMED.match(line):
        return named["name"], len(named["indent"].expandtabs(_TAB))
    for pattern in (_SHELL_FUNCTION, _SQL_OBJECT, _TABLE, _C_FUNCTION):
        if found := pattern.match(line):
            return found["name"].strip("\"'`[] "), 0
    return None

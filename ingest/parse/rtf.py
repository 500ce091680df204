"""RTF: headings, paragraphs and table rows in order, without pictures, headers, footnotes and field instructions.

Interprets the control words that affect text (Rich Text Format Specification 1.9.1) and skips all others.
"""

import codecs
import re
from dataclasses import dataclass, replace

from ingest.parse import ParseError
from ingest.parse.blocks import BlockWriter
from ingest.parse.tables import Row, write_rows
from retrieval.parsed import ParsedDocument

MEDIA_TYPE = "application/rtf"
_TOKEN = re.compile(rb"\\([a-zA-Z]{1,32})(-?\d{1,10})? ?|\\'([0-9a-fA-F]{2})|\\(.)|([{}])|[\r\n]+|([^\\{}\r\n]+)", re.S)
_SKIPPED = frozenset(
    {b"fonttbl", b"colortbl", b"stylesheet", b"info", b"pict", b"object", b"header", b"headerl", b"headerr", b"headerf"}
    | {b"footer", b"footerl", b"footerr", b"footerf", b"footnote", b"annotation", b"fldinst", b"bkmkstart", b"bkmkend"}
    | {b"listtext", b"pntext", b"themedata", b"datastore", b"xe", b"tc", b"nonshppict"}
)
_CHARS = {
    **{b"tab": "\t", b"line": "\n", b"emdash": "—", b"endash": "–", b"lquote": "‘", b"rquote": "’", b"bullet": "•"},
    **{b"ldblquote": "“", b"rdblquote": "”", b"emspace": " ", b"enspace": " "},
}
_SYMBOLS = {b"~": "\xa0", b"_": "-", b"\\": "\\", b"{": "{", b"}": "}"}
_MAX_DEPTH = 10_000


@dataclass(frozen=True, slots=True)
class _Group:
    """State that ends with the group's closing brace."""

    skipped: bool = False
    hidden: bool = False
    fallback_bytes: int = 1  # to skip after each \\u


def parse_rtf(data: bytes) -> ParsedDocument:
    """Read the body. Raises ParseError broken_rtf."""
    if not data.startswith(b"{\\rtf"):
        raise ParseError("broken_rtf", "the file is no RTF document; open it in a word processor and save it as DOCX")
    reader = _Reader()
    for match in _TOKEN.finditer(data):
        reader.read(match)
    reader.end_paragraph()
    return reader.writer.finish(MEDIA_TYPE)


class _Reader:
    def __init__(self) -> None:
        self.writer = BlockWriter()
        self._group = _Group()
        self._outer: list[_Group] = []
        self._encoding = "cp1252"
        self._bytes = bytearray()  # pending bytes in the code page, possibly an incomplete character
        self._units: list[int] = []  # pending UTF-16 units, possibly half of a surrogate pair
        self._to_skip = 0
        self._level: int | None = None  # outline level of the paragraph
        self._cells: list[str] = []
        self._rows: list[Row] = []  # of the current table

    def read(self, match: re.Match[bytes]) -> None:
        word, number, byte, symbol, brace, text = match.groups()
        if brace:
            self._read_brace(brace)
        elif word:
            self._read_word(word, int(number) if number else None)
        elif byte:
            self._add_bytes(bytes([int(byte, 16)]))
        elif symbol == b"*":
            self._group = replace(self._group, skipped=True)
        elif symbol in (b"\n", b"\r"):
            self.end_paragraph()
        elif symbol:
            self._add(_SYMBOLS.get(symbol, ""))
        elif text:
            self._add_bytes(text)

    def _read_brace(self, brace: bytes) -> None:
        self._to_skip = 0
        if brace == b"}":
            self._group = self._outer.pop() if self._outer else self._group
            return
        if len(self._outer) >= _MAX_DEPTH:
            raise ParseError("broken_rtf", f"groups are nested over {_MAX_DEPTH} deep; save the document as DOCX")
        self._outer.append(self._group)

    def _read_word(self, word: bytes, number: int | None) -> None:
        if word in _SKIPPED:
            self._group = replace(self._group, skipped=True)
        elif word == b"ansicpg" and number:
            self._encoding = _known_encoding(f"cp{number}")
        elif word == b"uc":
            self._group = replace(self._group, fallback_bytes=max(0, number or 0))
        elif word == b"v":
            self._group = replace(self._group, hidden=number != 0)
        elif word == b"u" and number is not None:
            self._add_unit(number % 65_536)
        elif word in _CHARS:
            self._add(_CHARS[word])
        elif not self._group.skipped:
            self._read_structure(word, number)

    def _read_structure(self, word: bytes, number: int | None) -> None:
        match word:
            case b"par" | b"sect" | b"page":
                self.end_paragraph()
            case b"pard":
                self._level = None
            case b"outlinelevel":
                self._level = number if number is not None and 0 <= number < 9 else None
            case b"cell":
                self._flush()
                self._cells.append(" ".join(self.writer.take().split()))
            case b"row":
                self._flush()
                self.writer.take()
                self._rows.append({column: cell for column, cell in enumerate(self._cells) if cell})
                self._cells = []

    def end_paragraph(self) -> None:
        self._flush()
        if self._rows and not self._cells:
            text = self.writer.take()
            write_rows(self.writer, self._rows)
            self._rows = []
            self.writer.add(text, keep_space=True)
        if self._level is not None:
            self.writer.end_heading(self._level + 1)
        elif self._cells:
            self.writer.add(" ")  # a second paragraph within the cell
        else:
            self.writer.end_block()

    def _is_shown(self) -> bool:
        return not (self._group.skipped or self._group.hidden)

    def _add(self, text: str) -> None:
        self._flush()
        self._to_skip = 0
        if self._is_shown():
            self.writer.add(text, keep_space=True)

    def _add_bytes(self, data: bytes) -> None:
        skipped = min(self._to_skip, len(data))
        self._to_skip -= skipped
        data = data[skipped:]
        if data and self._is_shown():
            self._flush_units()
            self._bytes += data

    def _add_unit(self, unit: int) -> None:
        self._flush_bytes()
        if self._is_shown():
            self._units.append(unit)
        self._to_skip = self._group.fallback_bytes

    def _flush(self) -> None:
        self._flush_units()
        self._flush_bytes()

    def _flush_units(self) -> None:
        packed = b"".join(unit.to_bytes(2, "little") for unit in self._units)
        self._units.clear()
        self.writer.add(packed.decode("utf-16-le", "replace"), keep_space=True)

    def _flush_bytes(self) -> None:
        self.writer.add(self._bytes.decode(self._encoding, "replace"), keep_space=True)
        self._bytes.clear()


def _known_encoding(name: str) -> str:
    try:
        return codecs.lookup({"cp65001": "utf-8", "cp10000": "mac_roman"}.get(name, name)).name
    except LookupError:
        return "cp1252"

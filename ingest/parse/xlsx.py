"""XLSX: each sheet is a section, each row a line with column names, cells as displayed (dates, percentages).

Reads the parts of the zip directly (ECMA-376, SpreadsheetML), streaming the rows. Formulas have their stored values; a
cell merged over rows is in each of them. Charts, comments and pictures are left out.
"""

import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import islice

from lxml import etree

from ingest.parse import ParseError, Source
from ingest.parse.archive import Package, open_package
from ingest.parse.blocks import BlockWriter
from ingest.parse.tables import Row, write_rows
from retrieval.parsed import ParsedDocument

MEDIA_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
_WORKBOOK = "xl/workbook.xml"
_MAX_CELLS = 5_000_000
_MAX_CELL_CHARS = 32_767  # Excel's own limit; a shared string may be used by every cell
_MAX_COLUMN = 16_384
_MAX_MERGED = 100_000
_DATE_FORMATS = {*range(14, 18), 22, *range(27, 37), *range(50, 59)}
_TIME_FORMATS = {18, 19, 20, 21, 45, 46, 47}
_PERCENT_FORMATS = {9, 10}
_NOT_PLACEHOLDERS = re.compile(r'"[^"]*"|\\.|_.|\*.|\[[^\]]*\]')
_MERGED = re.compile(rb"<(?:\w+:)?mergeCell\s[^>]{0,200}?ref=[\"']([A-Z]{1,3})(\d{1,7}):[A-Z]{1,3}(\d{1,7})[\"']")
_REFERENCE = re.compile(r"([A-Za-z]{1,3})\d*$")


def parse_xlsx(source: Source) -> ParsedDocument:
    """Read all sheets, including hidden ones. Raises ParseError broken_xlsx, zip_bomb, too_many_cells."""
    with open_package(source, "xlsx", "Excel workbook") as package:
        return _Workbook(package).read()


class _Workbook:
    def __init__(self, package: Package) -> None:
        self._package = package
        self._book = package.xml(_WORKBOOK)
        main = etree.QName(self._book).namespace  # differs between transitional and strict files
        self._main = f"{{{main}}}"
        self._relations = package.relations(_WORKBOOK)
        properties = self._book.find(f"{self._main}workbookPr")
        starts_1904 = properties is not None and properties.get("date1904") in {"1", "true"}
        self._epoch = datetime(1904, 1, 1) if starts_1904 else datetime(1899, 12, 30)
        self._strings = list(self._read_strings())
        self._formats = self._read_formats()
        self._cells = 0

    def read(self) -> ParsedDocument:
        writer, seen = BlockWriter(), set()
        for sheet in self._book.iter(f"{self._main}sheet"):
            relation = next((value for key, value in sheet.attrib.items() if key.endswith("}id")), "")
            kind, member = self._relations.get(relation, ("", ""))
            if kind != "worksheet" or member in seen:
                continue
            seen.add(member)
            writer.add(sheet.get("name", ""))
            writer.end_heading(1)
            write_rows(writer, self._read_rows(member))
        return writer.finish(MEDIA_TYPE, title=self._title())

    def _title(self) -> str | None:
        if "docProps/core.xml" not in self._package:
            return None
        title = self._package.xml("docProps/core.xml").findtext("{http://purl.org/dc/elements/1.1/}title")
        return (title or "").strip() or None

    def _part(self, kind: str) -> str | None:
        return next((member for found, member in self._relations.values() if found == kind), None)

    def _read_strings(self) -> Iterator[str]:
        part = self._part("sharedStrings")
        if part in self._package:
            for item in self._package.elements(part, f"{self._main}si"):
                yield self._string(item)

    def _string(self, item: etree._Element) -> str:
        """The runs of a rich text, without phonetic hints (rPh)."""
        texts = (text for text in item.iter(f"{self._main}t") if text.getparent().tag != f"{self._main}rPh")
        return "".join(text.text or "" for text in texts)[:_MAX_CELL_CHARS]

    def _read_formats(self) -> list[str]:
        """The kind of number format of each cell style: "date", "time", "datetime", "percent" or ""."""
        part = self._part("styles")
        if part not in self._package:
            return []
        styles = self._package.xml(part)
        custom = {item.get("numFmtId"): item.get("formatCode", "") for item in styles.iter(f"{self._main}numFmt")}
        used = styles.find(f"{self._main}cellXfs")
        return [] if used is None else [_meaning(item.get("numFmtId", "0"), custom) for item in used]

    def _read_rows(self, member: str) -> Iterator[Row]:
        merged = self._read_merged(member)
        above: dict[int, tuple[str, int]] = {}  # column -> (text, last row of the merged cell)
        number = 0
        for row in self._package.elements(member, f"{self._main}row"):
            number = int(row.get("r", number + 1))
            above = {column: (text, last) for column, (text, last) in above.items() if number <= last}
            cells: dict[int, str] = {column: text for column, (text, _) in above.items()}
            column = 0
            for cell in row.iter(f"{self._main}c"):
                column = _column(cell.get("r")) or column + 1
                if (text := self._cell_text(cell).strip()) and column <= _MAX_COLUMN:
                    cells[column] = text
                    if last := merged.get((number, column)):
                        above[column] = text, last
            self._cells += len(cells)
            if self._cells > _MAX_CELLS:
                raise ParseError(
                    "too_many_cells", f"the workbook has over {_MAX_CELLS} cells; split it or save the sheets as CSV"
                )
            yield dict(sorted(cells.items())) if above else cells

    def _read_merged(self, member: str) -> dict[tuple[int, int], int]:
        """(row, column) of cells merged over rows -> the last row; stored after all rows."""
        found = (match.groups() for match in self._package.find_all(member, _MERGED))
        return {
            (int(first), _column(name.decode()) or 0): int(last)
            for name, first, last in islice(found, _MAX_MERGED)
            if int(first) < int(last)
        }

    def _cell_text(self, cell: etree._Element) -> str:
        value = cell.findtext(f"{self._main}v") or ""
        match cell.get("t", "n"):
            case "s":
                return self._strings[int(value)] if value else ""
            case "inlineStr":
                return self._string(cell)
            case "b":
                return {"1": "TRUE", "0": "FALSE"}.get(value, value)
            case "n":
                style = int(cell.get("s", "0"))
                return _number_text(value, self._formats[style] if style < len(self._formats) else "", self._epoch)
            case _:  # str, e, d: unchanged
                return value[:_MAX_CELL_CHARS]


def _column(reference: str | None) -> int | None:
    """ "AB12" -> 28; None without a reference, which means the next column."""
    match = _REFERENCE.match(reference or "")
    if match is None:
        return None
    number = 0
    for letter in match[1].upper():
        number = number * 26 + ord(letter) - ord("A") + 1
    return number


def _meaning(format_id: str, custom: dict[str | None, str]) -> str:
    if format_id not in custom:
        number = int(format_id)
        if number in _PERCENT_FORMATS:
            return "percent"
        if number in _DATE_FORMATS:
            return "datetime" if number == 22 else "date"
        return "time" if number in _TIME_FORMATS else ""
    code = _NOT_PLACEHOLDERS.sub("", custom[format_id].split(";")[0]).lower()
    if "%" in code:
        return "percent"
    has_date, has_time = any(letter in code for letter in "yd"), any(letter in code for letter in "hs")
    if has_date or has_time:
        return ("date" if has_date else "") + ("time" if has_time else "")
    return "date" if "m" in code else ""


def _number_text(value: str, meaning: str, epoch: datetime) -> str:
    """A number as Excel displays it, with up to 15 digits; dates in ISO 8601, such as 2024-05-21."""
    if not meaning and value.isdecimal():
        return value
    try:
        number = float(value)
        if meaning in {"", "percent"}:
            text = f"{number * 100 if meaning else number:.15g}"
            return f"{text}%" if meaning else text
        if meaning == "time" and number >= 1:
            minutes = round(number * 24 * 60)
            return f"{minutes // 60}:{minutes % 60:02}"
        moment = epoch + timedelta(seconds=round(number * 86_400))
    except (ValueError, OverflowError):
        return value[:_MAX_CELL_CHARS]
    clock = f"{moment:%H:%M:%S}".removesuffix(":00")
    if meaning == "date":
        return f"{moment:%Y-%m-%d}"
    return clock if meaning == "time" else f"{moment:%Y-%m-%d} {clock}"

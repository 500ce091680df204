"""XLSX, CSV and TSV: sheets as sections, rows that can be read alone."""

import csv
import io
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.parse import ParseError, parse_file
from ingest.parse.cage import parse_in_child
from ingest.parse.delimited import CSV, TSV, parse_delimited
from ingest.parse.xlsx import MEDIA_TYPE as XLSX
from ingest.sniff import sniff_media_type

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE_RELS = "http://schemas.openxmlformats.org/package/2006/relationships"
STYLES = (
    f'<styleSheet xmlns="{MAIN}"><numFmts><numFmt numFmtId="164" formatCode="dd/mm/yyyy\\ hh:mm"/>'
    '<numFmt numFmtId="165" formatCode="0.00&quot; days&quot;"/></numFmts><cellXfs><xf numFmtId="0"/>'
    '<xf numFmtId="14"/><xf numFmtId="10"/><xf numFmtId="164"/><xf numFmtId="165"/><xf numFmtId="20"/></cellXfs>'
    "</styleSheet>"
)


def write_xlsx(
    path: Path, sheets: dict[str, str], strings: str = "", workbook: str = "", doctype: str = "", merged: str = ""
) -> None:
    """A workbook whose sheets have the given rows as XML."""
    names = "".join(f'<sheet name="{escape(name)}" r:id="r{n}"/>' for n, name in enumerate(sheets))
    links = "".join(
        f'<Relationship Id="r{n}" Type="{RELS}/worksheet" Target="worksheets/sheet{n}.xml"/>'
        for n in range(len(sheets))
    )
    links += f'<Relationship Id="s" Type="{RELS}/sharedStrings" Target="/xl/sharedStrings.xml"/>'
    links += f'<Relationship Id="t" Type="{RELS}/styles" Target="styles.xml"/>'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr(
            "xl/workbook.xml",
            f'{doctype}<workbook xmlns="{MAIN}" xmlns:r="{RELS}">{workbook}<sheets>{names}</sheets></workbook>',
        )
        archive.writestr("xl/_rels/workbook.xml.rels", f'<Relationships xmlns="{PACKAGE_RELS}">{links}</Relationships>')
        archive.writestr("xl/sharedStrings.xml", f'<sst xmlns="{MAIN}">{strings}</sst>')
        archive.writestr("xl/styles.xml", STYLES)
        for number, rows in enumerate(sheets.values()):
            archive.writestr(
                f"xl/worksheets/sheet{number}.xml",
                f'<worksheet xmlns="{MAIN}"><sheetData>{rows}</sheetData>{merged}</worksheet>',
            )


def text_cells(*texts: str) -> str:
    return "<row>" + "".join(f'<c t="inlineStr"><is><t>{escape(text)}</t></is></c>' for text in texts) + "</row>"


def test_xlsx_cells_merged_over_rows_are_in_each_of_them(tmp_path):
    rows = (
        text_cells("Region", "City") + text_cells("North", "Oslo") + text_cells("", "Bergen") + text_cells("", "Rome")
    )
    refs = "".join(f'<mergeCell ref="{ref}"/>' for ref in ("C9:D9", "A2:A3", "XFD1:XFD1048576"))
    merged = f"<!--{' ' * (1 << 20)}--><mergeCells>{refs}</mergeCells>"
    write_xlsx(tmp_path / "x", {"S": rows}, merged=merged)
    assert parse_file(tmp_path / "x", XLSX).text == (
        "S\n\nRegion | City\nRegion: North | City: Oslo\nRegion: North | City: Bergen\nCity: Rome"
    )


def test_xlsx_sheets_are_sections_and_rows_carry_their_columns(tmp_path):
    prices = (
        '<row r="1"><c r="A1" t="s"><v>0</v></c></row>'
        '<row r="3"><c r="A3" t="s"><v>1</v></c><c r="B3" t="s"><v>2</v></c><c r="D3" t="s"><v>3</v></c></row>'
        '<row r="4"><c r="A4" t="inlineStr"><is><t>Oslo &amp; Bergen</t></is></c><c r="B4" s="1"><v>45433</v></c>'
        '<c r="D4" s="2"><v>0.125</v></c></row>'
        '<row r="5"><c r="A5" t="str"><f>A4</f><v>Rome</v></c><c r="B5" s="3"><v>45433.5</v></c>'
        '<c r="D5" t="b"><v>1</v></c></row>'
        '<row r="6"><c r="A6" t="s"><v>1</v></c><c r="B6" s="5"><v>0.75</v></c><c r="D6" t="e"><v>#N/A</v></c></row>'
    )
    strings = (
        "<si><t>Price list</t></si><si><t>City</t></si><si><r><t>Valid </t></r><r><t>from</t></r></si>"
        "<si><t>Discount</t><rPh><t>reading</t></rPh></si>"
    )
    sheets = {"Prices 2024": prices, "Empty": "", "Notes": text_cells("One remark")}
    write_xlsx(tmp_path / "x", sheets, strings)
    assert sniff_media_type((tmp_path / "x").read_bytes(), "x.bin") == XLSX
    parsed = parse_in_child(tmp_path / "x", XLSX)
    assert parsed.text == (
        "Prices 2024\n\nPrice list\nCity | Valid from | Discount\n"
        "City: Oslo & Bergen | Valid from: 2024-05-21 | Discount: 12.5%\n"
        "City: Rome | Valid from: 2024-05-21 12:00 | Discount: TRUE\n"
        "City: City | Valid from: 18:00 | Discount: #N/A\n\n"
        "Empty\n\nNotes\n\nOne remark"
    )
    assert [(h.level, parsed.text[h.char_start :].split("\n")[0]) for h in parsed.headings] == [
        (1, "Prices 2024"),
        (1, "Empty"),
        (1, "Notes"),
    ]
    assert parsed.media_type == XLSX


def test_xlsx_numbers_are_what_was_typed(tmp_path):
    cells = '<c><v>0.30000000000000004</v></c><c s="4"><v>7</v></c><c><v>12345678901234</v></c><c><v>1.5E-3</v></c>'
    row = f"<row>{cells}</row>"
    write_xlsx(tmp_path / "x", {"S": row})
    assert parse_file(tmp_path / "x", XLSX).text == "S\n\n0.3 | 7 | 12345678901234 | 0.0015"


def test_xlsx_dates_count_from_1904_where_the_workbook_says_so(tmp_path):
    row = '<row><c s="1"><v>0</v></c><c s="1"><v>99999999999</v></c></row>'
    write_xlsx(tmp_path / "x", {"S": row}, workbook='<workbookPr date1904="1"/>')
    assert parse_file(tmp_path / "x", XLSX).text == "S\n\n1904-01-01 | 99999999999"


def test_long_sheets_break_between_rows(tmp_path):
    rows = text_cells("Part", "Use") + "".join(text_cells(f"P{n}", "holds the cover. " * 4) for n in range(40))
    write_xlsx(tmp_path / "x", {"Parts": rows})
    blocks = parse_file(tmp_path / "x", XLSX).text.split("\n\n")[1:]
    assert len(blocks) > 5 and all(len(block) < 600 for block in blocks)
    assert all(line.startswith("Part: P") for block in blocks[1:] for line in block.split("\n"))


@pytest.mark.parametrize("kind", ["garbage", "cut", "flipped", "no workbook", "bad string"])
def test_a_damaged_xlsx_says_what_to_do(tmp_path, kind):
    path = tmp_path / "x"
    write_xlsx(path, {"S": '<row><c t="s"><v>7</v></c></row>' if kind == "bad string" else text_cells("a", "b")})
    data = path.read_bytes()
    at = data.index(b"sheet0.xml") + 12
    path.write_bytes(
        {
            "garbage": b"PK\x03\x04" + bytes(range(256)),
            "cut": data[: len(data) // 2],
            "flipped": data[:at] + bytes(byte ^ 0x55 for byte in data[at : at + 40]) + data[at + 40 :],
            "no workbook": data.replace(b"xl/workbook.xml", b"xl/workbooks.xm"),
            "bad string": data,
        }[kind]
    )
    with pytest.raises(ParseError, match="save it again as XLSX") as caught:
        parse_file(path, XLSX)
    assert caught.value.code == "broken_xlsx"


def test_entities_are_not_expanded(tmp_path):
    (tmp_path / "secret").write_text("do not show")
    doctype = f'<!DOCTYPE w [<!ENTITY a "{"x" * 1000}"><!ENTITY f SYSTEM "file://{tmp_path}/secret">]>'
    write_xlsx(tmp_path / "x", {"S": text_cells("seen")}, workbook="<a>&a;&f;</a>", doctype=doctype)
    text = parse_file(tmp_path / "x", XLSX).text
    assert text == "S\n\nseen"


@pytest.mark.parametrize("kind", ["ratio", "members"])
def test_archives_made_to_grow_are_refused_before_unpacking(tmp_path, kind):
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        if kind == "ratio":
            archive.writestr("xl/workbook.xml", b"\0" * (80 * 1024 * 1024))
        else:
            for number in range(20_001):
                archive.writestr(f"xl/{number}", b"")
    with pytest.raises(ParseError, match="over the limit") as caught:
        parse_file(tmp_path / "x", XLSX)
    assert caught.value.code == "zip_bomb"


def test_a_member_longer_than_it_says_is_damage(tmp_path):
    write_xlsx(tmp_path / "x", {"S": text_cells("a" * 5000, "b")})
    data = bytearray((tmp_path / "x").read_bytes())
    at = data.rindex(b"xl/worksheets/sheet0.xml") - 46 + 24  # its size in the directory
    data[at : at + 4] = (60).to_bytes(4, "little")
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ParseError, match="damaged") as caught:
        parse_file(tmp_path / "x", XLSX)
    assert caught.value.code == "broken_xlsx"


@pytest.mark.parametrize(
    ("data", "media_type", "text"),
    [
        (b"name,age\nAnna,31\nBo,\n", CSV, "name | age\nname: Anna | age: 31\nname: Bo"),
        ("Größe;Preis\n5 µm;3,20\n".encode("cp1252"), CSV, "Größe | Preis\nGröße: 5 µm | Preis: 3,20"),
        ("a\tb\n1\t2\n".encode("utf-16"), TSV, "a | b\na: 1 | b: 2"),
        (b"\xef\xbb\xbfsep=;\r\na;b\r\n1,5;2\r\n", CSV, "a | b\na: 1,5 | b: 2"),
        (b'id,note\n1,"two\nlines, ""quoted"""\n', CSV, 'id | note\nid: 1 | note: two lines, "quoted"'),
        (b"1,2\n3,4\n", CSV, "1 | 2\n3 | 4"),
        (b"Region,2023,2024\nNorth,5,6\n", CSV, "Region | 2023 | 2024\nRegion: North | 2023: 5 | 2024: 6"),
        (b"a,b\n1,2,3\n4,5\n", CSV, "a | b\na: 1 | b: 2 | 3\na: 4 | b: 5"),
        (b"no columns here\nat all\n", CSV, "no columns here\nat all\n"),
        (b"a,b\n\n1,2\n,,\n", CSV, "a | b\na: 1 | b: 2"),
        (b"a|b\nx, y and z|2\n", CSV, "a | b\na: x, y and z | b: 2"),
        (b'a,b\n"never closed,1\n', CSV, "a | b\na: never closed,1"),
    ],
)
def test_delimited_rows_carry_their_columns(data, media_type, text):
    assert parse_delimited(data, media_type).text == text


def test_a_cell_without_end_leaves_the_file_as_text():
    data = b'a,b\n"' + b"x,1\n" * 3_000_000
    assert parse_delimited(data, CSV).text == data.decode()


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["C"]) | st.sampled_from("\n\t"), max_size=200),
    st.sampled_from([CSV, TSV]),
)
def test_any_text_is_readable_as_rows(text, media_type):
    parsed = parse_delimited(text.encode(), media_type)
    assert parsed.media_type == media_type


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.text("ab,;\t\"'\n ", max_size=5), min_size=2, max_size=4), min_size=1, max_size=8))
def test_no_cell_is_lost(rows):
    packed = io.StringIO()
    csv.writer(packed).writerows([["first", "second"], *rows])
    text = parse_delimited(packed.getvalue().encode(), CSV).text
    for letter in "ab":
        written = packed.getvalue().partition("\n")[2].count(letter)
        assert text.count(letter) >= written

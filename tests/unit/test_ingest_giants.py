"""Documents of 10^6 pages or rows, small on disk or not: read within the limits or refused with a reason, and soon."""

import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from app_kit import LIGHTHOUSE, make_settings, running_service
from test_ingest_formats_tables import XLSX, text_cells, write_xlsx

from ingest.parse import ParseError, parse_file
from ingest.parse.cage import parse_in_child
from ingest.sniff import SNIFF_BYTES, UnsupportedMediaType, sniff_media_type
from retrieval.types import ParsedDocument

MILLION = 10**6
SOON_S = 120.0  # on a busy machine; a tenth of it on an idle one


def write_pdf(path: Path, objects: list[bytes]) -> None:
    """A PDF of these objects, numbered from 1, of which the first is the catalog."""
    out, places = bytearray(b"%PDF-1.5\n"), []
    for number, body in enumerate(objects, 1):
        places.append(b"%010d 00000 n \n" % len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, b"".join(places))
    trailer = b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(out))
    path.write_bytes(bytes(out) + table + trailer)


def page_tree(levels: int, count: Callable[[int], bytes]) -> list[bytes]:
    """A tree in which each node has the next one ten times, so that one page stands in it 10^levels times."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>"]
    for level in range(levels):
        parent = b"/Parent %d 0 R" % (level + 1) if level else b""
        kids = b" ".join([b"%d 0 R" % (level + 3)] * 10)
        objects.append(b"<</Type/Pages%s%s/Kids[%s]>>" % (parent, count(level), kids))
    return [*objects, b"<</Type/Page/Parent %d 0 R/MediaBox[0 0 9 9]>>" % (levels + 1)]


def flat(kids: bytes) -> list[bytes]:
    root = b"<</Type/Pages/Count %d/Kids[%s]>>" % (MILLION, kids)
    return [b"<</Type/Catalog/Pages 2 0 R>>", root, b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>"]


PDFS = {
    "a tree of 10^6": (page_tree(6, lambda level: b"/Count %d" % 10 ** (6 - level)), "too_many_pages"),
    "one that does not say so": (page_tree(6, lambda level: b""), "too_many_pages"),
    "one that says it has three": (page_tree(6, lambda level: b"/Count 3"), "no_text"),
    "one of 10^9": (page_tree(9, lambda level: b""), "empty_document"),
    "one array of 10^6": (flat(b"3 0 R " * MILLION), "too_many_pages"),
    "one page that is said to be 10^6": (flat(b"3 0 R"), "too_many_pages"),
    "a tree in itself": (flat(b"2 0 R 2 0 R"), "too_many_pages"),
}


def parse(path: Path, name: str) -> ParsedDocument:
    with path.open("rb") as file:
        media_type = sniff_media_type(file.read(SNIFF_BYTES), name)
    start = time.monotonic()
    try:
        return parse_in_child(path, media_type)
    finally:
        assert time.monotonic() - start < SOON_S


def error_of(path: Path, name: str) -> str:
    with pytest.raises(ParseError) as caught:
        parse(path, name)
    assert not caught.value.retryable
    return caught.value.code


@pytest.mark.parametrize("kind", PDFS)
def test_a_pdf_of_a_million_pages(tmp_path, kind):
    objects, code = PDFS[kind]
    write_pdf(tmp_path / "x", objects)
    assert error_of(tmp_path / "x", "x.pdf") == code


def test_a_workbook_of_a_million_rows(tmp_path):
    rows = "".join(f"<row><c><v>{number}</v></c></row>" for number in range(MILLION))
    write_xlsx(tmp_path / "x", {"S": rows})
    text = parse(tmp_path / "x", "x.xlsx").text
    assert text.startswith("S\n\n0\n1\n") and text.endswith("\n999999")
    assert len(text.split()) == MILLION + 1


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ("<row><c><v>1</v></c></row>" * 4 * MILLION, "zip_bomb"),
        ('<row><c t="s"><v>0</v></c></row>' * MILLION, "output_too_large"),
        (text_cells(*(f"{n} name" * 2000 for n in range(8))) + f"<row>{'<c><v>1</v></c>' * 8}</row>" * 100_000, None),
    ],
    ids=["rows that pack too well", "one long cell in all rows", "long names of columns in all rows"],
)
def test_a_workbook_whose_text_is_out_of_all_proportion(tmp_path, rows, code):
    write_xlsx(tmp_path / "x", {"S": rows}, strings=f"<si><t>{'a long cell ' * 1000}</t></si>")
    assert error_of(tmp_path / "x", "x.xlsx") == (code or "output_too_large")


def test_a_workbook_with_a_row_of_a_million_cells_has_those_that_excel_would_read(tmp_path):
    write_xlsx(tmp_path / "x", {"S": f"<row>{'<c><v>1</v></c>' * MILLION}</row>"})
    assert parse(tmp_path / "x", "x.xlsx").text.count("1") == 16_384


def test_a_workbook_of_too_many_cells(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.parse.xlsx._MAX_CELLS", 1000)
    write_xlsx(tmp_path / "x", {"S": f"<row>{'<c><v>1</v></c>' * 10}</row>" * 101})
    with pytest.raises(ParseError, match="save the sheets as CSV") as caught:
        parse_file(tmp_path / "x", XLSX)
    assert caught.value.code == "too_many_cells"


def test_a_table_of_a_million_rows(tmp_path):
    rows = "".join(f"{number},name {number}\n" for number in range(MILLION))
    (tmp_path / "x").write_text("id,name\n" + rows)
    text = parse(tmp_path / "x", "x.csv").text
    assert text.count("\n") >= MILLION and text.endswith("id: 999999 | name: name 999999")


def test_a_table_with_a_row_of_a_million_cells(tmp_path):
    (tmp_path / "x").write_text(",".join(map(str, range(MILLION))) + "\n")
    assert parse(tmp_path / "x", "x.csv").text.endswith("999998 | 999999")


def test_a_table_whose_long_names_all_rows_repeat(tmp_path):
    names = ",".join(f"{number} name" * 2000 for number in range(8))
    (tmp_path / "x").write_text(f"{names}\n" + "1,2,3,4,5,6,7,8\n" * 100_000)
    assert error_of(tmp_path / "x", "x.csv") == "output_too_large"


def test_a_sheet_of_opendocument_is_refused_before_it_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
    with pytest.raises(UnsupportedMediaType, match="save it as XLSX"):
        parse(tmp_path / "x", "x.ods")


@pytest.mark.anyio
async def test_the_service_goes_on(tiny_checkpoint, tmp_path):
    write_pdf(tmp_path / "x", PDFS["a tree of 10^6"][0])
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data")) as client:
        failed = await client.upload("giant.pdf", (tmp_path / "x").read_bytes())
        assert (failed["status"], failed["last_error"]["code"]) == ("failed", "too_many_pages")
        assert "split the document" in failed["last_error"]["message"]
        assert (await client.upload("light.md", LIGHTHOUSE))["status"] == "ready"
        found = await client.post("/v1/search", json={"query": "who keeps the lighthouse"})
        assert found.status_code == 200 and found.json()["data"]

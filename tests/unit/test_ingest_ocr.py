"""Pages that are pictures: found, named, and read where Tesseract is installed."""

from pathlib import Path

import pypdfium2 as pdfium
import pytest

from ingest.parse import ParseError, ocr, parse_file
from ingest.parse.cage import parse_in_child
from retrieval.types import ParsedDocument

HANDBOOK = Path(__file__).parents[2] / "samples" / "documents" / "fr12-handbook.pdf"
PDF = "application/pdf"


def write_scan(path: Path, kinds: str) -> Path:
    """A PDF of t(ext pages), s(canned ones) and b(lank ones); all show pages of the handbook, in its order."""
    handbook, made = pdfium.PdfDocument(HANDBOOK), pdfium.PdfDocument.new()
    for number, kind in enumerate(kinds):
        width, height = handbook[number].get_size()
        if kind == "t":
            made.import_pages(handbook, [number])
            continue
        page = made.new_page(width, height)
        if kind == "s":
            image = pdfium.PdfImage.new(made)
            image.set_bitmap(handbook[number].render(scale=3, grayscale=True))
            image.set_matrix(pdfium.PdfMatrix().scale(width, height))
            page.insert_obj(image)
            page.gen_content()
    made.save(path)
    return path


@pytest.fixture
def no_ocr(monkeypatch):
    monkeypatch.setattr(ocr, "find_program", lambda: None)


def parse(path: Path) -> ParsedDocument:
    return parse_file(path, PDF)


def test_scanned_pages_are_named_and_blank_ones_are_not(tmp_path, no_ocr):
    parsed = parse(write_scan(tmp_path / "x.pdf", "tsstbs"))
    assert parsed.unread.startswith("pages 2-3, 6 are pictures without text; run OCR on it")
    assert [page.char_end > page.char_start for page in parsed.pages] == [True, False, False, True, False, False]
    assert parse(write_scan(tmp_path / "x.pdf", "ts")).unread.startswith("page 2 is a picture")
    assert parse(write_scan(tmp_path / "x.pdf", "tb")).unread is None
    assert parse(HANDBOOK).unread is None


def test_only_scanned_pages_are_an_error_that_says_what_to_do(tmp_path, no_ocr):
    with pytest.raises(ParseError, match=r"none of the 2 pages \(1-2\).*ocrmypdf.*tesseract") as caught:
        parse(write_scan(tmp_path / "x.pdf", "ss"))
    assert caught.value.code == "no_text"


def test_an_ocr_that_fails_leaves_the_page_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ocr, "find_program", lambda: "/bin/false")
    assert parse(write_scan(tmp_path / "x.pdf", "ts")).unread.startswith("page 2 is a picture")


@pytest.mark.skipif(ocr.find_program() is None, reason="tesseract is not installed")
def test_scanned_pages_are_read_inside_the_cage(tmp_path):
    parsed = parse_in_child(write_scan(tmp_path / "x.pdf", "ts"), PDF)
    assert parsed.unread is None
    want = set(parse(HANDBOOK).text[parse(HANDBOOK).pages[1].char_start : parse(HANDBOOK).pages[1].char_end].split())
    got = set(parsed.text[parsed.pages[1].char_start :].split())
    assert len(want & got) > 0.8 * len(want)


def test_lines_far_apart_stay_one_sentence():
    torn = "TERMS\n\nA guarantee of five years on\n\nall joints, but not\n\non varnish.\n\nPay within\n\n21 days"
    assert ocr.join_lines(torn) == (
        "TERMS\n\nA guarantee of five years on\nall joints, but not\non varnish.\n\nPay within\n\n21 days"
    )

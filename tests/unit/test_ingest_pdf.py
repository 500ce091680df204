from collections.abc import Sequence
from pathlib import Path

import pytest

from ingest.parse import ParseError, parse_file
from ingest.parse.pdf_layout import HYPHEN_MARK, Line, join_hyphenated, join_lines
from retrieval.types import ParsedDocument

DATA = Path(__file__).parent / "data"
Shown = tuple[float, float, str]  # x, y, text


def write_pdf(path: Path, pages: Sequence[Sequence[Shown]], catalog: str = "", extra: Sequence[str] = ()) -> Path:
    """A PDF with text in 12 point Helvetica. Objects: 1 catalog, 2 pages, 3 font, then `extra`, then the pages."""
    first = 4 + len(extra)
    kids = " ".join(f"{first + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        f"<< /Type /Catalog /Pages 2 0 R {catalog} >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        *extra,
    ]
    for number, shown in enumerate(pages):
        content = " ".join(f"BT /F 12 Tf {x} {y} Td ({text}) Tj ET" for x, y, text in shown)
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents {first + 2 * number + 1} 0 R "
            "/Resources << /Font << /F 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(content.encode('cp1252'))} >>\nstream\n{content}\nendstream")
    data, offsets = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode("cp1252")
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    data += f"xref\n0 {size}\n0000000000 65535 f \n{table}".encode()
    data += f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{data.index(b'xref')}\n%%EOF".encode()
    path.write_bytes(data)
    return path


def parse(path: Path, max_pages: int = 100) -> ParsedDocument:
    return parse_file(path, "application/pdf", max_pages=max_pages)


def page_texts(parsed: ParsedDocument) -> list[str]:
    return [parsed.text[page.char_start : page.char_end] for page in parsed.pages]


def test_pages_have_labels_and_exact_ranges(tmp_path):
    catalog = "/PageLabels << /Nums [0 << /S /r >> 2 << /S /D /St 5 >>] >>"
    pages = [[(72, 700, "preface")], [], [(72, 700, "chapter")], [(72, 700, "end")]]
    parsed = parse(write_pdf(tmp_path / "x", pages, catalog))
    assert [(page.page, page.label) for page in parsed.pages] == [(1, "i"), (2, "ii"), (3, "5"), (4, "6")]
    assert page_texts(parsed) == ["preface", "", "chapter", "end"]
    assert parsed.text == "preface\n\n\n\nchapter\n\nend"
    assert parsed.media_type == "application/pdf"


def test_a_page_number_at_the_edge_is_not_text(tmp_path):
    pages = [[(72, 700, "one"), (300, 30, "1")], [(72, 820, "2"), (72, 700, "2"), (72, 680, "two")]]
    assert page_texts(parse(write_pdf(tmp_path / "x", pages))) == ["one", "2\ntwo"]


def test_wrapped_lines_are_joined_and_paragraphs_and_rows_kept(tmp_path):
    full = "This line is so long that the next word did not fit into it, therefore it"
    shown = [
        (72, 800, full),
        (72, 786, "goes on here."),
        (72, 758, "A new paragraph."),
        (72, 744, "1. first item"),
        (72, 730, "2. second item"),
        (72, 702, "Item"),
        (300, 702, "Price"),
        (72, 688, "Apple pie"),
        (300, 688, "2 kroner"),
    ]
    parsed = parse(write_pdf(tmp_path / "x", [shown]))
    assert parsed.text == (
        f"{full} goes on here.\n\nA new paragraph.\n1. first item\n2. second item\n\nItem | Price\nApple pie | 2 kroner"
    )


def test_the_outline_gives_headings_where_their_titles_stand(tmp_path):
    extra = [
        "<< /Type /Outlines /First 5 0 R /Last 6 0 R /Count 2 >>",
        "<< /Title (Setting  up) /Parent 4 0 R /Next 6 0 R /First 7 0 R /Last 7 0 R /Count 1 /Dest [8 0 R /Fit] >>",
        "<< /Title (Not in the text) /Parent 4 0 R /Prev 5 0 R /Dest [10 0 R /Fit] >>",
        "<< /Title (Power) /Parent 5 0 R /Dest [8 0 R /Fit] >>",
    ]
    pages = [[(72, 700, "Power comes first"), (72, 650, "SETTING UP"), (72, 600, "Power")], [(72, 700, "next")]]
    parsed = parse(write_pdf(tmp_path / "x", pages, "/Outlines 4 0 R", extra))
    assert [(heading.level, heading.title) for heading in parsed.headings] == [
        (1, "Setting up"),
        (2, "Power"),
        (1, "Not in the text"),
    ]
    starts = [parsed.text[heading.char_start :].split("\n")[0] for heading in parsed.headings]
    assert starts == ["SETTING UP", "Power", "next"]


def test_progress_is_reported_up_to_the_last_page(tmp_path):
    path = write_pdf(tmp_path / "x", [[(72, 700, "text")]] * 40)
    reports: list[tuple[int, int]] = []
    parse_file(path, "application/pdf", report=lambda done, total: reports.append((done, total)))
    assert reports == [(16, 40), (32, 40), (40, 40)]


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("encrypted", "encrypted_pdf", "remove the password"),
        ("no pages", "empty_document", "no pages"),
        ("blank pages", "no_text", r"none of the 3 pages \(1-3\).*OCR"),
        ("cut", "broken_pdf", "print it to a new PDF"),
        ("garbage", "broken_pdf", r"damaged \([^()]*[^.]\); open"),
        ("many pages", "too_many_pages", "101 pages are over the limit of 100"),
    ],
)
def test_a_pdf_that_cannot_be_read_says_why_and_what_to_do(tmp_path, name, code, says):
    path = tmp_path / "x"
    match name:
        case "encrypted":
            path = DATA / "encrypted.pdf"
        case "no pages":
            write_pdf(path, [])
        case "blank pages":
            write_pdf(path, [[]] * 3)
        case "cut":
            path.write_bytes((DATA / "encrypted.pdf").read_bytes()[:300])
        case "garbage":
            path.write_bytes(b"%PDF-1.7\n" + bytes(range(256)) * 8)
        case "many pages":
            write_pdf(path, [[]] * 101)
    with pytest.raises(ParseError, match=says) as caught:
        parse(path)
    assert (caught.value.code, caught.value.retryable) == (code, False)


def line(text: str, y: float, x: float = 0.0, width: float | None = None) -> Line:
    return Line(text, x, y, x + (5.0 * len(text) if width is None else width), y + 10)


PROSE = "A sentence that fills the whole width of its column"


def test_a_word_divided_at_the_end_of_a_line_is_one_word():
    joined = join_lines([line(PROSE + " and an exam-", 100), line("ple of it.", 88)])
    assert join_hyphenated([joined]) == [PROSE + " and an example of it."]
    joined = join_lines([line(PROSE + f" and an exam{HYPHEN_MARK}", 100), line("ple of it.", 88)])
    assert join_hyphenated([joined]) == [PROSE + " and an example of it."]


def test_a_hyphen_that_belongs_to_the_word_stays():
    texts = [f"a well{HYPHEN_MARK}known fact, so well-known", f"model FR{HYPHEN_MARK}12 and A{HYPHEN_MARK}Z"]
    assert join_hyphenated(texts) == ["a well-known fact, so well-known", "model FR-12 and A-Z"]


def test_the_next_column_goes_on_with_the_sentence_or_starts_anew():
    left = [line(PROSE, 100), line(PROSE + " and", 88, width=260)]
    assert join_lines([*left, line("then goes on.", 100, x=400)]) == f"{PROSE} {PROSE} and then goes on."
    assert join_lines([*left, line("Another one.", 100, x=400)]) == f"{PROSE} {PROSE} and\n\nAnother one."


def test_an_indented_line_after_a_full_stop_starts_a_paragraph():
    lines = [line(PROSE + ".", 100), line("New one.", 88, x=15), line(PROSE, 76)]
    assert join_lines(lines).startswith(PROSE + ".\n\nNew one.")


def test_lines_without_a_known_place_stay_lines():
    assert join_lines([Line("a", 0, 0, 0, 0), Line("b", 0, 0, 0, 0)]) == "a\nb"
    assert join_lines([]) == ""

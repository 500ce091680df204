"""PDF with PDFium: text per page, page labels, outline as headings; scanned pages by OCR if available.

PDFium is not thread safe, another reason for running parsers in child processes (child.py). pdf_text.py reads the lines
of a page, pdf_layout.py turns them into paragraphs.
"""

import re
import time
from itertools import islice

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from ingest.parse import ParseError, Report, Source, ocr
from ingest.parse.decode import normalize_text
from ingest.parse.pdf_layout import join_hyphenated, join_lines
from ingest.parse.pdf_text import read_lines
from retrieval.parsed import Heading, Page, ParsedDocument

_PAGE_GAP = "\n\n"
_OCR_S = 180.0  # for all pages of a document
_RUN_OCR = "run OCR on it (for example with ocrmypdf) and upload the result, or install tesseract with the service"
_MAX_OUTLINE = 20_000
_REPORT_EVERY = 16


def parse_pdf(source: Source, *, max_pages: int, report: Report) -> ParsedDocument:
    """Read all pages; `pages` has their exact ranges in the text, empty for a page without text.

    Ligatures are decomposed and hyphenated words joined, so that quotes and searches match. Scanned pages that were not
    read are named in `unread`.
    Raises ParseError encrypted_pdf, broken_pdf, empty_document, too_many_pages, no_text.
    """
    document = _open(source)
    total = len(document)
    if total > max_pages:
        raise ParseError("too_many_pages", f"{total} pages are over the limit of {max_pages}; split the document")
    texts: list[str] = []
    labels: list[str | None] = []
    scans = _Scans()
    for number in range(total):
        labels.append(normalize_text(document.get_page_label(number)).strip() or None)
        page = _load_page(document, number)
        texts.append(_page_text(page, number, {labels[-1], str(number + 1)}) or scans.read(page, number))
        page.close()
        if (number + 1) % _REPORT_EVERY == 0 or number + 1 == total:
            report(number + 1, total)
    if not any(texts):
        raise ParseError(
            "no_text",
            f"none of the {total} pages ({_span(total)}) holds text: this is probably a scan; {_RUN_OCR}",
            page=1,
        )
    # Soft hyphens in a PDF are visible: many fonts map their hyphen to that code.
    texts = [normalize_text(text, keep_soft_hyphens=True).strip() for text in join_hyphenated(texts)]
    pages, start = [], 0
    for number, text in enumerate(texts):
        pages.append(Page(number + 1, labels[number], start, start + len(text)))
        start += len(text) + len(_PAGE_GAP)
    joined = _PAGE_GAP.join(texts)
    title = normalize_text(document.get_metadata_value("Title")).strip()
    headings = _read_outline(document, joined, pages)
    return ParsedDocument(joined, tuple(pages), headings, title or None, "application/pdf", scans.unread())


class _Scans:
    """Reads pages that are images without text by OCR, within the time limit, and records those it did not read."""

    def __init__(self) -> None:
        self._unread: list[int] = []
        self._deadline = time.monotonic() + _OCR_S

    def read(self, page: pdfium.PdfPage, number: int) -> str:
        """The text of the page if it is a scan and OCR is available, else empty."""
        try:
            if next(page.get_objects(filter=[pdfium_c.FPDF_PAGEOBJ_IMAGE], max_depth=3), None) is None:
                return ""  # blank, or a drawing
            program = ocr.find_program()
            if program is not None and time.monotonic() < self._deadline:
                return ocr.read_page(page, program)
        except (ParseError, pdfium.PdfiumError):
            pass  # named as unread below
        self._unread.append(number + 1)
        return ""

    def unread(self) -> str | None:
        if not self._unread:
            return None
        are = "page {} is a picture" if len(self._unread) == 1 else "pages {} are pictures"
        return f"{are.format(_ranges(self._unread))} without text; {_RUN_OCR}"


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _span(total: int) -> str:
    return "1" if total == 1 else f"1-{total}"


def _open(source: Source) -> pdfium.PdfDocument:
    try:
        return pdfium.PdfDocument(source)
    except pdfium.PdfiumError as error:
        if _can_load(source):  # pypdfium2 rejects documents without pages, with an unrelated earlier error
            raise ParseError("empty_document", "the PDF has no pages; export it again from its source") from error
        if error.err_code in (pdfium_c.FPDF_ERR_PASSWORD, pdfium_c.FPDF_ERR_SECURITY):
            raise ParseError(
                "encrypted_pdf", "the PDF is protected by a password; remove the password and upload it again"
            ) from error
        raise ParseError(
            "broken_pdf",
            f"the PDF is damaged ({_reason(error)}); open it in a viewer, print it to a new PDF and upload that",
        ) from error


def _reason(error: pdfium.PdfiumError) -> str:
    """PDFium's message, without pypdfium2's."""
    return re.sub(r"^.*\(PDFium: (.+)\)$", r"\1", str(error).removesuffix("."))


def _can_load(source: Source) -> bool:
    if isinstance(source, bytes):
        document = pdfium_c.FPDF_LoadMemDocument64(source, len(source), None)
    else:
        document = pdfium_c.FPDF_LoadDocument(str(source).encode() + b"\0", None)
    if document:
        pdfium_c.FPDF_CloseDocument(document)
    return bool(document)


def _load_page(document: pdfium.PdfDocument, number: int) -> pdfium.PdfPage:
    try:
        return document[number]
    except pdfium.PdfiumError as error:
        raise ParseError("broken_pdf", f"page {number + 1} is damaged ({_reason(error)})", page=number + 1) from error


def _page_text(page: pdfium.PdfPage, number: int, page_names: set[str | None]) -> str:
    """The page's text, without a first or last line that is only the page number."""
    try:
        text_page = page.get_textpage()
    except pdfium.PdfiumError as error:
        raise ParseError("broken_pdf", f"page {number + 1} is damaged ({_reason(error)})", page=number + 1) from error
    lines = read_lines(text_page)
    text_page.close()
    for edge in (0, -1):
        if lines and lines[edge].text in page_names:
            del lines[edge]
    return join_lines(lines)


def _read_outline(document: pdfium.PdfDocument, text: str, pages: list[Page]) -> tuple[Heading, ...]:
    """Bookmarks as headings, located at their title on the page, or else at the start of the page."""
    headings = []
    position = 0  # of the entry before, so that a title that occurs twice on a page is found in order
    for bookmark in islice(document.get_toc(), _MAX_OUTLINE):
        title = " ".join(normalize_text(bookmark.get_title()).split())
        target = bookmark.get_dest()
        number = target.get_index() if target is not None else None
        if not title or number is None or not 0 <= number < len(pages):
            continue
        page = pages[number]
        found = _find_title(text, title, max(position, page.char_start), page.char_end)
        if found is None:
            found = _find_title(text, title, page.char_start, page.char_end)
        start = page.char_start if found is None else found
        headings.append(Heading(bookmark.level + 1, title, start))
        position = start if found is None else start + 1
    return tuple(sorted(headings, key=lambda heading: heading.char_start))


def _find_title(text: str, title: str, start: int, end: int) -> int | None:
    """First occurrence of the title in text[start:end], ignoring white space and case."""
    pattern = re.compile(r"\s+".join(re.escape(word) for word in title.split()), re.IGNORECASE)
    match = pattern.search(text, start, end)
    return match.start() if match else None

"""Recognises what an upload is from its first bytes.

The content decides; the name only breaks ties between formats whose bytes look alike (Markdown, CSV, source code are
all text). Not a validator: a damaged PDF is still a PDF here, and its parser says what is wrong.
"""

import re
from pathlib import PurePosixPath

from ingest.parse.decode import UndecodableText, decode_text

SNIFF_BYTES = 64 * 1024
PDF = "application/pdf"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
HTML = "text/html"
MARKDOWN = "text/markdown"
TEXT = "text/plain"
_TEXT_BY_SUFFIX = {
    **dict.fromkeys((".md", ".markdown", ".mdown", ".mkd"), MARKDOWN),
    ".rst": "text/x-rst",
    ".csv": "text/csv",
    ".tsv": "text/tab-separated-values",
    **dict.fromkeys((".json", ".jsonl"), "application/json"),
    **dict.fromkeys((".xml", ".svg"), "application/xml"),
    **dict.fromkeys(
        (".py", ".js", ".ts", ".c", ".h", ".cc", ".cpp", ".java", ".go", ".rs", ".sh", ".sql", ".rb", ".toml", ".yaml"),
        "text/x-source",
    ),
}
TEXT_TYPES = frozenset({TEXT, *_TEXT_BY_SUFFIX.values()} - {MARKDOWN})
SUPPORTED_TYPES = frozenset({PDF, DOCX, HTML, MARKDOWN} | TEXT_TYPES)
SUPPORTED = "PDF, DOCX, HTML, Markdown and text in any encoding (CSV, JSON, reStructuredText, source code included)"

# Formats that are often sent and that no parser here reads: the bytes they start with, and what to do instead.
_FOREIGN = (
    (b"\x89PNG", "a PNG image", "run OCR on it and upload the text"),
    (b"\xff\xd8\xff", "a JPEG image", "run OCR on it and upload the text"),
    (b"GIF8", "a GIF image", "run OCR on it and upload the text"),
    (b"II*\x00", "a TIFF image", "run OCR on it and upload the text"),
    (b"MM\x00*", "a TIFF image", "run OCR on it and upload the text"),
    (b"\x1f\x8b", "a gzip archive", "unpack it and upload the files"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and upload the files"),
    (b"Rar!", "a RAR archive", "unpack it and upload the files"),
    (b"{\\rtf", "an RTF document", "save it as DOCX or PDF"),
    (b"%!PS", "a PostScript file", "convert it to PDF"),
    (b"\x7fELF", "a program", "upload its documentation"),
    (b"SQLite format 3\x00", "an SQLite database", "export it as CSV"),
)
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_HTML_START = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.I | re.S)
_HTML_TAG = re.compile(r"<(?:p|div|h[1-6]|table|ul|ol|span|a|br|article|section)\b[^>]*>", re.I)


class UnsupportedMediaType(ValueError):
    """No parser reads this content; the message says what it seems to be and what is supported."""

    code = "unsupported_media_type"


class EmptyFile(ValueError):
    """The upload has no bytes."""

    code = "empty_file"


def sniff_media_type(head: bytes, filename: str) -> str:
    """Media type of a file that starts with `head` (its first SNIFF_BYTES bytes, or all of it).

    Raises EmptyFile, UnsupportedMediaType.
    """
    if not head:
        raise EmptyFile("the file is empty (0 bytes); check that it was written or copied completely and send it again")
    suffix = PurePosixPath(filename[-32:]).suffix.lower()
    if b"%PDF-" in head[:1024]:
        return PDF
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _sniff_zip(head, suffix)
    if head.startswith(_OLE):
        raise _unsupported(*_describe_ole(head))
    for magic, what, instead in _FOREIGN:
        if head.startswith(magic):
            raise _unsupported(what, instead)
    try:
        text = decode_text(head[:SNIFF_BYTES], truncated=len(head) >= SNIFF_BYTES)
    except UndecodableText as error:
        raise _unsupported(f"binary data ({error})", "if it is meant to be text, save it as UTF-8") from error
    return _sniff_text(text, suffix)


def _sniff_zip(head: bytes, suffix: str) -> str:
    """Tell office files by the member names in the zip's local headers; they stand in the clear."""
    if b"word/" in head:
        return DOCX
    for member, what in ((b"xl/", "an Excel workbook"), (b"ppt/", "a PowerPoint presentation")):
        if member in head:
            raise _unsupported(what, "save it as PDF, or as CSV for a table")
    for name, what in ((b"opendocument", "an OpenDocument file"), (b"epub+zip", "an EPUB book")):
        if name in head[:256]:
            raise _unsupported(what, "save it as DOCX or PDF")
    if suffix == ".docx":
        return DOCX
    raise _unsupported("a zip archive", "unpack it and upload the files")


def _describe_ole(head: bytes) -> tuple[str, str]:
    if "EncryptedPackage".encode("utf-16-le") in head:
        return "an Office file protected by a password", "remove the password and save it again"
    return "an Office file of the format before 2007", "save it as DOCX or PDF"


def _sniff_text(text: str, suffix: str) -> str:
    if _HTML_START.match(text[:4096]):
        return HTML
    if suffix in {".html", ".htm", ".xhtml"} and _HTML_TAG.search(text):
        return HTML
    return _TEXT_BY_SUFFIX.get(suffix, TEXT)


def _unsupported(what: str, instead: str) -> UnsupportedMediaType:
    return UnsupportedMediaType(f"this looks like {what}, which cannot be read; {instead}. Supported: {SUPPORTED}")

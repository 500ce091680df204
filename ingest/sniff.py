"""Detects the media type of an upload from its first bytes.

The content decides; the name only distinguishes formats that look alike (Markdown, CSV and source code are all text).
Not a validator: a damaged PDF is detected as a PDF, and its parser reports the damage.
"""

import re
from pathlib import PurePosixPath

from ingest.parse.decode import UndecodableText, decode_text

SNIFF_BYTES = 64 * 1024
PDF = "application/pdf"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
PPTX = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
ODT = "application/vnd.oasis.opendocument.text"
EPUB = "application/epub+zip"
EML = "message/rfc822"
MBOX = "application/mbox"
ZIP = "application/zip"
TAR = "application/x-tar"
GZIP = "application/gzip"
BZIP2 = "application/x-bzip2"
XZ = "application/x-xz"
RST = "text/x-rst"
SOURCE = "text/x-source"
RTF = "application/rtf"
NOTEBOOK = "application/x-ipynb+json"
MAN = "text/troff"
HTML = "text/html"
MARKDOWN = "text/markdown"
TEXT = "text/plain"
_TEXT_BY_SUFFIX = {
    **dict.fromkeys((".md", ".markdown", ".mdown", ".mkd"), MARKDOWN),
    **dict.fromkeys((".rst", ".rest"), RST),
    ".csv": "text/csv",
    **dict.fromkeys((".tsv", ".tab"), "text/tab-separated-values"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "application/json"),
    **dict.fromkeys((".xml", ".svg"), "application/xml"),
    **dict.fromkeys(
        (
            *(".py", ".js", ".mjs", ".ts", ".tsx", ".jsx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".java", ".kt"),
            *(".go", ".rs", ".swift", ".scala", ".sh", ".bash", ".sql", ".rb", ".php", ".pl", ".lua", ".r"),
            *(".toml", ".yaml", ".yml", ".ini", ".cfg"),
        ),
        SOURCE,
    ),
}
PACKED_TYPES = frozenset({ZIP, TAR, GZIP, BZIP2, XZ})
SUPPORTED = (
    "PDF, DOCX, XLSX, PPTX, ODT, EPUB, RTF, HTML, Markdown, reStructuredText, CSV, TSV, JSON, Jupyter notebooks, "
    "e-mail (.eml, .mbox), man pages, source code, text in any encoding, and ZIP or TAR archives of these"
)

_IMAGE_ADVICE = "save or print it as PDF and upload that: scanned pages are read where the service has OCR"

# Common unsupported formats: their first bytes, and what to do instead.
_FOREIGN = (
    (b"\x89PNG", "a PNG image", _IMAGE_ADVICE),
    (b"\xff\xd8\xff", "a JPEG image", _IMAGE_ADVICE),
    (b"GIF8", "a GIF image", _IMAGE_ADVICE),
    (b"II*\x00", "a TIFF image", _IMAGE_ADVICE),
    (b"MM\x00*", "a TIFF image", _IMAGE_ADVICE),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and upload the files"),
    (b"Rar!", "a RAR archive", "unpack it and upload the files"),
    (b"%!PS", "a PostScript file", "convert it to PDF"),
    (b"\x7fELF", "a program", "upload its documentation"),
    (b"SQLite format 3\x00", "an SQLite database", "export it as CSV"),
)
_PACKED = ((b"\x1f\x8b", GZIP), (b"BZh", BZIP2), (b"\xfd7zXZ\x00", XZ))
_TAR_MAGIC = slice(257, 262)
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_ZIP_MEMBER = re.compile(rb"PK\x03\x04(?=.{26}([!-~]{1,200}))", re.S)
_ZIP_MIMETYPE = re.compile(
    rb"PK\x03\x04.{26}mimetype.{0,64}?(application/(?:epub\+zip|vnd\.oasis\.opendocument\.[a-z-]+))", re.S
)
_OFFICE_FOLDERS = {b"word/": DOCX, b"xl/": XLSX, b"ppt/": PPTX}
_OFFICE_FIRST = (b"[Content_Types].xml", b"_rels/", b"docProps/", b"customXml/", *_OFFICE_FOLDERS)
_ZIP_BY_SUFFIX = {".docx": DOCX, ".xlsx": XLSX, ".pptx": PPTX, ".odt": ODT, ".epub": EPUB}
_HTML_START = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.I | re.S)
_MAIL_HEADERS = re.compile(r"(?:(?:[!-9;-~]{1,76}:[^\n]*|[ \t][^\n]*|>?From [^\n]*)\r?\n)+(?=\r?\n|\Z)")
_MAIL_SENDER = re.compile(r"^(?:From|Sender|Return-Path):", re.I | re.M)
_MAIL_TRACE = re.compile(r"^(?:Received|Message-ID|MIME-Version|Date):", re.I | re.M)
_CELLS = re.compile(r'"(?:cells|worksheets)"\s*:\s*\[')
_CELL = re.compile(r'"cell_type"\s*:\s*"(?:code|markdown|raw|heading)"')
_NBFORMAT = re.compile(r'"nbformat(_minor)?"\s*:\s*\d')
_MAN = (re.compile(r"^[.'][ \t]*(?:TH|Dd)[ \t]", re.M), re.compile(r"^[.'][ \t]*S[Hh]\b", re.M))
_HTML_TAG = re.compile(r"<(?:p|div|h[1-6]|table|ul|ol|span|a|br|article|section)\b[^>]*>", re.I)


class UnsupportedMediaType(ValueError):
    """No parser supports this content; the message says what it seems to be and what is supported."""


class EmptyFile(ValueError):
    """The upload has no bytes."""


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
    if head.startswith(b"{\\rtf"):
        return RTF
    if head.startswith(_OLE):
        raise _unsupported(*_describe_ole(head))
    for magic, media_type in _PACKED:
        if head.startswith(magic):
            return media_type
    if head[_TAR_MAGIC] == b"ustar":
        return TAR
    for magic, what, instead in _FOREIGN:
        if head.startswith(magic):
            raise _unsupported(what, instead)
    try:
        text = decode_text(head[:SNIFF_BYTES], truncated=len(head) >= SNIFF_BYTES)
    except UndecodableText as error:
        raise _unsupported(f"binary data ({error})", "if it is meant to be text, save it as UTF-8") from error
    return _sniff_text(text, suffix)


def _sniff_zip(head: bytes, suffix: str) -> str:
    """Detect documents by the member names in the local headers of the zip; OpenDocument and EPUB declare their type in
    an uncompressed first member."""
    declared = _ZIP_MIMETYPE.match(head)
    if declared:
        kind = declared[1].decode("ascii")
        if kind in {ODT, EPUB}:
            return kind
        raise _unsupported("an OpenDocument file other than a text", "save it as XLSX, PPTX or PDF")
    names = _ZIP_MEMBER.findall(head)
    if suffix not in _ZIP_BY_SUFFIX and not (names and names[0].startswith(_OFFICE_FIRST)):
        return ZIP  # later names may be those of an embedded document
    for name in names:
        if name.startswith(b"xl/workbook.bin"):
            raise _unsupported("a binary Excel workbook", "save it as XLSX")
        for folder, media_type in _OFFICE_FOLDERS.items():
            if name.startswith(folder):
                return media_type
    if suffix in _ZIP_BY_SUFFIX:
        return _ZIP_BY_SUFFIX[suffix]
    return ZIP


def _describe_ole(head: bytes) -> tuple[str, str]:
    if "EncryptedPackage".encode("utf-16-le") in head:
        return "an Office file protected by a password", "remove the password and save it again"
    return "an Office file of the format before 2007", "save it as DOCX or PDF"


def _sniff_text(text: str, suffix: str) -> str:
    if _HTML_START.match(text[:4096]):
        return HTML
    if suffix in {".html", ".htm", ".xhtml"} and _HTML_TAG.search(text):
        return HTML
    if text.lstrip().startswith("{") and _is_notebook(text):
        return NOTEBOOK
    if text.lstrip()[:1] in (".", "'") and all(macro.search(text) for macro in _MAN):
        return MAN
    if _is_mail(text, suffix):
        return MBOX if text.startswith("From ") else EML
    return _TEXT_BY_SUFFIX.get(suffix, TEXT)


def _is_notebook(text: str) -> bool:
    """Whether it is an object with cells or, if they come too late to be seen, with both format numbers."""
    formats = {found[1] for found in _NBFORMAT.finditer(text)}
    return len(formats) == 2 or bool(_CELLS.search(text) and (formats or _CELL.search(text)))


def _is_mail(text: str, suffix: str) -> bool:
    """Whether it begins with headers that include a sender and a mail program's trace; for .eml either is enough."""
    headers = _MAIL_HEADERS.match(text)
    if headers is None:
        return False
    found = [pattern.search(headers[0]) is not None for pattern in (_MAIL_SENDER, _MAIL_TRACE)]
    return any(found) if suffix == ".eml" else all(found) and suffix not in _TEXT_BY_SUFFIX


def _unsupported(what: str, instead: str) -> UnsupportedMediaType:
    return UnsupportedMediaType(f"this looks like {what}, which cannot be read; {instead}. Supported: {SUPPORTED}")

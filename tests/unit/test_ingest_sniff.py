import io
import zipfile

import docx
import pytest

from ingest.sniff import (
    DOCX,
    GZIP,
    HTML,
    MARKDOWN,
    MBOX,
    PDF,
    PPTX,
    TEXT,
    XLSX,
    ZIP,
    EmptyFile,
    UnsupportedMediaType,
    sniff_media_type,
)


def make_zip(*names: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return packed.getvalue()


def make_docx() -> bytes:
    packed = io.BytesIO()
    docx.Document().save(packed)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("head", "name", "expected"),
    [
        (b"%PDF-1.7\n", "x.pdf", PDF),
        (b"%PDF-1.7\n", "holiday.txt", PDF),
        (b"\x00junk before it\n%PDF-1.4", "x", PDF),
        (make_docx(), "x.bin", DOCX),
        (b"PK\x03\x04 and then garbage", "x.docx", DOCX),
        (make_zip("[Content_Types].xml", "xl/workbook.xml"), "x.docx", XLSX),
        (make_zip("[Content_Types].xml", "ppt/presentation.xml"), "x.zip", PPTX),
        (b"PK\x03\x04 and then garbage", "x.xlsx", XLSX),
        (b"<!DOCTYPE html><p>x", "x.txt", HTML),
        (b"\xef\xbb\xbf <!-- note -->\n<HTML lang=en>", "x", HTML),
        (b"<?xml version='1.0'?><html xmlns='http://www.w3.org/1999/xhtml'>", "x", HTML),
        (b"<p>a fragment</p>", "x.htm", HTML),
        (b"<p>a fragment</p>", "x.txt", TEXT),
        ("<html><p>sixteen".encode("utf-16"), "x", HTML),
        (b"# Title\n", "x.md", MARKDOWN),
        (b"# Title\n", "x.txt", TEXT),
        (b"Title\n=====\n", "x.rst", "text/x-rst"),
        (make_zip("a.txt"), "x", ZIP),
        (make_zip("a.txt", "word/document.xml"), "x.zip", ZIP),
        (b"\x1f\x8b\x08", "x.docx", GZIP),
        (b"From a@b Mon Jan 1\nFrom: a@b\nDate: x\n\ntext", "x", MBOX),
        (b"a,b\n1,2\n", "x.CSV", "text/csv"),
        (b'{"a": 1}', "x.json", "application/json"),
        (b"def f(): ...", "x.py", "text/x-source"),
        (b"plain words", "report.pdf", TEXT),
        (b"plain words", "report.docx", TEXT),
        ("Grüße".encode("cp1252"), "x.txt", TEXT),
        ("Grüße".encode("utf-16-le"), "x.txt", TEXT),
        ("half a character: é".encode()[:-1] + b"\xc3\xa9" * 40_000, "x.txt", TEXT),
        (b"\x1b[1mbold\x1b[0m in a terminal\x0c", "x.log", TEXT),
    ],
)
def test_content_decides_and_the_name_breaks_ties(head, name, expected):
    assert sniff_media_type(head, name) == expected


@pytest.mark.parametrize(
    ("head", "name", "says"),
    [
        (b"\x89PNG\r\n\x1a\n", "scan.pdf", "PNG image.*save or print it as PDF.*OCR"),
        (b"\xff\xd8\xff\xe0", "x", "JPEG"),
        (b"7z\xbc\xaf\x27\x1c", "x.zip", "7z archive.*unpack"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 99, "x.doc", "before 2007.*DOCX"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + "EncryptedPackage".encode("utf-16-le"), "x.docx", "password"),
        (b"text with a NUL \x00 in it", "x.txt", "NUL byte at position 16.*UTF-8"),
        (bytes(range(1, 256)) * 4, "x.txt", "control characters"),
        (b"\xff\xfeh\x00\x00\xd8x\x00", "x.txt", "not valid utf-16-le"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_to_do(head, name, says):
    with pytest.raises(UnsupportedMediaType, match=f"{says}.*Supported: PDF, DOCX"):
        sniff_media_type(head, name)


def test_an_empty_file_is_its_own_error():
    with pytest.raises(EmptyFile, match="0 bytes"):
        sniff_media_type(b"", "x.pdf")


def test_a_hostile_name_changes_nothing():
    assert sniff_media_type(b"words", "../" * 3000 + "\x00.md") == MARKDOWN

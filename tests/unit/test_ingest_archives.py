"""Archives of documents: what is in them is read, and what is made to do harm is held."""

import bz2
import errno
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import docx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.parse import ParseError, parse_bytes
from ingest.parse.cage import parse_in_child
from ingest.parse.child import ParseLimits
from ingest.parse.unpack import MAX_FILES, Budget, read_members
from ingest.sniff import BZIP2, GZIP, SNIFF_BYTES, TAR, XZ, ZIP, sniff_media_type
from retrieval.types import ParsedDocument

HANDBOOK = Path(__file__).parents[2] / "samples" / "documents" / "fr12-handbook.pdf"
PNG = b"\x89PNG\r\n\x1a\n"


def make_zip(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return packed.getvalue()


def make_tar(members: dict[str, bytes], mode: str = "w", extra: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return packed.getvalue()


def make_docx(text: str) -> bytes:
    packed, document = io.BytesIO(), docx.Document()
    document.add_heading("Inside", 1)
    document.add_paragraph(text)
    document.save(packed)
    return packed.getvalue()


def parse(tmp_path: Path, data: bytes, name: str = "x", limits: ParseLimits | None = None) -> ParsedDocument:
    (tmp_path / "x").write_bytes(data)
    return parse_in_child(tmp_path / "x", sniff_media_type(data[:SNIFF_BYTES], name), limits)


def error_of(tmp_path: Path, data: bytes, limits: ParseLimits | None = None) -> ParseError:
    with pytest.raises(ParseError) as caught:
        parse(tmp_path, data, limits=limits)
    return caught.value


MEMBERS = {
    "notes/a.md": b"# Alpha\n\n## Beta\n\ntext",
    "b.csv": b"city,fee\nOslo,5\n",
    "sub/c.docx": make_docx("words"),
}
TEXT = (
    "notes/a.md\n\n# Alpha\n\n## Beta\n\ntext\n\nb.csv\n\ncity | fee\ncity: Oslo | fee: 5\n\n"
    "sub/c.docx\n\nInside\n\nwords"
)


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (make_zip(MEMBERS), ZIP),
        (make_zip(MEMBERS, zipfile.ZIP_LZMA), ZIP),
        (make_zip(MEMBERS, zipfile.ZIP_STORED), ZIP),
        (make_tar(MEMBERS), TAR),
        (make_tar(MEMBERS, "w:gz"), GZIP),
        (make_tar(MEMBERS, "w:bz2"), BZIP2),
        (make_tar(MEMBERS, "w:xz"), XZ),
    ],
)
def test_each_document_is_a_section_under_its_path(tmp_path, data, media_type):
    parsed = parse(tmp_path, data)
    assert (parsed.text, parsed.media_type, parsed.unread, parsed.title) == (TEXT, media_type, None, None)
    assert [(h.level, h.title, parsed.text[h.char_start :].split("\n")[0]) for h in parsed.headings] == [
        (1, "notes/a.md", "notes/a.md"),
        (2, "Alpha", "# Alpha"),
        (3, "Beta", "## Beta"),
        (1, "b.csv", "b.csv"),
        (1, "sub/c.docx", "sub/c.docx"),
        (3, "Inside", "Inside"),
    ]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_single_packed_file_is_read(tmp_path, pack):
    assert parse(tmp_path, pack(b"plain words")).text == "plain words"


def test_what_cannot_be_read_is_named_and_the_rest_is_there(tmp_path):
    inner = make_zip({"deep.txt": b"deep words", "bad.pdf": b"%PDF-1.7 nothing"})
    parsed = parse(
        tmp_path,
        make_zip(
            {
                "photo.png": PNG,
                "inner.zip": inner,
                "empty.txt": b"",
                "__MACOSX/x": b"y",
                "manual.pdf": HANDBOOK.read_bytes(),
            }
        ),
    )
    assert parsed.text.startswith("inner.zip/deep.txt\n\ndeep words\n\nmanual.pdf\n\n")
    assert len(parsed.text) > 5000
    assert parsed.unread.startswith("3 of 5 files were not read or not wholly: photo.png (this looks like a PNG image")
    assert "inner.zip/bad.pdf (the PDF is damaged" in parsed.unread and "empty.txt (the file is empty" in parsed.unread


def test_broken_archives_inside_do_not_hide_the_others(tmp_path):
    broken = make_zip({"a.txt": os.urandom(999)})[:500]
    members = {f"{i}.zip": broken for i in range(6)} | {"good.zip": make_zip({"a.txt": b"words"})}
    parsed = parse(tmp_path, make_zip(members))
    assert parsed.text == "good.zip/a.txt\n\nwords"
    assert "0.zip (the archive is damaged" in parsed.unread and parsed.unread.endswith("; and 1 more")


def test_nothing_readable_is_an_error_that_says_why(tmp_path):
    assert "photo.png (this looks like a PNG" in str(error := error_of(tmp_path, make_zip({"photo.png": PNG})))
    assert error.code == "empty_archive"
    assert error_of(tmp_path, make_zip({})).code == "empty_archive"
    assert error_of(tmp_path, make_zip({"a.txt": os.urandom(9999)})[:5000]).code == "broken_archive"
    assert error_of(tmp_path, gzip.compress(os.urandom(9999))[:5000]).code == "broken_archive"


def test_links_and_devices_are_not_followed_and_paths_lead_nowhere(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("hunter2")
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(link, str(secret))
        archive.writestr("../../../escape.txt", "escaped")
        archive.writestr("/etc/absolute.txt", "absolute")
    parsed = parse(tmp_path, packed.getvalue())
    assert parsed.text == "escape.txt\n\nescaped\n\netc/absolute.txt\n\nabsolute"
    assert parsed.unread == "1 of 3 files were not read or not wholly: link.txt (a link, which is not followed)"
    extra = []
    for name, kind in (("s", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE), ("d", tarfile.CHRTYPE), ("f", tarfile.FIFOTYPE)):
        extra.append(tarfile.TarInfo(name))
        extra[-1].type, extra[-1].linkname = kind, str(secret)
    parsed = parse(tmp_path, make_tar({"/abs/../a.txt": b"fine"}, extra=tuple(extra)))
    assert parsed.text == "abs/a.txt\n\nfine"
    assert "s (a link" in parsed.unread and "h (a link" in parsed.unread and "f (not a plain file)" in parsed.unread
    assert "hunter2" not in parsed.text and not (tmp_path.parent / "escape.txt").exists()


def bomb(size: int) -> bytes:
    return b"\0" * size


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_zip({"a.txt": bomb(100 << 20)}),
        lambda: make_zip({f"{i}.txt": bomb(20 << 20) for i in range(5)}),
        lambda: make_zip({"in.zip": make_zip({"in.zip": make_zip({"a.txt": bomb(100 << 20)})})}),
        lambda: make_tar({"a.txt": bomb(100 << 20)}, "w:gz"),
        lambda: make_tar({"a.txt": bomb(100 << 20)}, "w:xz"),
        lambda: gzip.compress(bomb(100 << 20)),
        lambda: bz2.compress(bomb(100 << 20)),
        lambda: make_zip({f"{i}": b"" for i in range(MAX_FILES + 1)}),
    ],
)
def test_bombs_are_held(tmp_path, make):
    assert error_of(tmp_path, make(), ParseLimits(memory_bytes=700 << 20)).code == "zip_bomb"


def test_archives_within_archives_end_somewhere(tmp_path):
    data = make_zip({"a.txt": b"words"})
    for _ in range(9):
        data = make_zip({"in.zip": data, "b.txt": b"b"})
    parsed = parse(tmp_path, data)
    assert parsed.text.count("b.txt") == 4 and "a.txt" not in parsed.text
    assert "more than 4 archives within each other" in parsed.unread


def test_a_directory_that_lies_about_sizes_gains_nothing(tmp_path):
    data = bytearray(make_zip({"a.txt": b"words " * 100_000, "b.txt": b"fine"}))
    entry = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, entry + 24, 10)  # says that ten bytes are all
    parsed = parse(tmp_path, bytes(data))
    assert parsed.text == "b.txt\n\nfine" and "a.txt (damaged: " in parsed.unread


def test_a_protected_member_is_named(tmp_path):
    data = bytearray(make_zip({"a.txt": b"words", "b.txt": b"fine"}))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    assert "a.txt (protected by a password)" in parse(tmp_path, bytes(data)).unread


def test_members_that_there_is_no_memory_to_read_are_named(monkeypatch):
    def refuse():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(ParseError, match=r"a\.txt \(there is too little memory") as error:
        parse_bytes(make_zip({"a.txt": b"words"}), ZIP)
    assert error.value.code == "empty_archive"


def test_a_member_that_crashes_its_parser_costs_only_itself(tmp_path):
    deep = b"<div>" * 200_000 + b"x"
    parsed = parse(tmp_path, make_zip({"deep.html": b"<html>" + deep, "b.txt": b"fine"}), limits=ParseLimits())
    assert "b.txt\n\nfine" in parsed.text


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(0, 1 << 16), flips=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8)
)
@pytest.mark.parametrize(
    ("packed", "media_type"), [(make_zip(MEMBERS), ZIP), (make_tar(MEMBERS), TAR), (make_tar(MEMBERS, "w:gz"), GZIP)]
)
def test_damage_gives_members_or_one_error(packed, media_type, length, flips):
    damaged = bytearray(packed[:length])
    for position, value in flips:
        if damaged:
            damaged[position % len(damaged)] = value
    try:
        for name, content in read_members(bytes(damaged), media_type, "", Budget(len(packed))):
            assert (name or media_type == GZIP) and isinstance(content, bytes | str)
    except ParseError as error:
        assert error.code in {"broken_archive", "zip_bomb"}


def test_many_members_do_not_pile_up_in_memory(tmp_path):
    blob = zlib.compress(os.urandom(1 << 20), 0)
    data = make_tar({f"{i}.bin": blob for i in range(200)} | {"a.txt": b"words"})
    assert parse(tmp_path, data, limits=ParseLimits(memory_bytes=900 << 20)).text == "a.txt\n\nwords"

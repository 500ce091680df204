import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from ingest.files import MAX_FILENAME_CHARS, FileStore, FileTooLarge, StorageFull, StorageUnwritable, clean_filename


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


def test_saves_under_the_digest_of_the_content(files):
    digest, nbytes = files.save_stream([b"ab", b"", b"c"], max_bytes=3)
    assert (digest, nbytes) == (hashlib.sha256(b"abc").hexdigest(), 3)
    with files.open(digest) as file:
        assert file.read() == b"abc"
    assert [entry.name for entry in files.directory.iterdir()] == [digest]


def test_same_bytes_are_one_file_and_delete_is_repeatable(files):
    digest, _ = files.save_stream([b"x"], 10)
    assert files.save_stream([b"x"], 10)[0] == digest
    files.delete(digest)
    files.delete(digest)
    assert list(files.directory.iterdir()) == []


def test_stops_reading_at_the_limit_and_keeps_nothing(files):
    taken = []

    def pieces():
        for number in range(100):
            taken.append(number)
            yield b"1234"

    with pytest.raises(FileTooLarge, match="limit of 10 bytes"):
        files.save_stream(pieces(), max_bytes=10)
    assert len(taken) == 3
    assert list(files.directory.iterdir()) == []


def test_a_broken_upload_keeps_nothing(files):
    def pieces():
        yield b"half"
        raise ConnectionError("client went away")

    with pytest.raises(ConnectionError):
        files.save_stream(pieces(), 100)
    assert list(files.directory.iterdir()) == []


def test_full_disk_is_an_error_that_says_so(files):
    def pieces():
        yield b"half"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageFull, match="free"):
        files.save_stream(pieces(), 100)
    assert list(files.directory.iterdir()) == []


def test_a_disk_that_takes_no_writes_is_told_as_such(files):
    files.try_writing()
    assert list(files.directory.iterdir()) == []
    files.directory.rmdir()
    for write in (files.try_writing, lambda: files.save_stream([b"x"], 100)):
        with pytest.raises(StorageUnwritable, match="make it writable"):
            write()


def test_opening_removes_what_a_crash_left(files):
    (files.directory / "upload-abc").write_bytes(b"torn")
    digest, _ = files.save_stream([b"whole"], 100)
    assert [entry.name for entry in FileStore(files.directory).directory.iterdir()] == [digest]


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 63, "A" * 64, "0" * 64 + "/x", ""])
def test_only_digests_become_paths(files, name):
    with pytest.raises(ValueError, match="SHA-256"):
        files.path(name)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("report.pdf", "report.pdf"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\plan.docx", "plan.docx"),
        ("a\x00b\nc\u202etxt.md", "abctxt.md"),
        ("bad\udcffname.txt", "bad?name.txt"),
        ("..", "unnamed"),
        ("", "unnamed"),
        ("e\u0301.txt", "\u00e9.txt"),
    ],
)
def test_names_are_for_showing_only(given, shown):
    assert clean_filename(given) == shown


def test_a_name_of_ten_thousand_characters_is_cut_and_keeps_its_suffix():
    name = clean_filename("n" * 10_000 + ".pdf")
    assert len(name) == MAX_FILENAME_CHARS
    assert name.endswith("n.pdf")
    assert len(clean_filename("n" * 10_000)) == MAX_FILENAME_CHARS


def test_a_held_file_stays_until_every_hold_has_ended(files):
    digest, _ = files.save_stream([b"x"], 10, hold=True)
    files.save_stream([b"x"], 10, hold=True)
    files.release(digest)
    files.delete(digest)
    assert files.path(digest).exists()
    files.release(digest)
    files.delete(digest)
    assert not files.path(digest).exists()


def test_a_save_that_fails_at_last_holds_nothing(files, monkeypatch):
    digest, _ = files.save_stream([b"x"], 10)
    sync = os.fsync

    def sync_files_alone(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(handle)

    monkeypatch.setattr(os, "fsync", sync_files_alone)
    with pytest.raises(StorageUnwritable):
        files.save_stream([b"x"], 10, hold=True)
    files.delete(digest)
    assert not files.path(digest).exists()

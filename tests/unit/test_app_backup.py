"""Backup and restore under bad conditions; what they hold is tested in test_app_cli.py."""

import gzip
import os
import resource
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from retrieval_kit import add

from app.backup import BackupFailed, restore_backup, write_backup
from app.datadir import DataDir, DataDirUnusable
from ingest.files import FileStore
from retrieval.store import DocumentStore

KILLED_AT = ["app.backup._unpack", "app.backup._verify", "app.backup._sync", "pathlib.Path.replace"]


def make_data(directory: Path, *texts: str) -> None:
    store, files = DocumentStore(directory / "rag.sqlite3"), FileStore(directory / "files")
    for text in texts:
        files.save_stream([text.encode()], 1 << 20)
        add(store, text)
    store.close()
    (directory / "lock").touch()  # every service leaves it


def held(directory: Path) -> set[str]:
    store = DocumentStore(directory / "rag.sqlite3")
    try:
        assert store.check() == []
        documents = store.list_documents()
        assert all((directory / "files" / document.sha256).is_file() for document in documents)
        return {store.get_text(document.id) for document in documents}
    finally:
        store.close()


@pytest.fixture
def backup(tmp_path) -> Path:
    make_data(tmp_path / "data", "an old owl", "an old fox")
    write_backup(tmp_path / "data", tmp_path / "backup.tar")
    return tmp_path / "backup.tar"


def test_a_backup_is_its_owners_alone(backup):
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600


def back_up_in_another_process(data: Path, target: Path, at_verify: str) -> subprocess.Popen:
    code = (
        "import app.backup, os, pathlib; verify = app.backup._verify;"
        f"app.backup._verify = lambda *given: ({at_verify}, verify(*given))[1];"
        f"app.backup.write_backup(pathlib.Path({str(data)!r}), pathlib.Path({str(target)!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=-1, stdout=-1)


def test_what_a_killed_backup_leaves_goes_with_the_next(backup, tmp_path):
    killed = back_up_in_another_process(
        tmp_path / "data", tmp_path / "1.tar", f"os.kill(os.getpid(), {signal.SIGKILL:d})"
    )
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "1.tar").exists()
    assert list(tmp_path.glob(".backup-*"))
    write_backup(tmp_path / "data", tmp_path / "2.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.tar", "backup.tar", "data"]


def test_two_backups_at_once_leave_each_other_alone(backup, tmp_path):
    other = back_up_in_another_process(tmp_path / "data", tmp_path / "1.tar", "(print('at it', flush=True), input())")
    assert other.stdout.readline() == b"at it\n"
    write_backup(tmp_path / "data", tmp_path / "2.tar")
    other.communicate(b"\n")
    assert other.returncode == 0
    for name in ("1", "2"):
        restore_backup(tmp_path / f"{name}.tar", tmp_path / name)
        assert held(tmp_path / name) == {"an old owl", "an old fox"}


@pytest.mark.parametrize("share", [0.1, 1.01])
def test_a_backup_that_finds_no_room_says_so_and_leaves_nothing(backup, tmp_path, share):
    """No file may be longer than a share of the database: it ends its copy, or the backup."""
    max_bytes = int(share * (tmp_path / "data" / "rag.sqlite3").stat().st_size)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
        with pytest.raises(BackupFailed, match=r"2\.tar( cannot be written)?: "):
            write_backup(tmp_path / "data", tmp_path / "2.tar")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.tar", "data"]


def test_a_database_that_cannot_be_backed_up_is_named(tmp_path):
    make_data(tmp_path / "data", "an owl")
    database = tmp_path / "data" / "rag.sqlite3"
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(BackupFailed, match=r"in the backup cannot be used: schema 99 is newer .* upgrade Jamba RAG"):
        write_backup(tmp_path / "data", tmp_path / "a.tar")
    database.write_bytes(b"no database" * 99)
    with pytest.raises(BackupFailed, match=rf"^{database} cannot be copied .*: file is not a database"):
        write_backup(tmp_path / "data", tmp_path / "a.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_damaged_backup_is_not_restored(backup, tmp_path):
    content = backup.read_bytes()
    for name, damaged in {
        "cut": content[: len(content) // 2],
        "packed and cut": gzip.compress(content)[:2000],
        "text": b"no tar at all",
        "flipped": content.replace(b"an old owl", b"an old OWL"),
    }.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(BackupFailed, match=f"{name}[^\n]*$"):
            restore_backup(tmp_path / name, tmp_path / f"new-{name}")
        assert not (tmp_path / f"new-{name}" / "rag.sqlite3").exists()
        DataDir(tmp_path / f"new-{name}").close()  # a service can start there, without what was unpacked


def test_a_damaged_backup_leaves_the_originals_of_a_lost_database(backup, tmp_path):
    (tmp_path / "data" / "rag.sqlite3").unlink()
    before = sorted((tmp_path / "data" / "files").iterdir())
    (tmp_path / "cut").write_bytes(backup.read_bytes()[: backup.stat().st_size // 2])
    with pytest.raises(BackupFailed):
        restore_backup(tmp_path / "cut", tmp_path / "data")
    assert before and sorted((tmp_path / "data" / "files").iterdir()) == before
    assert restore_backup(backup, tmp_path / "data") == 2


def test_the_log_of_a_lost_database_does_not_get_into_a_restored_one(backup, tmp_path):
    """A killed process leaves SQLite's log beside the database; whoever removes the one may leave the other."""
    lost = tmp_path / "lost"
    make_data(lost, "a lost elk")
    busy = sqlite3.connect(lost / "rag.sqlite3")  # so that closing the store leaves the log
    busy.execute("SELECT count(*) FROM documents").fetchall()
    make_data(lost, *(f"a lost bee {number}" for number in range(9)))
    shutil.copytree(lost, tmp_path / "killed")
    busy.close()
    (tmp_path / "killed" / "rag.sqlite3").unlink()
    assert (tmp_path / "killed" / "rag.sqlite3-wal").stat().st_size > 0
    restore_backup(backup, tmp_path / "killed")
    assert held(tmp_path / "killed") == {"an old owl", "an old fox"}


@pytest.mark.parametrize("place", KILLED_AT)
def test_after_a_kill_while_restoring_nothing_starts_until_it_is_done_again(backup, tmp_path, place):
    target = tmp_path / "target"
    module, _, name = place.rpartition(".")
    owner = "pathlib.Path" if module == "pathlib.Path" else "app.backup"
    code = (
        f"import app.backup, os, pathlib; {owner}.{name} = lambda *_: os.kill(os.getpid(), {signal.SIGKILL:d});"
        f"app.backup.restore_backup(pathlib.Path({str(backup)!r}), pathlib.Path({str(target)!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    with pytest.raises(DataDirUnusable, match="run `jamba-rag restore` again"):
        DataDir(target)
    restore_backup(backup, target)
    DataDir(target).close()
    assert held(target) == {"an old owl", "an old fox"}
    assert not (target / "restoring").exists()


@pytest.mark.parametrize("name", ["rag.sqlite3", "rag.sqlite3-wal", "lock", "admin.key", "files/new", "faiss/a"])
def test_a_backup_does_not_take_the_place_of_what_it_backs_up(tmp_path, name):
    data = tmp_path / "data"
    make_data(data, "an old owl")
    target = data / name
    target.parent.mkdir(exist_ok=True)
    (tmp_path / "link").symlink_to(target)
    for path in (target, tmp_path / "link"):
        with pytest.raises(BackupFailed, match="keeps its own data"):
            write_backup(data, path)
    assert held(data) == {"an old owl"}
    assert write_backup(data, data / "backup.tar") == 1


def test_a_device_or_pipe_is_not_replaced_by_a_backup(tmp_path):
    make_data(tmp_path / "data", "an old owl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BackupFailed, match="no file, but a device or a pipe"):
        write_backup(tmp_path / "data", tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_backup_to_a_link_is_where_the_link_leads(backup, tmp_path):
    (tmp_path / "latest").symlink_to(backup)
    backup.write_text("an earlier one")
    write_backup(tmp_path / "data", tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert restore_backup(backup, tmp_path / "restored") == 2


@pytest.mark.parametrize("name", ["files/upload-1.txt", "words/list.txt", "faiss/notes.txt"])
def test_a_folder_that_is_for_something_else_is_no_data_directory(tmp_path, name):
    """Its files would make room for the service's own."""
    other = tmp_path / name
    other.parent.mkdir()
    other.write_text("precious")
    with pytest.raises(DataDirUnusable, match=f"holds no database, but {other.parent.name}, "):
        DataDir(tmp_path)
    with pytest.raises(DataDirUnusable, match=f"holds no database, but {other.parent.name}, "):
        DataDir(tmp_path, restoring=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [other]
    DocumentStore(tmp_path / "rag.sqlite3").close()
    DataDir(tmp_path).close()

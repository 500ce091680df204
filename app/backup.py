"""Backup and restore of a data directory: one tar file of the database and the originals.

The index and the prefix states are left out: both are derived. Safe while a service writes: the database is copied as
of one moment, and originals are never changed, only added and removed.
"""

import io
import os
import shutil
import sqlite3
import tarfile
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path

from app.datadir import DataDir
from ingest.files import FileStore
from retrieval.store import DocumentStore

_DATABASE = "rag.sqlite3"
_FILES = "files"


class BackupFailed(RuntimeError):
    """The backup could not be written, or isn't one."""


def write_backup(data_dir: Path, target: Path) -> int:
    """Write `target`; returns the number of originals in it. An interrupted backup leaves no file."""
    database = data_dir / _DATABASE
    if not database.is_file():
        raise BackupFailed(f"{data_dir} holds no {_DATABASE}: there is nothing to back up")
    unfinished = target.with_name(target.name + ".partial")
    try:
        scratch_dir = tempfile.TemporaryDirectory(dir=target.parent, prefix=".backup-")
        with scratch_dir as scratch, tarfile.open(unfinished, "w") as tar:
            copy = Path(scratch) / _DATABASE
            with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(copy)) as destination:
                source.backup(destination)
            tar.add(copy, _DATABASE)
            count = sum(_add_original(tar, path) for path in sorted((data_dir / _FILES).glob("*")))
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def _add_original(tar: tarfile.TarFile, path: Path) -> bool:
    """Add one original; one that was deleted meanwhile isn't missed."""
    if len(path.name) != 64:
        return False
    try:
        content = path.open("rb")
    except FileNotFoundError:
        return False
    with content:
        info = tar.gettarinfo(arcname=f"{_FILES}/{path.name}", fileobj=content)
        tar.addfile(info, content)
    return True


def restore_backup(source: Path, data_dir: Path) -> int:
    """Unpack into a data directory without a database; returns the number of originals. Every original is verified.

    Raises BackupFailed when there is a database already, or the file is no complete backup; DataDirInUse.
    """
    with DataDir(data_dir) as opened:
        if opened.database.exists():
            raise BackupFailed(f"{data_dir} holds a database already; restore into an empty directory")
        with tempfile.TemporaryDirectory(dir=data_dir, prefix="restore-") as scratch:
            files = FileStore(Path(scratch) / _FILES)
            count = _unpack(source, Path(scratch) / _DATABASE, files)
            _verify(Path(scratch) / _DATABASE)
            shutil.copytree(files.directory, opened.files, dirs_exist_ok=True)
            (Path(scratch) / _DATABASE).replace(opened.database)
    return count


def _unpack(source: Path, database: Path, files: FileStore) -> int:
    """Only the names of a backup are read; nothing in it decides where something is written."""
    count = 0
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                content = tar.extractfile(member) or io.BytesIO()
                if member.name == _DATABASE:
                    with database.open("wb") as file:
                        shutil.copyfileobj(content, file)
                elif member.name.startswith(f"{_FILES}/"):
                    digest, _ = files.save_stream(iter(partial(content.read, 1 << 20), b""), member.size + 1)
                    if digest != member.name.removeprefix(f"{_FILES}/"):
                        raise BackupFailed(f"{source}: original {member.name} is damaged")
                    count += 1
    except tarfile.TarError as error:
        raise BackupFailed(f"{source} is not a complete backup: {error}") from error
    if not database.exists():
        raise BackupFailed(f"{source} is not a backup: it has no {_DATABASE}")
    return count


def _verify(database: Path) -> None:
    store = DocumentStore(database)
    try:
        problems = store.check()
    finally:
        store.close()
    if problems:
        raise BackupFailed(f"the database in the backup is damaged: {problems[0]}")

"""Backup and restore of a data directory: one tar file with the database and the originals.

Index and prefix states are left out, because they are derived. Safe while a service is running: the database copy is
consistent, and the backup has all originals that it refers to, each verified by its hash.
"""

import fcntl
import hashlib
import io
import logging
import lzma
import os
import shutil
import sqlite3
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from app.datadir import DataDir, is_own
from ingest.files import FileStore
from retrieval.store import DocumentStore, StoreUnusable

log = logging.getLogger(__name__)

_DATABASE = "rag.sqlite3"
_TRIES = 5  # attempts to copy a database whose originals all still exist
_FILES = "files"
_SCRATCH = ".backup-"  # prefix of the temporary directory beside the backup
_UNFINISHED = "backup.tar"


class BackupFailed(RuntimeError):
    """The backup could not be written, or is not valid."""


def write_backup(data_dir: Path, target: Path) -> int:
    """Write `target` (mode 600); returns the number of originals in it. An interrupted backup leaves no files; those
    of a killed process are removed by the next backup into that folder.

    Raises BackupFailed, also if the database or an original is damaged.
    """
    database, target = data_dir / _DATABASE, target.resolve()
    if not database.is_file():
        raise BackupFailed(f"{data_dir} holds no {_DATABASE}: name the data directory with --data-dir")
    if not target.parent.is_dir():
        raise BackupFailed(f"{target.parent} is no folder; make it, or write the backup somewhere else")
    if target.is_dir():
        raise BackupFailed(f"{target} is a folder; name the file that the backup is to be")
    if target.exists() and not target.is_file():
        raise BackupFailed(f"{target} is no file, but a device or a pipe; name the file that the backup is to be")
    if is_own(target, data_dir.resolve()):
        raise BackupFailed(f"{target} is where the service keeps its own data; write the backup somewhere else")
    try:
        for leftover in filter(_is_abandoned, target.parent.glob(f"{_SCRATCH}*")):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=_SCRATCH) as scratch:
            return _write(data_dir, target, Path(scratch))
    except OSError as error:
        raise BackupFailed(f"{target} cannot be written: {error}") from error
    except sqlite3.Error as error:
        raise BackupFailed(f"{database} cannot be copied to {target}: {error}") from error


def _write(data_dir: Path, target: Path, scratch: Path) -> int:
    unfinished, copy = scratch / _UNFINISHED, scratch / _DATABASE
    private = os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
    with private, tarfile.open(fileobj=private, mode="w") as tar:
        _lock(private)
        count = _add_consistently(tar, data_dir, copy)
        tar.add(copy, _DATABASE)
    _sync(unfinished)
    unfinished.replace(target)
    _sync(target.parent)
    return count


def _is_abandoned(scratch: Path) -> bool:
    """Whether it was left by a killed process; a running backup holds a lock."""
    try:
        with (scratch / _UNFINISHED).open("r+b") as file:
            return _lock(file)
    except OSError:  # just created, or another user's
        return False


def _lock(file: IO[bytes]) -> bool:
    """Lock the file until it is closed. False if it is locked, or its file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _add_consistently(tar: tarfile.TarFile, data_dir: Path, copy: Path) -> int:
    """Copy the database to `copy` and add the originals that it needs; starts over if one was deleted in between.

    An original that is missing permanently, as after a disk failure, is logged and left out.
    """
    added: set[str] = set()
    missing: set[str] = set()
    for _ in range(_TRIES):
        copy.unlink(missing_ok=True)
        with closing(sqlite3.connect(data_dir / _DATABASE)) as source, closing(sqlite3.connect(copy)) as destination:
            source.backup(destination)
        before = missing
        needed = _verify(copy, {path.name for path in (data_dir / _FILES).iterdir()})
        added |= {name for name in sorted(needed - added) if _add_original(tar, data_dir / _FILES / name)}
        missing = needed - added
        if not missing or missing == before:
            break
    for name in sorted(missing):
        log.warning("the original %s is missing in %s; the backup has its text, but not the file", name, data_dir)
    return len(added)


def _add_original(tar: tarfile.TarFile, path: Path) -> bool:
    """Add an original; False if it does not exist. Raises BackupFailed if its hash does not match its name."""
    try:
        content = path.open("rb")
    except FileNotFoundError:
        return False
    with content:
        if hashlib.file_digest(content, "sha256").hexdigest() != path.name:
            raise BackupFailed(
                f"the original {path} is damaged; restore it from an older backup or delete its document"
            )
        content.seek(0)
        tar.addfile(tar.gettarinfo(arcname=f"{_FILES}/{path.name}", fileobj=content), content)
    return True


def restore_backup(source: Path, data_dir: Path) -> int:
    """Unpack into a data directory without a database; returns the number of originals. Every original is verified.

    After an interruption it can be repeated, and until then no service starts on the directory. Raises BackupFailed if
    there is a database already or the backup is incomplete; DataDirInUse.
    """
    with DataDir(data_dir, restoring=True) as opened:
        if opened.database.exists():
            raise BackupFailed(f"{data_dir} holds a database already; restore into an empty directory")
        shutil.rmtree(opened.unfinished, ignore_errors=True)
        opened.unfinished.mkdir(mode=0o700)
        try:
            database, files = opened.unfinished / _DATABASE, FileStore(opened.files)
            with _only_as_a_whole(opened.files):
                count = _unpack(source, database, files)
                _verify(database)
            _sync(database)
            for log_of_another in ("-wal", "-shm"):  # of an earlier database; SQLite would apply it to this one
                opened.database.with_name(_DATABASE + log_of_another).unlink(missing_ok=True)
            database.replace(opened.database)
            _sync(data_dir)
        finally:
            shutil.rmtree(opened.unfinished)
    return count


@contextmanager
def _only_as_a_whole(folder: Path) -> Iterator[None]:
    """If the block raises, remove the files that it added: without their database no service would start there."""
    before = set(folder.iterdir())
    try:
        yield
    except BaseException:
        for path in set(folder.iterdir()) - before:
            path.unlink()
        raise


def _sync(*paths: Path) -> None:
    """fsync files, and folders with their entries."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _unpack(source: Path, database: Path, files: FileStore) -> int:
    """Unpack known members only; paths in the archive never determine where files are written."""
    count = 0
    try:
        with tarfile.open(source) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                content = tar.extractfile(member) or io.BytesIO()
                if member.name == _DATABASE:
                    with database.open("wb") as file:
                        shutil.copyfileobj(content, file)
                elif member.name.startswith(f"{_FILES}/"):
                    digest, _ = files.save_stream(iter(partial(content.read, 1 << 20), b""), member.size + 1)
                    if digest != member.name.removeprefix(f"{_FILES}/"):
                        raise BackupFailed(f"{source}: original {member.name} is damaged")
                    count += 1
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:  # the latter if compressed later
        reason = str(error).partition("\n")[0].rstrip(":")  # tarfile lists every compression that it tried
        raise BackupFailed(f"{source} is not a complete backup: {reason}") from error
    if not database.exists():
        raise BackupFailed(f"{source} is not a backup: it has no {_DATABASE}")
    return count


def _verify(database: Path, files: Collection[str] = ()) -> set[str]:
    """The originals that a copy of a database needs: those of newest versions, and all others in use among `files`.

    Raises BackupFailed if the copy is damaged.
    """
    try:
        store = DocumentStore(database)
    except StoreUnusable as error:  # its message names the temporary copy
        raise BackupFailed(f"the database in the backup cannot be used: {error.__cause__}") from error
    try:
        if problems := store.check():
            raise BackupFailed(f"the database in the backup is damaged: {problems[0]}")
        return {name for name in files if store.file_in_use(name)} | set(_newest_originals(store))
    finally:
        store.close()


def _newest_originals(store: DocumentStore) -> Iterator[str]:
    after = None
    while page := store.list_documents(None, None, 1000, after):
        yield from (document.sha256 for document in page if document.status != "deleting")
        after = page[-1].id

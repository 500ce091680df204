"""The data directory: its layout, and the lock that keeps out a second writer."""

import fcntl
import os
import shutil
from pathlib import Path
from typing import Self

_FOLDERS = ("files", "faiss", "words", "audit")
_OWN = (*_FOLDERS, "lock", "admin.key", "owed-deletes.json", "restoring")  # besides the database
_LEAST_BYTES = 512 << 10  # SQLite's log, and the first writes of the indexes


class DataDirInUse(RuntimeError):
    """Another process has this data directory open."""


class DataDirUnusable(RuntimeError):
    """The data directory cannot be created or written, or its disk is full."""


class DataDir:
    """An open, locked data directory; closing it releases the lock."""

    def __init__(self, path: Path, restoring: bool = False) -> None:
        """Create it if it does not exist. Raises DataDirInUse, naming the process that holds it, and DataDirUnusable,
        also if a restore was interrupted, unless it is about to be repeated (`restoring`), and if it seems to be for
        something else, whose files would be lost."""
        self.path = path
        lost_database = restoring and (path / "lock").exists()  # every service leaves its lock
        if not lost_database and (name := _find_foreign(path)) is not None:
            others = "" if restoring else "if the database was lost, `jamba-rag restore` a backup, or "
            raise DataDirUnusable(
                f"{path} holds no database, but {name}, which may be somebody else's: name a new folder with "
                f"--data-dir; {others}remove what is left of an earlier service"
            )
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataDirUnusable(
                f"{path} cannot be used as data directory ({error.strerror}): make it a folder that this user may "
                "write, or take another with --data-dir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise DataDirInUse(
                f"{path} is in use by process {owner}; talk to that service with --url and --key, or stop it, or "
                "take another --data-dir"
            ) from None
        if self.unfinished.exists() and not restoring:
            self.close()
            raise DataDirUnusable(
                f"restoring a backup into {path} was interrupted: run `jamba-rag restore` again, or remove "
                f"{self.unfinished} and {self.files} to begin without it"
            )
        if (fault := find_unwritable(path)) is not None:
            self.close()
            raise DataDirUnusable(fault)
        if (free_bytes := shutil.disk_usage(path).free) < _LEAST_BYTES:
            self.close()
            raise DataDirUnusable(f"{free_bytes} bytes are left on the disk of {path}, too little to start: free some")
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    @staticmethod
    def database_in(path: Path) -> Path:
        """The database file of a data directory, which another process may have open."""
        return path / "rag.sqlite3"

    @property
    def database(self) -> Path:
        return self.database_in(self.path)

    @property
    def files(self) -> Path:
        return self.path / "files"

    @property
    def index(self) -> Path:
        return self.path / "faiss"

    @property
    def words(self) -> Path:
        return self.path / "words"

    @property
    def audit(self) -> Path:
        return self.path / "audit"

    @property
    def unfinished(self) -> Path:
        """The folder that a backup is restored into, until it is complete."""
        return self.path / "restoring"

    def close(self) -> None:
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _find_foreign(path: Path) -> str | None:
    """A folder in use that has the name of one of ours, where there is no database that it could belong to."""
    if DataDir.database_in(path).exists() or (path / "restoring").exists():
        return None
    return next((name for name in _FOLDERS if (path / name).is_dir() and any((path / name).iterdir())), None)


def is_own(path: Path, data_dir: Path) -> bool:
    """Whether the service itself has, or could have, a file or folder there. Both paths are absolute and resolved."""
    if not path.is_relative_to(data_dir) or path == data_dir:
        return False
    name = path.relative_to(data_dir).parts[0]
    return name.startswith(DataDir.database_in(data_dir).name) or name in _OWN


def find_unwritable(path: Path) -> str | None:
    """What in a data directory is not writable for this user, and what to do; None if everything is."""
    folders = [path / name for name in _FOLDERS if name != "files"]
    inside = (child for folder in folders for child in folder.glob("*"))
    needed = (path, *path.glob("rag.sqlite3*"), path / "files", *folders, *inside)
    locked = next((one for one in needed if one.exists() and not _may_write(one)), None)
    if locked is None:
        return None
    if os.statvfs(locked).f_flag & os.ST_RDONLY:
        return f"{locked} is on a read-only file system; mount it writable or choose another data directory"
    return f"{locked} belongs to user {locked.stat().st_uid} and user {os.geteuid()} may not write it; chown it"


def _may_write(path: Path) -> bool:
    return os.access(path, os.W_OK | os.X_OK if path.is_dir() else os.W_OK, effective_ids=True)

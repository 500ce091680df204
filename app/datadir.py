"""The data directory: what lies where, and the lock that keeps a second writer out."""

import fcntl
import os
from pathlib import Path
from typing import Self


class DataDirInUse(RuntimeError):
    """Another process has this data directory open."""


class DataDirUnusable(RuntimeError):
    """The data directory cannot be made or written."""


class DataDir:
    """An open data directory; close it to let the next process in."""

    def __init__(self, path: Path, restoring: bool = False) -> None:
        """Create it if it isn't there. Raises DataDirInUse, naming the process that has it, and DataDirUnusable, also
        when a backup was restored in part and this is not about to be gone on with (`restoring`)."""
        self.path = path
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
                f"{self.unfinished} to begin without it"
            )
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    @staticmethod
    def database_in(path: Path) -> Path:
        """Of a data directory that somebody else may have open."""
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
        """What a backup holds, until all of it is there."""
        return self.path / "restoring"

    def close(self) -> None:
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

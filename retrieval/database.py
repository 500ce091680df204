"""One SQLite file: a connection per thread, transactions, and errors that name what to do.

Knows nothing of documents: the schema is in migrations.py, the statements are in store*.py.
"""

import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .migrations import migrate

_BUSY_TIMEOUT_S = 30.0  # how long a writer waits for its turn
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_UNWRITABLE = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}


class StorageFull(RuntimeError):
    """The disk has no room for a write; nothing of it was kept."""


class StorageUnwritable(RuntimeError):
    """The disk takes no writes: read-only by now, gone or broken; nothing of the write was kept."""

    retry_after_s = 30


class StorageBusy(RuntimeError):
    """Another process has kept the database to itself for too long; nothing of the write was kept."""

    retry_after_s = 5


class StoreUnusable(RuntimeError):
    """The database file cannot be opened: damaged, not a database, written by a newer version, or kept by another."""


class _Connection(sqlite3.Connection):
    """Closes itself when its thread has gone; plain connections can be neither weakly referenced nor closed so."""

    def __del__(self) -> None:
        self.close()


class Database:
    """Thread safe. Writers of all processes take turns (`BEGIN IMMEDIATE`); readers see a snapshot and never wait."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._local = threading.local()
        self._open: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            migrate(self._connection())
        except sqlite3.DatabaseError as error:
            self.close()
            advice = "restore a backup of it"
            if _kind(error) in _BUSY:
                advice = "stop the program that has it open"
            elif _kind(error) in _UNWRITABLE | {sqlite3.SQLITE_FULL}:
                advice = "see that its disk is sound, has room and can be written"
            raise StoreUnusable(f"{self.path} cannot be used as a database: {error}; {advice}") from error
        except ValueError as error:
            self.close()
            raise StoreUnusable(f"{self.path}: {error}") from error

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Give a connection that sees one state of the database throughout; may be nested, also inside `write`."""
        connection = self._connection()
        if connection.in_transaction:
            yield connection
            return
        connection.execute("BEGIN")
        try:
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Give a connection whose changes are all on disk when the block ends, or none if it raises.

        Raises StorageFull when the disk is, StorageUnwritable when it takes no writes, StorageBusy when another process
        writes for too long. Not inside `read`: a snapshot cannot be written to.
        """
        connection = self._connection()
        if connection.in_transaction:
            raise RuntimeError("a write inside another transaction of this thread: end that one first")
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            kind = _kind(error)
            if kind in _BUSY:
                raise StorageBusy(f"another program is writing to {self.path}; try again, or stop it") from error
            if kind == sqlite3.SQLITE_FULL:
                raise StorageFull(f"no room on the disk of {self.path}; free some and try again") from error
            if kind in _UNWRITABLE:
                raise StorageUnwritable(
                    f"{self.path} cannot be written ({error}); make its disk writable, then try again"
                ) from error
            raise
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def close(self) -> None:
        """Close the connections of all threads; none of them may be in use. May be repeated."""
        with self._lock:
            for connection in list(self._open):
                connection.close()
        self._local = threading.local()

    def _connection(self) -> _Connection:
        connection: _Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                self.path,
                timeout=_BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,
                factory=_Connection,
            )
            with self._lock:
                self._open.add(connection)
            self._local.connection = connection
            connection.row_factory = sqlite3.Row
            # FULL: a commit is on the disk before it is reported, so that an accepted upload survives a power cut.
            # 8 MiB of pages: each thread has its own, and the system's cache beneath is as fast.
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "cache_size=-8192"):
                connection.execute(f"PRAGMA {pragma}").fetchall()
        return connection


def _kind(error: sqlite3.Error) -> int:
    """SQLite's code for it; what stands above the last byte says more of the same."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF

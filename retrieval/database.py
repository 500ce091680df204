"""An SQLite file: one connection per thread, transactions, and errors that say what to do.

The schema is in migrations.py, the statements are in store*.py.
"""

import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .migrations import migrate

_BUSY_TIMEOUT_S = 30.0  # how long a writer waits for the write lock
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_UNWRITABLE = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}


class StorageFull(RuntimeError):
    """The disk is full; the transaction was rolled back."""


class StorageUnwritable(RuntimeError):
    """The disk cannot be written: read-only, missing or faulty; the transaction was rolled back."""

    retry_after_s = 30


class StorageBusy(RuntimeError):
    """Another process has locked the database for too long; the transaction was rolled back."""

    retry_after_s = 5


class StoreUnusable(RuntimeError):
    """The database file cannot be opened: damaged, not a database, written by a newer version, or locked."""


class _Connection(sqlite3.Connection):
    """Closes itself when its thread ends; plain connections cannot be weakly referenced."""

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
        """A connection within a read transaction, which sees one snapshot; may be nested, also inside `write`."""
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
        """A connection within a write transaction, which is durable when the block ends, or rolled back if it raises.

        Raises StorageFull, StorageUnwritable, and StorageBusy if another process holds the write lock for too long. Not
        inside `read`, whose snapshot cannot be written.
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
        """Close the connections of all threads; none may be in use. Calling it twice is harmless."""
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
            # FULL: commits are durable, so that an accepted upload survives a power failure.
            # A page cache of 8 MiB is enough: there is one per thread, and the system's cache is as fast.
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "cache_size=-8192"):
                connection.execute(f"PRAGMA {pragma}").fetchall()
        return connection


def _kind(error: sqlite3.Error) -> int:
    """SQLite's primary error code: the lowest byte of the extended code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF

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

_UNWRITABLE = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}


class StorageFull(RuntimeError):
    """The disk has no room for a write; nothing of it was kept."""


class StorageUnwritable(RuntimeError):
    """The disk takes no writes: read-only by now, gone or broken; nothing of the write was kept."""

    retry_after_s = 30


class StoreUnusable(RuntimeError):
    """The database file cannot be opened: damaged, not a database, or written by a newer version."""


class _Connection(sqlite3.Connection):
    """Closes itself when its thread has gone; plain connections can be neither weakly referenced nor closed so."""

    def __del__(self) -> None:
        self.close()


class Database:
    """Thread safe. Writers of all processes take turns (`BEGIN IMMEDIATE`); readers see a snapshot and never wait."""

    def __init__(self, path: Path | str, busy_timeout_s: float = 30.0) -> None:
        self.path = Path(path)
        self._busy_timeout_s = busy_timeout_s
        self._local = threading.local()
        self._open: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            migrate(self._connection())
        except sqlite3.DatabaseError as error:
            self.close()
            raise StoreUnusable(f"{self.path} cannot be used as a database: {error}; restore a backup of it") from error
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

        Raises StorageFull when the disk is, StorageUnwritable when it takes no writes. Not inside `read`: a snapshot
        cannot be written to.
        """
        connection = self._connection()
        if connection.in_transaction:
            raise RuntimeError("a write inside another transaction of this thread: end that one first")
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            kind = error.sqlite_errorcode & 0xFF  # what is above says more of it
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
                timeout=self._busy_timeout_s,
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

"""Deletes that a state server could not receive; those by tag are kept in a file, also over restarts, until it has."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Collection
from pathlib import Path

_log = logging.getLogger(__name__)


class OwedDeletes:
    """Thread safe. A file that cannot be read or written is only logged.

    Keys are not noted: those deleted by key hold damaged values, which are found damaged again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._noted = _read(path)
        self._keys: set[str] = set()
        self._tags = set(self._noted)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._keys) + len(self._tags)

    def add(self, keys: Collection[str] = (), tags: Collection[str] = ()) -> None:
        with self._lock:
            self._keys |= set(keys)
            self._tags |= set(tags)

    def pending(self) -> tuple[frozenset[str], frozenset[str]]:
        """(keys, tags) that are to be deleted."""
        with self._lock:
            return frozenset(self._keys), frozenset(self._tags)

    def settle(self, keys: Collection[str], tags: Collection[str]) -> None:
        with self._lock:
            self._keys -= set(keys)
            self._tags -= set(tags)
        self.note()

    def note(self) -> None:
        """Update the file."""
        with self._lock:
            if self._path is None or self._tags == self._noted:
                return
            written = self._path.with_suffix(".new")
            try:
                with written.open("w") as file:
                    file.write(json.dumps(sorted(self._tags)))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(written, self._path)
            except OSError as error:
                _log.warning("cannot note in %s which states the state server must still delete: %s", written, error)
                return
            self._noted = frozenset(self._tags)


def _read(path: Path | None) -> frozenset[str]:
    if path is None or not path.exists():
        return frozenset()
    try:
        return frozenset(map(str, json.loads(path.read_text())))
    except (OSError, ValueError, TypeError) as error:
        _log.warning("cannot read which states the state server must still delete: %s: %s", path, error)
        return frozenset()

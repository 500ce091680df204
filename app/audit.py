"""The audit log: one JSON line for each call that changes or tries to change something: who, what, when, outcome.

Lines contain ids and paths, never bodies, file names, keys or headers. Files are rotated by size; the newest is
`audit.jsonl`. Start at `AuditLog.write`.
"""

import json
import logging
import os
import threading
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
AUDITED = ("/v1/documents", "/v1/collections", "/v1/keys")


class AuditLog:
    """Appends to `directory`/audit.jsonl; older files are audit.jsonl.1 (newest of them) and up."""

    def __init__(self, directory: Path, max_bytes: int, files: int) -> None:
        """Keep `files` files of about `max_bytes` each, readable only by their owner."""
        self._directory, self._max_bytes, self._files = directory, max_bytes, files
        self._lock = threading.Lock()
        directory.mkdir(mode=0o700, exist_ok=True)

    def write(self, **entry: Any) -> None:
        """Append one line. If it cannot be written, that is only logged."""
        entry = {"ts": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry}
        line = (json.dumps(entry, default=str) + "\n").encode()
        with self._lock:
            try:
                self._append(line)
            except OSError as error:
                log.error("the audit log in %s cannot be written (%s); lost: %s", self._directory, error, entry)

    def _append(self, line: bytes) -> None:
        path = self._directory / "audit.jsonl"
        if path.exists() and path.stat().st_size + len(line) > self._max_bytes:
            self._rotate()
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(line)

    def _rotate(self) -> None:
        names = ["audit.jsonl", *(f"audit.jsonl.{number}" for number in range(1, self._files))]
        for younger, older in reversed(list(pairwise(names))):
            if (self._directory / younger).exists():
                (self._directory / younger).replace(self._directory / older)
        if len(names) == 1:
            (self._directory / names[0]).unlink()

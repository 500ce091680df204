"""Content-addressed storage of originals: `files/<sha256>`.

Names given by users never become paths; `clean_filename` sanitizes them for display.
"""

import errno
import hashlib
import os
import re
import shutil
import tempfile
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from retrieval.database import StorageFull, StorageUnwritable

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TEMP_PREFIX = "upload-"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_WRITES = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT}
MAX_FILENAME_CHARS = 255
_RESERVE_BYTES = 64 << 20


class FileTooLarge(ValueError):
    """The upload exceeds the limit; nothing of it was stored."""


class OriginalMissing(RuntimeError):
    """An original was removed from the disk by something other than the service."""


class FileStore:
    """Files named by their SHA-256 in one directory; equal bytes are one file.

    A file gets its final name only when it is complete and synced, so files returned by `save_stream` survive a power
    failure. Temporary files left by a crash are removed when the store opens: a data directory has one writer.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(f"{_TEMP_PREFIX}*"):
            leftover.unlink(missing_ok=True)
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    def save_stream(self, pieces: Iterable[bytes], max_bytes: int, hold: bool = False) -> tuple[str, int]:
        """Store the bytes of `pieces` durably and return (sha256, number of bytes).

        With `hold`, `delete` has no effect on them until `release`. Holds one piece in memory. Raises FileTooLarge as
        soon as the limit is exceeded; StorageFull, StorageUnwritable.
        """
        with self._disk_errors():
            handle, name = tempfile.mkstemp(prefix=_TEMP_PREFIX, dir=self.directory)
            temporary = Path(name)
            try:
                with os.fdopen(handle, "wb") as file:
                    digest, nbytes = _copy(pieces, file, max_bytes)
                    file.flush()
                    os.fsync(file.fileno())
                self.require_room()
                with self._lock:
                    temporary.rename(self.path(digest))
                    if hold:
                        self._held[digest] += 1
                try:
                    self._sync_directory()
                except OSError:
                    if hold:
                        self.release(digest)
                    raise
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return digest, nbytes

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise StorageFull(
                    f"no space left for an upload in {self.directory}; free some or delete documents, then try again"
                ) from error
            if error.errno in _NO_WRITES:
                raise StorageUnwritable(
                    f"{self.directory} cannot be written ({error.strerror}); make it writable, then send it again"
                ) from error
            raise

    def try_writing(self) -> None:
        """Raise StorageFull or StorageUnwritable if an upload could not be stored now."""
        with self._disk_errors(), tempfile.TemporaryFile(dir=self.directory):
            self.require_room()

    def require_room(self) -> None:
        """Raise StorageFull if so little space is left that the database might soon be unable to delete documents.

        64 MiB are reserved, or an eighth of a smaller disk.
        """
        disk = shutil.disk_usage(self.directory)
        reserve = min(_RESERVE_BYTES, disk.total // 8)
        if disk.free < reserve:
            raise StorageFull(
                f"{disk.free} bytes are left on the disk of {self.directory} and {reserve} are kept for deleting; free "
                "some or delete documents, then send it again"
            )

    def path(self, sha256: str) -> Path:
        """The path of these bytes, whether they exist or not. Raises ValueError unless it is a SHA-256 in hex."""
        if not _DIGEST.fullmatch(sha256):
            raise ValueError(f"{sha256[:80]!r} is not a SHA-256 in lower-case hex")
        return self.directory / sha256

    def find(self, sha256: str) -> Path:
        """The path of these bytes. Raises OriginalMissing if they do not exist."""
        path = self.path(sha256)
        if not path.is_file():
            raise OriginalMissing("the original is no longer on the disk of the service; upload it again")
        return path

    def open(self, sha256: str) -> BinaryIO:
        """Open the original for reading. Raises FileNotFoundError."""
        return self.path(sha256).open("rb")

    def delete(self, sha256: str) -> None:
        """Delete the original, if it exists and is not held."""
        with self._lock:
            if sha256 not in self._held:
                self.path(sha256).unlink(missing_ok=True)

    def release(self, sha256: str) -> None:
        """End one hold of `save_stream`."""
        with self._lock:
            self._held[sha256] -= 1
            if self._held[sha256] <= 0:
                del self._held[sha256]

    def _sync_directory(self) -> None:
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _copy(pieces: Iterable[bytes], file: BinaryIO, max_bytes: int) -> tuple[str, int]:
    hasher, nbytes = hashlib.sha256(), 0
    for piece in pieces:
        nbytes += len(piece)
        if nbytes > max_bytes:
            raise FileTooLarge(
                f"upload is over the limit of {max_bytes} bytes; split the file or raise the limit for uploads"
            )
        hasher.update(piece)
        file.write(piece)
    return hasher.hexdigest(), nbytes


def clean_filename(name: str) -> str:
    """The name for display and storage: last path component, printable, at most 255 characters, suffix preserved.

    Never used as a path. An empty result becomes "unnamed".
    """
    name = unicodedata.normalize("NFC", name.encode("utf-8", "replace").decode("utf-8"))
    name = re.split(r"[/\\]", name)[-1]
    spaced = (" " if unicodedata.category(char) == "Zs" else char for char in name)
    name = "".join(char for char in spaced if char.isprintable()).strip()
    if name.strip(". ") == "":
        return "unnamed"
    if len(name) <= MAX_FILENAME_CHARS:
        return name
    stem, dot, suffix = name.rpartition(".")
    if not dot or len(suffix) > 16:
        return name[:MAX_FILENAME_CHARS]
    return stem[: MAX_FILENAME_CHARS - len(suffix) - 1] + dot + suffix

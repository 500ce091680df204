"""Unpacks archives with limits: ZIP, TAR (plain, gzip, bzip2, xz), and single files compressed by those three.

Members are read into memory one at a time. Names are only for display.
"""

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from ingest.parse import ParseError
from ingest.parse.archive import is_bomb
from ingest.sniff import BZIP2, GZIP, TAR, XZ, ZIP

MAX_FILES = 5_000
_MAX_FILE_BYTES = 256 * 1024 * 1024
_BLOCK = 512
_OPENERS = {GZIP: gzip.open, BZIP2: bz2.open, XZ: lzma.open}
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,
)
_NO_DOCUMENTS = ("__MACOSX/", ".git/", "node_modules/")


class Budget:
    """Limits for all members of one upload together. Raises ParseError zip_bomb before anything too large is read."""

    def __init__(self, packed_bytes: int) -> None:
        self._packed = max(1, packed_bytes)
        self._unpacked = 0
        self._files = 0

    def take_file(self, size: int) -> None:
        """Count a member with a declared size of `size` bytes."""
        self._files += 1
        if self._files > MAX_FILES:
            raise ParseError("zip_bomb", f"the archive holds more than {MAX_FILES} files; upload it in parts")
        if size > _MAX_FILE_BYTES:
            raise _too_big("a file in the archive", size)
        self.take_bytes(size)

    def take_bytes(self, number: int) -> None:
        self._unpacked += number
        if is_bomb(self._packed, self._unpacked):
            raise ParseError(
                "zip_bomb",
                f"the archive unpacks from {self._packed} to more than {self._unpacked - 1} bytes, over the limit; "
                "upload it in parts",
            )


def read_members(data: bytes, media_type: str, name: str, budget: Budget) -> Iterator[tuple[str, bytes | str]]:
    """(display name, content or the reason why it is not read) of each file. The name of a single compressed file may
    be empty, if unknown. Raises ParseError zip_bomb, broken_archive."""
    try:
        members = _zip_members(data, budget) if media_type == ZIP else _tar_members(data, media_type, name, budget)
        for path, content in members:
            shown = "/".join(part for part in _printable(path).split("/") if part not in ("", ".", ".."))
            if not shown.startswith(_NO_DOCUMENTS) and not shown.endswith(".DS_Store"):
                yield shown or ("unnamed" if path or media_type == ZIP else ""), content
    except _DAMAGE as error:
        if isinstance(error, ParseError):
            raise
        raise ParseError(
            "broken_archive", f"the archive is damaged ({type(error).__name__}: {str(error)[:200]}); pack it again"
        ) from error


def _printable(name: str) -> str:
    name = name.encode("utf-8", "replace").decode("utf-8").replace("\\", "/")
    return "".join(char for char in name if char.isprintable())[:400]


def _zip_members(data: bytes, budget: Budget) -> Iterator[tuple[str, bytes | str]]:
    """zipfile never reads more of a member than its directory declares, so the limits hold even if that is wrong."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if info.filename.endswith("/"):  # zipfile's is_dir() fails on a member without a name
                continue
            budget.take_file(info.file_size)
            if stat.S_ISLNK(info.external_attr >> 16):
                yield info.filename, "a link, which is not followed"
            elif info.flag_bits & 1:
                yield info.filename, "protected by a password"
            else:
                try:
                    content: bytes | str = archive.read(info)
                except (NotImplementedError, *_DAMAGE) as error:
                    content = f"damaged: {str(error)[:100] or type(error).__name__}"
                yield info.filename, content


def _tar_members(data: bytes, media_type: str, name: str, budget: Budget) -> Iterator[tuple[str, bytes | str]]:
    with _open_stream(data, media_type) as stream:
        is_tar = media_type == TAR or _is_tar(stream.read(_BLOCK))
    with _open_stream(data, media_type) as stream:
        counted = _Counted(stream, budget)
        if not is_tar:
            budget.take_file(0)
            yield name.rpartition("/")[2].rpartition(".")[0], _read_all(counted)
            return
        with tarfile.open(fileobj=counted, mode="r|") as archive:
            for info in archive:
                if info.isdir():
                    continue
                budget.take_file(0)  # bytes are counted as they are read
                if info.issym() or info.islnk():
                    yield info.name, "a link, which is not followed"
                elif not info.isreg() or info.issparse():
                    yield info.name, "not a plain file"
                else:
                    if info.size > _MAX_FILE_BYTES:
                        raise _too_big(info.name, info.size)
                    file = archive.extractfile(info)
                    yield info.name, b"" if file is None else file.read()


def _open_stream(data: bytes, media_type: str) -> BinaryIO:
    packed = io.BytesIO(data)
    return packed if media_type == TAR else _OPENERS[media_type](packed)


def _is_tar(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError:
        return False
    return True


def _read_all(stream: "_Counted") -> bytes:
    content = bytearray()
    while piece := stream.read(1 << 20):
        content += piece
        if len(content) > _MAX_FILE_BYTES:
            raise _too_big("the packed file", len(content))
    return bytes(content)


def _too_big(name: str, size: int) -> ParseError:
    return ParseError("zip_bomb", f"{name[:100]} has {size} bytes or more, over the limit of {_MAX_FILE_BYTES}")


class _Counted:
    """A stream that charges the budget for all bytes read, so that skipping a huge member also ends."""

    def __init__(self, stream: BinaryIO, budget: Budget) -> None:
        self._stream = stream
        self._budget = budget

    def read(self, number: int) -> bytes:
        data = self._stream.read(number)
        self._budget.take_bytes(len(data))
        return data

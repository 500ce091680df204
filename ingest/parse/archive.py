"""Documents that are zip archives of XML (DOCX, XLSX, PPTX, ODT, EPUB): opened with limits, parsed without entities.

Start at `open_package`. Nothing is unpacked to disk, so names in an archive never become paths.
"""

import io
import posixpath
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from lxml import etree

from ingest.parse import ParseError, Source

_MAX_UNPACKED_BYTES = 512 * 1024 * 1024
_MAX_RATIO = 200  # text compresses about tenfold; much higher ratios are deliberate
_RATIO_FREE_BYTES = 64 * 1024 * 1024
_MAX_MEMBERS = 20_000
_RELATIONSHIP = "{http://schemas.openxmlformats.org/package/2006/relationships}Relationship"
_XML_SAFETY = {"resolve_entities": False, "no_network": True, "load_dtd": False, "huge_tree": False}


def open_source(source: Source) -> str | io.BytesIO:
    """The source in a form that libraries can open: a path string, or a file object of the bytes."""
    return io.BytesIO(source) if isinstance(source, bytes) else str(source)


def check_archive(source: Source) -> None:
    """Check the declared sizes of all members; zipfile never reads more of a member than declared.

    Raises ParseError zip_bomb; BadZipFile.
    """
    with zipfile.ZipFile(open_source(source)) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
    packed = max(1, len(source) if isinstance(source, bytes) else source.stat().st_size)
    if len(members) > _MAX_MEMBERS:
        raise ParseError("zip_bomb", f"the document has {len(members)} parts, over the limit of {_MAX_MEMBERS}")
    if is_bomb(packed, unpacked):
        raise ParseError(
            "zip_bomb",
            f"the document unpacks from {packed} to {unpacked} bytes, over the limit; save it with smaller parts",
        )


def is_bomb(packed: int, unpacked: int) -> bool:
    """Whether the unpacked size exceeds the absolute limit or the limit of the compression ratio."""
    return unpacked > _MAX_UNPACKED_BYTES or (unpacked > _RATIO_FREE_BYTES and unpacked > _MAX_RATIO * packed)


class Package:
    """The members of an open archive by name; names are case-sensitive and without a leading slash."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._names = frozenset(archive.namelist())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str) -> bytes:
        """Raises KeyError, BadZipFile."""
        return self._archive.read(name)

    def xml(self, name: str) -> etree._Element:
        """The root element of a member. Raises KeyError, XMLSyntaxError."""
        return etree.fromstring(self.read(name), etree.XMLParser(**_XML_SAFETY, remove_comments=True, remove_pis=True))

    def elements(self, name: str, tag: str) -> Iterator[etree._Element]:
        """Each complete element with this tag, with only one in memory at a time, for members with many rows."""
        with self._archive.open(name) as member:
            for _, element in etree.iterparse(member, tag=tag, **_XML_SAFETY):
                yield element
                element.clear()
                while element.getprevious() is not None:
                    del element.getparent()[0]

    def find_all(self, name: str, pattern: re.Pattern[bytes]) -> Iterator[re.Match[bytes]]:
        """All matches of `pattern`, of up to 1 KiB each, in a member of any size."""
        with self._archive.open(name) as member:
            rest = b""
            while piece := member.read(1 << 20):
                rest, done = rest + piece, 0
                for found in pattern.finditer(rest):
                    done = found.end()
                    yield found
                rest = rest[max(done, len(rest) - 1024) :]

    def relations(self, name: str) -> dict[str, tuple[str, str]]:
        """The relationships of an Office part: id -> (last segment of the type, name of the member)."""
        folder, base = posixpath.split(name)
        rels = posixpath.join(folder, "_rels", f"{base}.rels")
        if rels not in self:
            return {}
        return {
            item.get("Id", ""): (item.get("Type", "").rpartition("/")[2], resolve(name, item.get("Target", "")))
            for item in self.xml(rels).iter(_RELATIONSHIP)
            if item.get("TargetMode") != "External"
        }


def resolve(base: str, target: str) -> str:
    """The name of the member that the link `target` in member `base` refers to."""
    target = unquote(target.partition("#")[0])
    return posixpath.normpath(posixpath.join("/", posixpath.dirname(base), target)).lstrip("/")


@contextmanager
def open_package(source: Source, kind: str, what: str) -> Iterator[Package]:
    """Open and check; all errors within the block become ParseError broken_<kind> or zip_bomb."""
    try:
        check_archive(source)
        with zipfile.ZipFile(open_source(source)) as archive:
            yield Package(archive)
    except (ParseError, MemoryError):
        raise
    except Exception as error:  # damaged files cause many kinds of errors in zipfile, zlib and lxml
        damaged = isinstance(error, zipfile.BadZipFile)
        reason = "it is no complete zip archive" if damaged else f"{type(error).__name__}: {str(error)[:200]}"
        raise ParseError(
            f"broken_{kind}",
            f"the file is damaged or no {what} ({reason}); open it in the program it comes from and save it again as "
            f"{kind.upper()}",
        ) from error

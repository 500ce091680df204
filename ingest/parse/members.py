"""Embedded documents: files in an archive, attachments of a message. Each is detected by its content and parsed in its
own process, so that a crash or hang affects only that one.

Nothing is unpacked to disk and no link is followed, so names in an archive never become paths. Unreadable files are
counted and named in `ParsedDocument.unread`. Start at `Members.write`; unpack.py opens archives.
"""

import json
import os
import signal
from typing import NoReturn

from ingest.parse import ParseError, parse_bytes
from ingest.parse.blocks import BlockWriter
from ingest.parse.unpack import Budget, read_members
from ingest.parse.wire import from_json, to_json
from ingest.sniff import PACKED_TYPES, SNIFF_BYTES, EmptyFile, UnsupportedMediaType, sniff_media_type
from retrieval.parsed import ParsedDocument

MAX_DEPTH = 4  # of nested archives and messages
_MEMBER_S = 60
_NAMED = 5  # unread members that are named; the others are counted


class Members:
    """Writes the documents embedded in one file; `budget` applies to all of them, at any depth."""

    def __init__(self, budget: Budget, max_pages: int, depth: int) -> None:
        self._budget = budget
        self._max_pages = max_pages
        self._depth = depth
        self._read = 0
        self._unread: list[str] = []

    def write(self, writer: BlockWriter, name: str, data: bytes, level: int, *, is_titled: bool = False) -> None:
        """Write a document, with its name, if any, as a heading of this level, unless it has one of its own; record it
        as unread if it cannot be read. For an archive, write its documents."""
        try:
            media_type = sniff_media_type(data[:SNIFF_BYTES], name)
            if media_type in PACKED_TYPES:
                self.write_archive(writer, name, data, media_type, level)
                return
            parsed = _parse_apart(data, media_type, self._max_pages, self._depth + 1)
        except (EmptyFile, UnsupportedMediaType, ParseError) as error:
            if isinstance(error, ParseError) and error.code == "zip_bomb":
                raise
            self.skip(name, str(error).partition(". Supported")[0])
            return
        self._read += 1
        if name and not is_titled:
            writer.end_block()
            writer.add(name)
            writer.end_heading(level)
        writer.add_document(parsed, level)
        if parsed.unread:
            self._unread.append(f"in {name}: {parsed.unread}" if name else parsed.unread)

    def write_archive(self, writer: BlockWriter, name: str, data: bytes, media_type: str, level: int) -> None:
        """Write all documents of an archive, named by their paths."""
        if self._depth >= MAX_DEPTH:
            self.skip(name, f"more than {MAX_DEPTH} archives within each other; unpack it and upload the files")
            return
        self._depth += 1
        try:
            for member, content in read_members(data, media_type, name, self._budget):
                path = f"{name}/{member}" if name else member
                if isinstance(content, bytes):
                    self.write(writer, path, content, level)
                else:
                    self.skip(path, content)
        finally:
            self._depth -= 1

    def skip(self, name: str, reason: str) -> None:
        self._unread.append(f"{name} ({reason})" if name else reason)

    def unread(self) -> str | None:
        """A message about what was not read, if anything."""
        if not self._unread:
            return None
        named = "; ".join(self._unread[:_NAMED])
        more = f"; and {len(self._unread) - _NAMED} more" if len(self._unread) > _NAMED else ""
        return (
            f"{len(self._unread)} of {len(self._unread) + self._read} files were not read or not wholly: {named}{more}"
        )

    @property
    def found_nothing(self) -> bool:
        return not self._read


def parse_archive(data: bytes, media_type: str, max_pages: int, depth: int = 0) -> ParsedDocument:
    """One text of all documents, each in a section named by its path. Raises ParseError empty_archive, broken_archive,
    zip_bomb."""
    members, writer = Members(Budget(len(data)), max_pages, depth), BlockWriter()
    members.write_archive(writer, "", data, media_type, 1)
    unread = members.unread()
    if members.found_nothing:
        raise ParseError("empty_archive", f"the archive holds no document that can be read: {unread or 'it is empty'}")
    parsed = writer.finish(media_type, title="")
    return ParsedDocument(parsed.text, (), parsed.headings, None, media_type, unread)


def _parse_apart(data: bytes, media_type: str, max_pages: int, depth: int) -> ParsedDocument:
    """Parse in a forked process, which inherits all limits of this one. Raises ParseError."""
    reading, writing = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:  # a fork counts all writable memory
        os.close(reading)
        os.close(writing)
        raise ParseError("memory_limit", "there is too little memory to read it apart; upload it by itself") from error
    if pid == 0:
        os.close(reading)
        _answer(writing, data, media_type, max_pages, depth)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == -signal.SIGALRM or status == -signal.SIGXCPU:
        raise ParseError("parse_timeout", f"reading it took longer than {_MEMBER_S} s")
    if status:
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        raise ParseError("parser_crashed", f"the parser crashed on it ({how}); it is probably damaged")
    message = json.loads(answer)
    if "error" in message:
        raise ParseError(*message["error"])
    return from_json(message["result"])


def _answer(pipe: int, data: bytes, media_type: str, max_pages: int, depth: int) -> NoReturn:
    status = 1
    try:
        signal.alarm(_MEMBER_S)
        try:
            message = {"result": to_json(parse_bytes(data, media_type, max_pages=max_pages, depth=depth))}
        except ParseError as error:
            message = {"error": [error.code, str(error)]}
        except MemoryError:
            message = {"error": ["memory_limit", "reading it takes too much memory"]}
        with open(pipe, "wb") as file:
            file.write(json.dumps(message, ensure_ascii=False).encode())
        status = 0
    finally:
        os._exit(status)

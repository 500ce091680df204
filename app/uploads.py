"""Streaming multipart parser: files go straight to the file store, whatever their size.

Only fields, which are small, are held in memory. Documents are checked by `RagService.submit_document`.
"""

import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import unquote_to_bytes

import anyio.from_thread
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from app.lanes import Lane

MAX_FIELD_BYTES = 1 << 20
MAX_UPLOADS_AT_ONCE = 16
_MAX_HEADER_BYTES = 64 * 1024
_EXTENDED_NAME = re.compile(rb";[ \t]*filename\*=utf-8'[^']*'([^;\s]+)", re.I)
_AS_IT_IS = (b"binary", b"8bit", b"7bit")

Result = TypeVar("Result")
_UPLOADS = Lane("uploads", MAX_UPLOADS_AT_ONCE)  # slow uploads must not occupy threads of other requests


class BadUpload(ValueError):
    """The body is not a valid multipart form for this endpoint."""


@dataclass
class Part:
    """One part of the form; `filename` is None for a field. Exhaust `pieces` before the next part."""

    name: str
    filename: str | None
    pieces: AsyncIterator[bytes]


@dataclass
class _Event:
    """A parser event: a part begins (`part`), continues (`data`) or ends (neither)."""

    part: tuple[str, str | None] | None = None
    data: bytes | None = None


@dataclass
class _Collector:
    """Parser callbacks that assemble header fragments and collect events."""

    events: list[_Event] = field(default_factory=list)
    _name: bytes = b""
    _value: bytes = b""
    _disposition: bytes = b""
    ended: bool = False

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": lambda data, start, end: self.events.append(_Event(data=data[start:end])),
            "on_part_end": lambda: self.events.append(_Event()),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._name = self._value = self._disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        if self._name.lower() == b"content-transfer-encoding" and self._value.strip().lower() not in _AS_IT_IS:
            raise BadUpload(
                f"a part of the form is encoded as {self._value[:40].decode('latin-1')!r}; send it as it is"
            )
        self._name = self._value = b""

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise BadUpload("a part of the form has no `Content-Disposition: form-data` with a name")
        filename = options.get(b"filename")
        name = options[b"name"].decode("utf-8", "replace")
        extended = _EXTENDED_NAME.search(self._disposition)  # non-standard: old clients, and .NET beside "=?…"
        if extended and (filename is None or filename.startswith(b"=?")):
            filename = unquote_to_bytes(extended[1])
        if filename is not None:  # browsers encode a quotation mark as %22
            filename = filename.decode("utf-8", "replace").replace("%22", '"')
        self.events.append(_Event(part=(name, filename)))

    def _end(self) -> None:
        self.ended = True


async def read_parts(request: Request) -> AsyncIterator[Part]:
    """The parts of a multipart body, in order. Raises BadUpload if it is not multipart, malformed or incomplete."""
    events = _read_events(request)
    async for event in events:
        if event.part is not None:
            yield Part(*event.part, pieces=_pieces(events))


async def _pieces(events: AsyncIterator[_Event]) -> AsyncIterator[bytes]:
    async for event in events:
        if event.data is None:
            return
        yield event.data


async def _read_events(request: Request) -> AsyncIterator[_Event]:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise BadUpload("send the files as multipart/form-data with a boundary, each in a part named `file`")
    collector = _Collector()
    try:
        parser = MultipartParser(options[b"boundary"], collector.callbacks(), max_header_size=_MAX_HEADER_BYTES)
        async for piece in request.stream():
            parser.write(piece)
            for event in collector.events:
                yield event
            collector.events.clear()
    except FormParserError as error:
        raise BadUpload(f"the multipart body is damaged: {error}") from error
    if not collector.ended:
        raise BadUpload("the multipart body ended before its last boundary; send it again")


async def read_field(part: Part) -> str:
    """The value of a field. Raises BadUpload if it exceeds MAX_FIELD_BYTES or is not UTF-8."""
    value = bytearray()
    async for piece in part.pieces:
        value += piece
        if len(value) > MAX_FIELD_BYTES:
            raise BadUpload(f"field {part.name[:80]!r} is over the limit of {MAX_FIELD_BYTES} bytes")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadUpload(f"field {part.name[:80]!r} is not UTF-8") from error


async def read_in_thread(part: Part, consume: Callable[[Iterator[bytes]], Result], max_rest_bytes: int) -> Result:
    """Run `consume` on the part's pieces in a worker thread; they are read from the connection on demand.

    The rest that `consume` leaves unread is discarded, to reach the next part. Raises BadUpload if that exceeds
    `max_rest_bytes`; the body is then not read further.
    """

    async def next_piece() -> bytes | None:
        return await anext(part.pieces, None)

    def pieces() -> Iterator[bytes]:
        while (piece := anyio.from_thread.run(next_piece)) is not None:
            yield piece

    try:
        return await _UPLOADS.run(lambda: consume(pieces()))
    except ValueError:
        await _drop_rest(part, max_rest_bytes)
        raise


async def _drop_rest(part: Part, max_bytes: int) -> None:
    dropped = 0
    async for piece in part.pieces:
        dropped += len(piece)
        if dropped > max_bytes:
            raise BadUpload(f"more than {max_bytes} bytes follow in a part that was refused; the rest is not read")

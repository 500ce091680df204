"""Zero-copy transfer of large values to and from Redis: on redis-py's connections, bypassing its serializer and parser.

What is stored, and when a server is bypassed, is decided in redis_store.py. Everything except the two bulk transfers
goes through the client as usual. redis-py itself takes two to three passes over a value in each direction (hiredis'
packer joins command and value; both parsers collect, then slice). Here values are sent from their own buffers
(`send_packed_command`) and received directly into their final memory (`BulkParser`). Start at `open_client`.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from ssl import SSLWantReadError
from typing import Any

import numpy as np
import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.connection import BaseParser, Connection, ConnectionPool, SSLConnection
from redis.retry import Retry

from model.redis_url import read_url

Buffer = bytes | bytearray | memoryview
_LINES = 1 << 16
_BULK = 1 << 14  # shorter strings are returned as bytes, as the client's own commands expect
_MAX_BULK = 512 << 20  # limit of the protocol
_REUSED = 8
_SENT_AT_ONCE = 1 << 20  # per send call, to which the timeout applies


class BufferPool:
    """Reusable memory for received values, because faulting in new pages costs more than receiving into them.

    A buffer is reused when no view of it is left. Not thread safe: each connection has its own pool.
    """

    def __init__(self) -> None:
        self._buffers: deque[np.ndarray] = deque([np.empty(0, np.uint8)], maxlen=_REUSED)
        (self._free,) = self._references()  # reference count of an unused buffer, which depends on the Python version

    def take(self, nbytes: int) -> memoryview:
        """An uninitialized writable buffer."""
        for place, references in enumerate(self._references()):
            if references == self._free and nbytes <= len(self._buffers[place]) <= 1.25 * nbytes:
                return memoryview(self._buffers[place])[:nbytes]
        buffer = np.empty(nbytes, np.uint8)
        self._buffers.append(buffer)
        return memoryview(buffer)

    def _references(self) -> list[int]:
        return [sys.getrefcount(buffer) for buffer in self._buffers]


class BulkParser(BaseParser):
    """Reads RESP2 replies; strings of 16 KiB and more are received into memory of their own and are memoryviews.

    Timeouts are the socket's. No client-side caching and no pub/sub, hence neither decoding nor push messages.
    """

    def __init__(self, socket_read_size: int) -> None:
        self._socket: Any = None
        self._lines = bytearray(max(socket_read_size, _LINES))
        self._start = self._end = 0  # of what was received and not yet read
        self._pool = BufferPool()

    def on_connect(self, connection: Any) -> None:
        self._socket = connection._sock  # as redis-py's own parsers get it: there is no other name for it
        self._start = self._end = 0

    def on_disconnect(self) -> None:
        self._socket = None

    def can_read(self, timeout: float = 0) -> bool:
        if self._start < self._end or self._socket is None:
            return self._socket is not None
        before = self._socket.gettimeout()
        self._socket.settimeout(timeout)
        try:  # that there are bytes does not tell: TLS sends some of its own
            self._receive()
        except (BlockingIOError, TimeoutError, SSLWantReadError):
            return False
        finally:
            self._socket.settimeout(before)
        return True

    def read_response(self, disable_decoding: bool = False, timeout: object = None, **_: object) -> Any:
        kind, rest = self._read_line()
        match kind:
            case b"+":
                return rest
            case b":":
                return _number(rest)
            case b"$":
                return None if rest == b"-1" else self._read_string(_number(rest))
            case b"*":
                return None if rest == b"-1" else [self.read_response() for _ in range(_number(rest))]
            case b"-":
                error = self.parse_error(rest.decode(errors="replace"))
                if isinstance(error, redis.ConnectionError):
                    raise error
                return error
        raise redis.InvalidResponse(f"a reply of kind {kind!r} from the server")

    def _read_line(self) -> tuple[bytes, bytes]:
        """(kind, rest) of the next line."""
        while (end := self._lines.find(b"\r\n", self._start, self._end)) < 0:
            if self._end - self._start > _LINES // 2:
                raise redis.InvalidResponse("a line without an end from the server")
            self._receive()
        line, self._start = bytes(self._lines[self._start : end]), end + 2
        return line[:1], line[1:]

    def _read_string(self, length: int) -> bytes | memoryview:
        if not 0 <= length <= _MAX_BULK:
            raise redis.InvalidResponse(f"a string of {length} bytes from the server")
        if length < _BULK:
            while self._end - self._start < length + 2:
                self._receive()
            value, self._start = bytes(self._lines[self._start : self._start + length]), self._start + length + 2
            return value
        value = self._pool.take(length)
        filled = min(length, self._end - self._start)
        value[:filled] = self._lines[self._start : self._start + filled]
        self._start += filled
        while filled < length:
            filled += self._count(self._socket.recv_into(value[filled:]))
        while self._end - self._start < 2:
            self._receive()
        self._start += 2
        return value

    def _receive(self) -> None:
        """Get more lines, those not yet read moved to the front."""
        left = self._end - self._start
        self._lines[:left] = self._lines[self._start : self._end]
        self._start, self._end = 0, left
        with memoryview(self._lines) as lines:
            self._end += self._count(self._socket.recv_into(lines[left:]))

    def _count(self, received: int) -> int:
        if not received:
            raise redis.ConnectionError("the server closed the connection")
        return received


def _number(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise redis.InvalidResponse(f"{text[:20]!r} where a number was due from the server") from None


class _BulkConnection:
    """Any of redis-py's connections with this parser, also where its cluster client sets another."""

    def set_parser(self, parser_class: type[BaseParser]) -> None:
        super().set_parser(BulkParser)  # type: ignore[misc]


def open_client(url: str, timeout_s: float, cluster: bool = False) -> redis.Redis | RedisCluster:
    """A client whose connections can `get_bulk` and `set_bulk`; does not connect, unless to a cluster.

    Raises ValueError for a url that is none, redis.RedisError for a cluster that does not answer.
    """
    options = read_url(url)
    base = options.pop("connection_class", Connection)
    common: dict[str, Any] = {
        "connection_class": type(f"Bulk{base.__name__}", (_BulkConnection, base), {}),
        "protocol": 2,
        "driver_info": None,  # saying who connects would take two round trips
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
    }
    if cluster:
        if issubclass(base, SSLConnection):  # the class in the url would win over ours
            url = url.replace("rediss://", "redis://", 1)
        return RedisCluster.from_url(url, retry=Retry(NoBackoff(), 0), **common)
    return redis.Redis(connection_pool=ConnectionPool(retry=Retry(NoBackoff(), 0), **common | options))


def get_bulk(client: redis.Redis, names: Sequence[str]) -> list[Buffer | Exception | None]:
    """The values, in one round trip; an error reply takes the place of its value. Raises redis.RedisError, OSError."""
    command = b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(name), name) for name in map(str.encode, names))
    return _exchange(client, [command], len(names))


def set_bulk(client: redis.Redis, items: Sequence[tuple[str, Buffer]], ttl_s: int) -> list[object]:
    """Set the values in one round trip, without copying them; an error reply takes the place of its result.

    Raises redis.RedisError, OSError.
    """
    chunks: list[Buffer] = []
    end, life = b"", b"\r\n$2\r\nEX\r\n$%d\r\n%d\r\n" % (len(str(ttl_s)), ttl_s)
    for name, value in items:
        encoded = name.encode()
        start = b"%s*5\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n" % (end, len(encoded), encoded, len(value))
        view = memoryview(value)
        chunks += [start, *(view[at : at + _SENT_AT_ONCE] for at in range(0, len(view), _SENT_AT_ONCE))]
        end = life
    return _exchange(client, [*chunks, end], len(items))


def _exchange(client: redis.Redis, chunks: Sequence[Buffer], replies: int) -> list[Any]:
    pool = client.connection_pool
    connection = pool.get_connection()
    try:
        connection.send_packed_command(chunks)
        return [_read_reply(connection) for _ in range(replies)]
    except BaseException:
        connection.disconnect()  # replies may still be on their way
        raise
    finally:
        pool.release(connection)


def _read_reply(connection: Any) -> Any:
    try:
        return connection.read_response(disconnect_on_error=False)
    except redis.ConnectionError:
        raise
    except redis.ResponseError as error:
        return error

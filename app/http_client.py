"""An HTTP client of the service, for the command line and for programs. Independent of the service's own modules.

Start at `open_service`.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import httpx

UPLOAD_TIMEOUT_S = 3600.0
ANSWER_TIMEOUT_S = 600.0


class CommandFailed(RuntimeError):
    """A command failed; the message is for people. `code`: that of the service's problem, if any."""

    def __init__(self, message: str, code: str = "failed") -> None:
        self.code = code
        super().__init__(message)


class Service:
    """A connection to a service."""

    def __init__(self, http: httpx.Client, max_wait_s: float = 60.0) -> None:
        self._http, self._max_wait_s = http, max_wait_s

    def close(self) -> None:
        self._http.close()

    def request(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of a successful response, None if empty. Raises CommandFailed with the problem's detail."""
        response = self._ask(method, path, **options)
        _raise_for_problem(response)
        try:
            return response.json() if response.content else None
        except ValueError as error:
            raise CommandFailed(f"{self._http.base_url} answers, but is no Jamba RAG; check the address") from error

    def checks(self) -> dict[str, str]:
        """The state of each component by /readyz, whether ready or not; empty if the response has none. Raises
        CommandFailed if the service does not answer."""
        try:
            return dict(self._ask("GET", "/readyz").json()["checks"])
        except (ValueError, KeyError, TypeError):  # for instance a proxy's error page
            return {}

    def upload(self, path: Path, fields: dict[str, str]) -> dict[str, Any]:
        """Upload one file, streamed from disk. Raises CommandFailed, and OSError where it cannot be read."""
        if path.exists() and not path.is_file():  # a pipe has no length, and may have no end
            raise CommandFailed("this is no file; write what comes from it into one and send that", "unreadable_file")
        with path.open("rb") as file:
            files = {"file": (path.name, _FileAsItIs(file), "application/octet-stream")}
            return self.request("POST", "/v1/documents", files=files, data=fields, timeout=UPLOAD_TIMEOUT_S)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(type, data) of each event of the response, including `answer.progress`. Raises CommandFailed."""
        options = {"json": body, "headers": {"Prefer": "progress"}, "timeout": ANSWER_TIMEOUT_S}
        try:
            with closing(self._send("POST", path, stream=True, **options)) as response:
                if not response.is_success:
                    response.read()
                    _raise_for_problem(response)
                yield from _read_events(response.iter_lines())
        except httpx.HTTPError as error:
            raise CommandFailed(f"{self._http.base_url} broke off: {error}") from error

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self._send(method, path, **options)
        except httpx.HTTPError as error:
            raise CommandFailed(f"{self._http.base_url} does not answer ({_plain(error)}): is it running?") from error

    def _send(self, method: str, path: str, stream: bool = False, **options: Any) -> httpx.Response:
        """The response; retried after `Retry-After` if the service is busy, for up to `max_wait_s` in total."""
        waited_s = 0.0
        while True:
            response = self._http.send(self._http.build_request(method, path, **options), stream=stream)
            pause_s = _pause_before_retry(response)
            if pause_s is None or waited_s + pause_s > self._max_wait_s:
                return response
            response.close()
            time.sleep(pause_s)
            waited_s += pause_s
            for part in options.get("files", {}).values():
                part[1].seek(0)


class _FileAsItIs:
    """An open file, of which nothing is read that is appended from now on, as to a log. `read` raises OSError if it
    becomes shorter."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size

    def read(self, nbytes: int) -> bytes:
        wanted = min(nbytes, self._size - self._file.tell())
        data = self._file.read(wanted)
        if len(data) < wanted:
            raise OSError("the file became shorter while it was sent; send it again")
        return data

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset + (self._size if whence == os.SEEK_END else 0))


def _pause_before_retry(response: httpx.Response) -> float | None:
    """Seconds to wait before a retry; None: do not retry."""
    value = response.headers.get("retry-after", "")
    return float(value) if response.status_code in (429, 503) and value.isdecimal() else None


def _raise_for_problem(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        problem = response.json()
        detail, code = problem["detail"], problem.get("code", "failed")
    except (ValueError, KeyError):
        detail, code = response.text[:500] or response.reason_phrase, "failed"
    raise CommandFailed(f"{detail} (status {response.status_code})", code)


def _read_events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = ""
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)


@contextmanager
def open_service(url: str, key: str | None) -> Iterator[Service]:
    """Connect to the service at `url`. Raises CommandFailed if that is not an HTTP URL."""
    if not url.startswith(("http://", "https://")):
        raise CommandFailed(f"{url!r} is no address of a service; write it as http://host:port")
    with httpx.Client(base_url=url, headers=sign_in(key), timeout=ANSWER_TIMEOUT_S) as http:
        yield Service(http)


def sign_in(key: str | None) -> dict[str, str]:
    """The authentication headers for a key. Raises CommandFailed if it has invalid characters."""
    if key is not None and not (key.isascii() and key.isprintable()):
        raise CommandFailed("the key holds a character that keys do not have; copy it once more")
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def _plain(error: httpx.HTTPError) -> str:
    """The error message without its errno."""
    return re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__

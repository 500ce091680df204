"""Clients that begin a body and never end it: a real socket each."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPResponse

import httpx
import pytest
from app_kit import make_settings, serving

from app.uploads import MAX_UPLOADS_AT_ONCE

HALF = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
PART = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="half.txt"\r\n\r\nthe first half'


@pytest.fixture(scope="module")
def service(tiny_checkpoint, tmp_path_factory) -> Iterator[httpx.Client]:
    data = tmp_path_factory.mktemp("stalled") / "data"
    server, ingest = {"stall_s": 2, "keepalive_s": 0.5}, {"workers": 0}
    with serving(make_settings(tiny_checkpoint, data, server=server, ingest=ingest)) as url:
        headers = {"Authorization": f"Bearer {(data / 'admin.key').read_text().strip()}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            yield client


def send_half(
    service: httpx.Client, path: str, kind: str, half: bytes, length: int = 1000, key: str | None = None
) -> socket.socket:
    """A connection on which a request was begun whose body is of this length."""
    connection = socket.create_connection((service.base_url.host, service.base_url.port), timeout=60)
    authorization = service.headers["Authorization"] if key is None else f"Bearer {key}"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {authorization}\r\n"
    connection.sendall(f"{head}Content-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode() + half)
    return connection


def read_refusal(connection: socket.socket) -> tuple[HTTPResponse, dict]:
    response = HTTPResponse(connection)
    response.begin()
    problem = json.loads(response.read())
    assert connection.recv(1) == b"", "the rest of the body would be taken for a request"
    return response, problem


def test_uploads_that_stall_make_room_for_others(service):
    with ExitStack() as stack:
        form = ("/v1/documents", "multipart/form-data; boundary=cut", PART)
        stalled = [stack.enter_context(closing(send_half(service, *form))) for _ in range(MAX_UPLOADS_AT_ONCE)]
        reply = service.post("/v1/documents", files={"file": ("whole.txt", b"all of it")})
        assert reply.status_code == 202
        for connection in stalled:
            response, problem = read_refusal(connection)
            assert (response.status, problem["code"]) == (408, "request_timeout")
            assert response.headers["content-type"] == "application/problem+json"
    assert [document["filename"] for document in service.get("/v1/documents").json()["data"]] == ["whole.txt"]


@pytest.mark.parametrize("half", [b"", b'{"question": "Who'])
def test_a_question_that_stalls_is_given_up(service, half):
    with closing(send_half(service, "/v1/answers", "application/json", half)) as connection:
        response, problem = read_refusal(connection)
    assert (response.status, problem["code"], problem["status"]) == (408, "request_timeout", 408)
    assert "2 s" in problem["detail"]


@pytest.mark.parametrize(("half", "requests"), [(b"", 0), (HALF, 0), (HALF, 1)])
def test_a_connection_that_brings_no_request_is_closed(service, half, requests):
    """Whether it brought some before or not."""
    address = service.base_url.host, service.base_url.port
    with socket.create_connection(address, timeout=60) as connection:
        for _ in range(requests):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            response = HTTPResponse(connection)
            response.begin()
            assert response.read()
        connection.sendall(half)
        assert connection.recv(1) == b""


def test_who_has_sent_all_may_wait_for_longer(service):
    """For the events of a document that nobody ingests."""
    document = service.post("/v1/documents", files={"file": ("other.txt", b"another one")}).json()["data"][0]
    with service.stream("GET", f"/v1/documents/{document['id']}/events") as response:
        lines = filter(": keepalive".__eq__, response.iter_lines())
        assert len([next(lines) for _ in range(6)]) == 6


def test_a_key_revoked_while_the_question_is_sent_gets_no_answer(service):
    made = service.post("/v1/keys", json={"name": "short", "role": "reader"}).json()
    body = json.dumps({"question": "Who wrote it?"}).encode()
    begun = send_half(service, "/v1/answers", "application/json", body[:5], len(body), made["key"])
    with closing(begun) as connection:
        time.sleep(0.5)  # it is let in
        assert service.delete(f"/v1/keys/{made['id']}").status_code == 204
        connection.sendall(body[5:])
        response = HTTPResponse(connection)
        response.begin()
        assert (response.status, json.loads(response.read())["code"]) == (401, "unauthorized")


def test_who_still_sends_what_was_refused_can_read_why(service):
    """For longer than a client that sends nothing is waited for."""
    pieces = 12
    begun = send_half(service, "/v1/answers", "application/json", b"", pieces * 1000, "no-key")
    with closing(begun) as connection:
        for _ in range(pieces):
            connection.sendall(bytes(1000))
            time.sleep(0.5)
        response = HTTPResponse(connection)
        response.begin()
        assert (response.status, json.loads(response.read())["code"]) == (401, "unauthorized")

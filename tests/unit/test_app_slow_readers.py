"""Clients that read a stream slowly, or not at all: a real socket with small buffers on both sides."""

import json
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractContextManager, aclosing, closing, contextmanager
from http.client import HTTPConnection, HTTPResponse

import httpx
import pytest
from app_kit import LIGHTHOUSE, listening, make_settings, read_events
from fastapi import FastAPI

from app.main import create_app
from app.routes import answers
from app.sse import Event, event_response

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much a client has taken")

SMALL = 4096  # bytes of a buffer
STALL_S = 1
QUESTION = {"question": "Who is the keeper?", "temperature": 2.0, "seed": 3}
PIECE, PIECES = "x" * 4096, 512


@contextmanager
def asking(url: str, method: str = "GET", body: str = "", **headers: str) -> Iterator[HTTPResponse]:
    """One request over a socket with a small receive buffer; the answer waits to be read."""
    target = httpx.URL(url)
    with closing(HTTPConnection(target.host, target.port)) as connection, socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        plain.settimeout(30)
        plain.connect((target.host, target.port))
        connection.sock = plain
        connection.request(method, target.path, body, headers)
        yield connection.getresponse()


def read_slowly(response: HTTPResponse, pause_s: float) -> list[tuple[str, dict]]:
    received = b""
    while piece := response.read(SMALL):
        received += piece
        time.sleep(pause_s)
    return read_events(received.decode())


@contextmanager
def streaming(stall_s: float = STALL_S) -> Iterator[tuple[str, list[int], threading.Event]]:
    """A stream of 2 MB: its URL, how many events were made of it so far, and whether it was given up."""
    app, made, ended = FastAPI(), [0], threading.Event()

    async def events() -> AsyncGenerator[Event, None]:
        try:
            for made[0] in range(1, PIECES + 1):
                yield Event("piece", {"text": PIECE})
        finally:
            ended.set()

    app.get("/stream")(lambda: event_response(events(), keepalive_s=60))
    app.get("/other")(lambda: {})
    with listening(app, stall_s) as (url, listener):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        yield url, made, ended


def test_what_is_made_waits_for_who_reads_it_and_others_do_not():
    with streaming(stall_s=60) as (url, made, ended), asking(f"{url}/stream") as response:
        response.read(SMALL)
        time.sleep(0.3)
        ahead = made[0]
        assert 0 < ahead * len(PIECE) < 1 << 20, "only what fits into the buffers is made"
        with httpx.Client(base_url=url, timeout=30) as other:
            for _ in range(20):
                other.get("/other").raise_for_status()
        assert made[0] == ahead and not ended.is_set()


def test_a_slow_reader_gets_all_of_it():
    with streaming() as (url, made, _), asking(f"{url}/stream") as response:
        events = read_slowly(response, 0.006)  # for longer than the limit, but it reads
        assert len(events) == made[0] == PIECES and {data["text"] for _, data in events} == {PIECE}


def test_a_client_that_never_reads_is_cut_off():
    with streaming() as (url, made, ended), asking(f"{url}/stream"):
        start = time.perf_counter()
        assert ended.wait(10 * STALL_S)
        assert time.perf_counter() - start >= STALL_S / 2 and made[0] < PIECES


async def padded(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """The events of an answer, among others that fill the buffers."""
    async with aclosing(events):
        async for event in events:
            yield event
            yield Event("padding", {"text": 16 * PIECE})


@pytest.fixture(scope="module")
def service(tiny_checkpoint, tmp_path_factory) -> Iterator[httpx.Client]:
    """A service with a document, whose answers are larger than all buffers."""
    data = tmp_path_factory.mktemp("slow") / "data"
    app = create_app(make_settings(tiny_checkpoint, data))
    with pytest.MonkeyPatch.context() as patched, listening(app, STALL_S) as (url, listener):
        patched.setattr(answers, "event_response", lambda events, *more: event_response(padded(events), *more))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        headers = {"Authorization": f"Bearer {(data / 'admin.key').read_text().strip()}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            document = client.post("/v1/documents", files={"file": ("a.md", LIGHTHOUSE.encode())}).json()["data"][0]
            client.get(f"/v1/documents/{document['id']}/events")
            client.post("/v1/answers", json=QUESTION).raise_for_status()
            yield client


def ask_slowly(client: httpx.Client) -> AbstractContextManager[HTTPResponse]:
    headers = {"Authorization": client.headers["Authorization"], "Content-Type": "application/json"}
    return asking(str(client.base_url.join("/v1/answers")), "POST", json.dumps(QUESTION | {"stream": True}), **headers)


def pending(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("jamba_rag_answers_pending")).split()[1])


def ask(client: httpx.Client) -> tuple[str, float]:
    """The text of the answer, and how long it took."""
    start = time.perf_counter()
    reply = client.post("/v1/answers", json=QUESTION).raise_for_status()
    return reply.json()["text"], time.perf_counter() - start


def test_an_answer_read_slowly_is_the_same_and_delays_nobody(service):
    alone = min(ask(service)[1] for _ in range(3))
    with ask_slowly(service) as response:
        beside = [ask(service) for _ in range(3)]
        assert pending(service) == 1
        events = read_slowly(response, 0.002)
    assert events[-2][0] == "answer.completed"
    texts = {"".join(data["text"] for kind, data in events if kind == "answer.text.delta")}
    assert texts == {text for text, _ in beside}
    assert min(seconds for _, seconds in beside) < 3 * alone


def test_an_answer_that_nobody_reads_gives_its_place_back(service):
    with ask_slowly(service):
        assert pending(service) == 1
        start = time.perf_counter()
        while pending(service):
            assert time.perf_counter() - start < 10 * STALL_S
            time.sleep(0.05)
    assert ask(service)[0]

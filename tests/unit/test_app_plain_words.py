"""What is wrong is said in the words of whoever asked, and what to do about it."""

import subprocess
import sys

import pytest
from app_kit import GARDEN

from app.http_client import CommandFailed, Service, httpx
from app.settings import SettingsError, load_settings

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"question": "x", "colections": ["a"]}, "there is no field 'colections'; the nearest is 'collections'"),
        ({"question": "x", "zzz": 1}, "there is no field 'zzz'; those known are question, messages, collections"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "there is no field 'messages.0.name'"),
        ({"question": 5}, "question: must be text"),
        ({"question": "x", "mode": "best"}, "mode: must be 'auto', 'rag' or 'full_context'"),
        ({"question": "x", "messages": []}, "messages: must have at least 1 item, not 0"),
        ({"question": "x", "filters": []}, "filters: must be a JSON object"),
        (
            {"question": "x", "filters": {"type": "eq", "key": "year", "value": 2024}},
            'filters: must map metadata keys to values: {"key": "value"}; comparison objects are not supported',
        ),
        ({"question": "x", "collections": "a"}, "collections: must be a list"),
        ({"question": "x", "seed": "a"}, "seed: must be a whole number"),
        ({"question": "x", "stream": "often"}, "stream: must be true or false"),
        ([], "body: must be a JSON object"),
    ],
)
async def test_a_wrong_body_is_told_in_plain_words(client, body, said):
    reply = await client.post("/v1/answers", json=body)
    assert reply.status_code == 422 and reply.json()["detail"].startswith(said), reply.json()["detail"]


async def test_a_wrong_body_in_openais_shape_is_told_in_plain_words(client):
    body = {"messages": [{"role": "user", "content": 5}]}
    reply = await client.post("/v1/chat/completions", json=body)
    assert reply.json()["error"]["message"] == "model: is missing; messages.0.content: must be text"


async def test_a_path_that_is_not_there_and_a_method_that_is_not_taken_name_what_is(client):
    assert "/docs lists all calls" in (await client.post("/v1/answer", json={})).json()["detail"]
    assert "this path takes GET, POST" in (await client.patch("/v1/documents")).json()["detail"]
    reply = await client.get("/v1/documents/doc_x/chunks", params={"limit": 2})
    assert reply.json()["detail"].endswith("/chunks takes none")


async def test_an_answer_from_nothing_says_why(client):
    await client.upload("garden.txt", GARDEN, metadata='{"year": 2024}')

    async def text(**body) -> str:
        answer = (await client.post("/v1/answers", json={"question": "Where is the moss?", **body})).json()
        assert answer["grounding"] == "not_found" and not answer["usage"]["input_tokens"]
        return answer["text"]

    assert await text(filters={"year": 1999}) == "No document has the metadata that the filters ask for."
    await client.post("/v1/collections", json={"name": "bare"})
    assert await text(collections=["bare"]) == "There are no documents to answer this from."


async def test_an_answer_before_the_documents_are_read_says_so(client, monkeypatch):
    store = client.app.state.service.store
    (known,) = [one for one in store.list_collections() if one.name == "default"]
    await client.post("/v1/collections", json={"name": "later"})
    waiting = type(known)("later", 0, 0, 0, 1, 0, 0.0)
    monkeypatch.setattr(store, "list_collections", lambda: [known, waiting])
    answer = (await client.post("/v1/answers", json={"question": "x", "collections": ["later"]})).json()
    assert answer["text"] == "The documents are still being read; ask again when they are ready."


def test_a_service_that_is_not_there_is_asked_after_without_numbers_of_the_system():
    with pytest.raises(CommandFailed, match=r"does not answer \(Connection refused\): is it running\?"):
        Service(httpx.Client(base_url="http://127.0.0.1:1"), max_wait_s=0).request("GET", "/readyz")


def test_the_command_runs_as_a_module_too():
    done = subprocess.run([sys.executable, "-m", "app.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("jamba-rag ")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SERVER__PORT", "http", "must be a whole number"),
        ("SERVER__PORT", "99999", "must be less than or equal to 65535"),
    ],
)
def test_a_wrong_setting_is_told_in_plain_words(monkeypatch, name, value, said):
    monkeypatch.setenv(f"JAMBA_RAG_{name}", value)
    with pytest.raises(SettingsError, match=f"JAMBA_RAG_{name}: {said}"):
        load_settings(env_file=None)

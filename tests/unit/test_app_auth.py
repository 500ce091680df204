"""Keys: every call with every kind of key gives what its role and collections allow, and no more."""

import asyncio
import hashlib
import hmac
import os
import re
import stat

import pytest
from app_kit import GARDEN, LIGHTHOUSE, make_settings, read_events, running_service

from app.auth import Unauthorized, hash_key, new_key

pytestmark = pytest.mark.anyio

OPEN = ("/healthz", "/readyz")
UNDESCRIBED = {"/", "/docs", "/openapi.json", "/web"}  # the page, the API's description and their files: open to all
READER, WRITER, ADMIN = 0, 1, 2
# (method, path, lowest role, body, names a collection or document)
CALLS = [
    ("GET", "/v1/documents", READER, None, False),
    ("POST", "/v1/documents", WRITER, "upload", True),
    ("GET", "/v1/documents/{document_id}", READER, None, True),
    ("GET", "/v1/documents/{document_id}/events", READER, None, True),
    ("GET", "/v1/documents/{document_id}/file", READER, None, True),
    ("GET", "/v1/documents/{document_id}/text", READER, None, True),
    ("GET", "/v1/documents/{document_id}/chunks", READER, None, True),
    ("GET", "/v1/documents/{document_id}/pages/{page}/image", READER, None, True),
    ("PUT", "/v1/documents/{document_id}", WRITER, "upload", True),
    ("POST", "/v1/documents/{document_id}/retry", WRITER, None, True),
    ("DELETE", "/v1/documents/{document_id}", WRITER, None, True),
    ("GET", "/v1/collections", READER, None, False),
    ("POST", "/v1/collections", WRITER, {"name": "fresh"}, False),
    ("GET", "/v1/collections/{name}", READER, None, True),
    ("DELETE", "/v1/collections/{name}", WRITER, None, True),
    ("POST", "/v1/search", READER, {"query": "Who?", "collections": ["{name}"]}, True),
    ("POST", "/v1/answers", READER, {"question": "Who?", "collections": ["{name}"]}, True),
    (
        *("POST", "/v1/chat/completions", READER),
        {"model": "jamba-rag/{name}", "messages": [{"role": "user", "content": "Who?"}]},
        True,
    ),
    ("GET", "/v1/models", READER, None, False),
    ("GET", "/v1/models/{model}", READER, None, True),
    ("GET", "/v1/keys", ADMIN, None, False),
    ("POST", "/v1/keys", ADMIN, {"name": "k"}, False),
    ("DELETE", "/v1/keys/{key_id}", ADMIN, None, False),
    ("GET", "/v1/config", ADMIN, None, False),
    ("GET", "/metrics", READER, None, False),
]


@pytest.fixture(scope="module")
async def keys(client) -> dict[str, str]:
    await client.post("/v1/collections", json={"name": "own"})
    await client.post("/v1/collections", json={"name": "foreign"})
    made = {}
    for role in ("reader", "writer", "admin"):
        for kind, collections in (("free", None), ("bound", ["own"])):
            body = {"name": f"{kind} {role}", "role": role, "collections": collections}
            made[f"{kind} {role}"] = (await client.post("/v1/keys", json=body)).json()["key"]
    return made


@pytest.fixture(scope="module")
async def documents(client, keys) -> dict[str, str]:
    return {
        "own": (await client.upload("own.md", LIGHTHOUSE, collection="own"))["id"],
        "foreign": (await client.upload("foreign.md", GARDEN, collection="foreign"))["id"],
    }


def fill(value, name: str, document_id: str):
    if isinstance(value, str):
        values = {"{name}": name, "{document_id}": document_id, "{model}": f"jamba-rag/{name}", "{key_id}": "key_none"}
        values["{page}"] = "1"
        return re.sub(r"\{\w+\}", lambda found: values[found[0]], value)
    if isinstance(value, dict):
        return {key: fill(item, name, document_id) for key, item in value.items()}
    return [fill(item, name, document_id) for item in value] if isinstance(value, list) else value


async def call(client, key: str | None, method: str, path: str, body, name: str, document_id: str):
    headers = {"Authorization": f"Bearer {key}" if key else ""}
    url = fill(path, name, document_id)
    if body == "upload":
        fields = {"collection": name} if method == "POST" else {}
        return await client.request(method, url, headers=headers, files={"file": ("x.bin", b"MZ")}, data=fields)
    return await client.request(method, url, headers=headers, json=fill(body, name, document_id) if body else None)


def test_every_call_is_tested(client):
    described = {(method.upper(), path) for path, item in client.app.openapi()["paths"].items() for method in item} - {
        ("GET", path) for path in OPEN
    }
    tested = {(method, path.replace("{model}", "{model}")) for method, path, *_ in CALLS}
    assert {(m, re.sub(r":path", "", p)) for m, p in described} == tested
    routers = [getattr(route, "original_router", None) for route in client.app.routes]
    routes = [*client.app.routes, *(route for router in routers if router for route in router.routes)]
    paths = {re.sub(r":path", "", route.path) for route in routes if hasattr(route, "path")}
    assert paths - set(client.app.openapi()["paths"]) == UNDESCRIBED


@pytest.mark.parametrize("key", [None, "", "jrk_wrong", "Basic x"])
@pytest.mark.parametrize(("method", "path", "role", "body", "named"), CALLS)
async def test_without_a_valid_key_every_call_is_401(client, documents, key, method, path, role, body, named):
    reply = await call(client, key, method, path, body, "own", documents["own"])
    assert (reply.status_code, reply.json()["code"]) == (401, "unauthorized")
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path", "role", "body", "named"), [c for c in CALLS if c[2] > READER])
async def test_a_role_that_is_too_low_is_403(client, keys, documents, method, path, role, body, named):
    for low in ("reader", "writer")[:role]:
        for kind in ("free", "bound"):
            reply = await call(client, keys[f"{kind} {low}"], method, path, body, "own", documents["own"])
            assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")
    if role == ADMIN:
        reply = await call(client, keys["bound admin"], method, path, body, "own", documents["own"])
        assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")


@pytest.mark.parametrize(("method", "path", "role", "body", "named"), [c for c in CALLS if c[4]])
async def test_what_a_bound_key_may_not_see_is_404(client, keys, documents, method, path, role, body, named):
    for kind in ("bound writer", "bound admin"):
        reply = await call(client, keys[kind], method, path, body, "foreign", documents["foreign"])
        assert reply.status_code == 404, reply.text
        assert "foreign.md" not in reply.text
        missing = await call(client, keys[kind], method, path, body, "none", "doc_none")
        assert reply.json()["code"] == missing.json()["code"]
    assert (await client.get(f"/v1/documents/{documents['foreign']}")).status_code == 200


async def test_lists_and_searches_of_a_bound_key_hold_only_its_collections(client, keys, documents):
    headers = {"Authorization": f"Bearer {keys['bound reader']}"}
    listed = (await client.get("/v1/documents", headers=headers)).json()["data"]
    assert [document["collection"] for document in listed] == ["own"]
    collections = (await client.get("/v1/collections", headers=headers)).json()["data"]
    assert [collection["name"] for collection in collections] == ["own"]
    models = (await client.get("/v1/models", headers=headers)).json()["data"]
    assert [model["id"] for model in models] == ["jamba-rag/own"]
    found = (await client.post("/v1/search", headers=headers, json={"query": "roses in the garden"})).json()["data"]
    assert {hit["document_id"] for hit in found} == {documents["own"]}
    answer = (await client.post("/v1/answers", headers=headers, json={"question": "Which roses?"})).json()
    assert {source["document_id"] for source in answer["sources"]} == {documents["own"]}


async def test_no_score_of_a_bound_key_tells_which_words_others_have(client, keys, documents):
    """How rare a word is decides the scores and the order of hits."""

    async def find(mode: str) -> list:
        headers = {"Authorization": f"Bearer {keys['bound reader']}"}
        reply = await client.post("/v1/search", headers=headers, json={"query": "Moira Campbell 1972", "mode": mode})
        return [(hit["chunk_id"], hit["score"]) for hit in reply.json()["data"]]

    for number in range(30):
        await client.upload(f"{number}.md", f"Some words {number} of others", collection="foreign")
    before = {mode: await find(mode) for mode in ("lexical", "dense", "hybrid")}
    for number in range(30):
        await client.upload(f"m{number}.md", f"Moira Campbell since 1972: {number}", collection="foreign")
    for mode, hits in before.items():
        assert [hit[0] for hit in await find(mode)] == [hit[0] for hit in hits]
        assert [hit[1] for hit in await find(mode)] == pytest.approx(
            [hit[1] for hit in hits], rel=0.1
        )  # average length


async def test_lists_say_whether_a_key_may_add_to_them(client, keys):
    for path, adders in {"collections": {"free"}, "documents": {"free", "bound"}}.items():
        for name, key in keys.items():
            reply = await client.get(f"/v1/{path}", headers={"Authorization": f"Bearer {key}"})
            kind, role = name.split()
            assert reply.headers["Allow"] == ("GET, POST" if kind in adders and role != "reader" else "GET"), name


async def test_a_bound_key_makes_no_collections_and_reads_no_metrics(client, keys):
    headers = {"Authorization": f"Bearer {keys['bound admin']}"}
    assert (await client.post("/v1/collections", headers=headers, json={"name": "more"})).status_code == 403
    assert (await client.get("/metrics", headers=headers)).status_code == 403


async def test_a_revoked_key_is_dead_at_once(client):
    made = (await client.post("/v1/keys", json={"name": "short", "role": "reader"})).json()
    headers = {"Authorization": f"Bearer {made['key']}"}
    assert (await client.get("/v1/documents", headers=headers)).status_code == 200
    assert (await client.delete(f"/v1/keys/{made['id']}")).status_code == 204
    assert (await client.get("/v1/documents", headers=headers)).status_code == 401
    assert (await client.delete(f"/v1/keys/{made['id']}")).status_code == 404


async def test_a_revoked_key_watches_no_longer(tiny_checkpoint, tmp_path, monkeypatch):
    settings = make_settings(tiny_checkpoint, tmp_path / "data", ingest={"workers": 0})
    async with running_service(settings) as client:
        reply = await client.post("/v1/documents", files={"file": ("a.txt", b"never read")})
        document_id = reply.json()["data"][0]["id"]
        made = (await client.post("/v1/keys", json={"name": "watcher"})).json()
        headers = {"Authorization": f"Bearer {made['key']}"}
        authenticator, looks = client.app.state.authenticator, []
        check = authenticator.check_in_force
        monkeypatch.setattr(authenticator, "check_in_force", lambda who: looks.append(who) or check(who))
        watching = asyncio.create_task(client.get(f"/v1/documents/{document_id}/events", headers=headers))
        while len(looks) < 3:
            await asyncio.sleep(0.01)
            assert not watching.done()
        await client.delete(f"/v1/keys/{made['id']}")
        *_, (kind, problem) = read_events((await watching).text)
        assert (kind, problem["code"]) == ("document.failed", "unauthorized")


async def test_no_key_is_compared_in_a_time_that_tells_how_much_of_it_is_right(client, monkeypatch):
    """The check of a key takes one time for all; behind it only hashes are looked up, which nobody can choose."""
    authenticator = client.app.state.authenticator
    compared, looked_up = [], []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return constant_time(left, right)

    def find_key(key_hash: str) -> None:
        looked_up.append(key_hash)

    constant_time = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    monkeypatch.setattr(client.app.state.service.store, "find_key", find_key)
    right = (client.app.state.settings.data_dir / "admin.key").read_text().strip()
    wrong = right[:-1] + ("A" if right[-1] != "A" else "B")
    unknown = new_key(authenticator._salt)
    for key in (wrong, unknown):
        with pytest.raises(Unauthorized):
            authenticator.authenticate(f"Bearer {key}")
    assert [(len(left), len(right)) for left, right in compared] == [(8, 8), (8, 8)]
    assert compared[0][0] == wrong[-8:].encode() and compared[1][0] == compared[1][1]
    assert looked_up == [hashlib.sha256(wrong.encode()).hexdigest(), hash_key(unknown, authenticator._salt)]


async def test_the_first_start_writes_the_admin_key_once_and_keeps_its_hash(client, caplog):
    data_dir = client.app.state.settings.data_dir
    path = data_dir / "admin.key"
    key = path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_uid == os.getuid()
    assert client.app.state.authenticator.authenticate(f"Bearer {key}").role == "admin"
    for file in data_dir.iterdir():
        if file.is_file() and file != path:
            assert key.encode() not in file.read_bytes()


async def test_a_second_start_makes_no_new_key_and_says_where_the_first_one_was(tiny_checkpoint, tmp_path, caplog):
    settings = make_settings(tiny_checkpoint, tmp_path / "data")
    caplog.set_level("INFO")
    async with running_service(settings) as first:
        key = (settings.data_dir / "admin.key").read_text().strip()
    assert str(settings.data_dir / "admin.key") in caplog.text and key not in caplog.text
    (settings.data_dir / "admin.key").unlink()
    async with running_service(settings, key) as again:
        assert (await again.get("/v1/keys")).status_code == 200
    assert not (settings.data_dir / "admin.key").exists()
    assert first is not again


async def test_without_auth_everyone_is_an_admin(tiny_checkpoint, tmp_path):
    settings = make_settings(tiny_checkpoint, tmp_path / "data", auth={"enabled": False})
    async with running_service(settings, "none") as client:
        del client.headers["Authorization"]
        for host in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
            assert (await client.get("/v1/config", headers={"Host": host})).status_code == 200
        # what pages of other sites can send: under a name that they let lead here, and from forms
        for host in ("evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "::1"):
            reply = await client.get("/v1/config", headers={"Host": host})
            assert (reply.status_code, reply.json()["code"]) == (403, "forbidden")
        for site, status in {"cross-site": 403, "same-site": 403, "same-origin": 202, "none": 200}.items():
            headers = {"Host": "localhost", "Sec-Fetch-Site": site}
            reply = await client.post("/v1/documents", headers=headers, files={"file": ("a.txt", b"planted")})
            assert reply.status_code == status
    assert not (settings.data_dir / "admin.key").exists()


async def test_a_mistyped_collection_is_told_the_nearest_that_the_key_may_see(client, keys, documents):
    for kind, told in (("free writer", "; the nearest is 'foreign'"), ("bound writer", "; GET /v1/collections lists")):
        headers = {"Authorization": f"Bearer {keys[kind]}"}
        asked = await client.post("/v1/search", json={"query": "x", "collections": ["foreigm"]}, headers=headers)
        files, data = {"file": ("a.txt", b"text")}, {"collection": "foreigm"}
        sent = await client.post("/v1/documents", files=files, data=data, headers=headers)
        for reply in (asked, sent, await client.get("/v1/collections/foreigm", headers=headers)):
            assert (reply.status_code, reply.json()["code"]) == (404, "collection_not_found")
            assert reply.json()["detail"].startswith(f"there is no collection 'foreigm'{told}")

"""What a hostile or careless client sends beyond plain bad input; each finding of an attack on a running service."""

import asyncio
import gzip
import json

import anyio.from_thread
import pytest
from app_kit import LIGHTHOUSE
from test_app_bad_input import assert_problem, upload

from app.middleware import MAX_BODY_BYTES
from app.service import MAX_QUESTION_CHARS

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "content",
    [
        b'{"question": ' + b"[" * 100_000,
        b'{"question": "q", "seed": ' + b"9" * 5000 + b"}",
        b'{"question": "\xff\xfe"}',
        b'{"question": "\\ud800"}',
        b'{"question": "q", "filters": {"year": NaN}}',
    ],
    ids=["deep", "huge-number", "not-utf-8", "half-a-character", "nan"],
)
@pytest.mark.parametrize("path", ["/v1/answers", "/v1/chat/completions"])
async def test_json_that_cannot_be_read_is_an_invalid_request(client, path, content):
    assert_problem(await client.post(path, content=content, headers=JSON), 422, "invalid_request")


async def test_json_sent_as_something_else_is_told_which_header_to_send(client):
    reply = await client.post("/v1/answers", content=b'{"question": "q"}', headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in assert_problem(reply, 422, "invalid_request")["detail"]


@pytest.mark.parametrize("path", ["/v1/answers", "/v1/documents"])
async def test_a_compressed_body_is_refused_with_what_to_do(client, path):
    reply = await client.post(path, content=gzip.compress(b"{}"), headers={**JSON, "Content-Encoding": "gzip"})
    assert "without compression" in assert_problem(reply, 415, "unsupported_media_type")["detail"]


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=b"])
async def test_only_uploads_may_be_large(client, content_type):
    content = b'{"question": "' + b"a" * MAX_BODY_BYTES + b'"}'
    reply = await client.post("/v1/answers", content=content, headers={"Content-Type": content_type})
    assert_problem(reply, 413, "request_too_large")


async def test_a_question_of_any_length_is_too_long_for_the_context(client):
    reply = await client.post("/v1/answers", json={"question": "a" * (MAX_QUESTION_CHARS + 1)})
    assert_problem(reply, 413, "context_too_long")


async def test_text_that_is_too_long_is_counted_in_characters(client):
    detail = assert_problem(await client.post("/v1/search", json={"query": "a" * 40_000}), 422, "invalid_request")
    assert detail["detail"] == "query: must have at most 32768 characters, not 40000"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000"])
@pytest.mark.parametrize("path", ["/", "/v1/documents", "/v1/answers", "/openapi.json"])
async def test_no_page_of_another_site_may_read_a_reply(client, path, origin):
    """CORS is off: without these headers a browser keeps replies from such a page, and never sends its real request."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    preflight = await client.options(path, headers={"Origin": origin, "Authorization": "", **asked})
    assert not preflight.is_success
    others = [await client.request(method, path, headers={"Origin": origin}) for method in ("GET", "POST")]
    for reply in (preflight, *others):
        assert [name for name in reply.headers if name.startswith("access-control-")] == []
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (
            "/v1/collections",
            {"name": "../x"},
            "name: must be letters (a-z), digits, '.', '_' or '-', at most 64, a letter or digit first",
        ),
        ("/v1/keys", {"name": ""}, "name: must have at least 1 character, not 0"),
    ],
)
async def test_names_that_cannot_be_are_told_in_words(client, path, body, told):
    assert assert_problem(await client.post(path, json=body), 422, "invalid_request")["detail"] == told


async def test_no_detail_shows_how_a_field_is_checked(client):
    body = {"model": "jamba-rag/default", "messages": [{"role": "user", "content": 7}]}
    detail = assert_problem(await client.post("/v1/chat/completions", json=body), 422, "invalid_request")["detail"]
    assert detail.startswith("messages.0.content: ") and "[" not in detail and "0x" not in detail


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz"])
async def test_probes_may_ask_for_headers_alone(client, path):
    reply = await client.head(path, headers={"Authorization": ""})
    assert (reply.status_code, reply.content) == (200, b"")


async def test_a_filter_that_cannot_be_one_is_told_in_one_sentence(client):
    reply = await client.post("/v1/search", json={"query": "x", "filters": {"year": {"from": 2020}}})
    assert reply.status_code == 422
    assert reply.json()["detail"] == "filters.year: must be text, a number, true, false, null, or a list of these"


async def test_ranges_are_ignored_not_refused_in_plain_text(client):
    document = await client.upload("ranges.md", LIGHTHOUSE)
    for wanted in ("bytes=0-3", "bytes=999999-", "bytes=9-2", "nonsense"):
        reply = await client.get(f"/v1/documents/{document['id']}/file", headers={"Range": wanted})
        assert (reply.status_code, reply.text) == (200, LIGHTHOUSE)
        assert "accept-ranges" not in reply.headers
    await client.delete(f"/v1/documents/{document['id']}")


async def test_an_original_that_a_client_has_is_not_sent_again(client):
    """Its ETag is its content's: a new version has another one."""
    document = await client.upload("kept.md", LIGHTHOUSE)
    path = f"/v1/documents/{document['id']}/file"
    tag = (await client.get(path)).headers["etag"]
    assert document["sha256"] in tag
    for wanted in (tag, f'"other", W/{tag}', "*"):
        reply = await client.get(path, headers={"If-None-Match": wanted})
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", tag)
        assert reply.headers["content-security-policy"].startswith("sandbox")  # a cache takes it over
    reply = await client.get(path, headers={"If-None-Match": '"other"'})
    assert (reply.status_code, reply.text) == (200, LIGHTHOUSE)
    await client.delete(f"/v1/documents/{document['id']}")


async def test_no_path_leads_to_another_host(client):
    for path in ("/v1/documents/", "/v1/answers/", "/docs/"):
        reply = await client.get(path, headers={"Host": "evil.example"})
        assert_problem(reply, 404, "not_found")
        assert "location" not in reply.headers


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/documents", "GET, POST"),
        ("/v1/documents/doc_none", "GET, PUT, DELETE"),
        ("/healthz", "GET, HEAD"),
        ("/web/api.js", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_told_all_right_ones(client, path, methods):
    reply = await client.request("PATCH", path)
    assert_problem(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == methods


async def test_made_up_methods_are_one_series_of_the_metrics(client):
    for number in range(3):
        assert (await client.request(f"ATTACK{number}", "/healthz")).status_code == 405
    metrics = (await client.get("/metrics")).text
    assert "ATTACK" not in metrics and 'method="other"' in metrics


@pytest.mark.parametrize(
    ("sent", "shown"),
    [("at 9.41\u202fAM.txt", "at 9.41 AM.txt"), ("gnp\u202etxt.txt", "gnptxt.txt"), ("\ufeffa\u00a0b.txt", "a b.txt")],
)
async def test_names_with_unusual_spaces_and_marks_are_taken_and_tamed(client, sent, shown):
    document = await client.upload(sent, f"the file {sent!r}")
    assert document["filename"] == shown
    await client.delete(f"/v1/documents/{document['id']}")


async def test_one_idempotency_key_at_the_same_moment_is_one_upload(client):
    files, headers = {"file": ("race.txt", b"sent by twelve hands")}, {"Idempotency-Key": "race"}
    fields = {"on_conflict": "error"}
    sent = [client.post("/v1/documents", files=files, headers=headers, data=fields) for _ in range(12)]
    replies = await asyncio.gather(*sent)
    assert {reply.status_code for reply in replies} == {202}
    assert len({reply.text for reply in replies}) == 1
    await client.delete(f"/v1/documents/{replies[0].json()['data'][0]['id']}")


async def test_a_new_version_of_the_same_bytes_may_bring_other_metadata(client):
    document = await client.upload("meta.txt", "same bytes", metadata='{"year": 2023}')
    path, files = f"/v1/documents/{document['id']}", {"file": ("meta.txt", b"same bytes")}
    assert (await client.put(path, files=files)).status_code == 200
    assert (await client.put(path, files=files, data={"metadata": '{"year": 2023}'})).status_code == 200
    reply = await client.put(path, files=files, data={"metadata": '{"year": 2024}'})
    assert (reply.status_code, reply.json()["version"], reply.json()["metadata"]) == (202, 2, {"year": 2024})
    assert (await client.settle(document["id"]))["status"] == "ready"
    found = await client.post("/v1/search", json={"query": "bytes", "filters": {"year": 2024}})
    assert [hit["document_id"] for hit in found.json()["data"]] == [document["id"]]
    await client.delete(path)


async def test_a_new_version_of_the_same_bytes_may_bring_another_name(client):
    document = await client.upload("draft.txt", "bytes that get a name", metadata='{"year": 2023}')
    path = f"/v1/documents/{document['id']}"
    reply = await client.put(path, files={"file": ("final.txt", b"bytes that get a name")})
    assert (reply.status_code, reply.json()["filename"]) == (202, "final.txt")
    document = await client.settle(document["id"])
    assert (document["filename"], document["version"], document["metadata"]) == ("final.txt", 2, {"year": 2023})
    found = await client.post("/v1/search", json={"query": "bytes", "document_ids": [document["id"]]})
    assert {hit["filename"] for hit in found.json()["data"]} == {"final.txt"}
    await client.delete(path)


async def test_a_new_version_that_cannot_be_read_leaves_the_old_one_in_its_place(client):
    old = await client.upload("tower.txt", "The old tower leans.")
    broken = {"file": ("tower.pdf", b"%PDF-1.7 of a tower")}
    assert (await client.put(f"/v1/documents/{old['id']}", files=broken)).status_code == 202
    assert (await client.settle(old["id"]))["status"] == "failed"
    file, text = [await client.get(f"/v1/documents/{old['id']}/{what}") for what in ("file", "text")]
    assert (file.text, text.json()["text"]) == ("The old tower leans.",) * 2
    assert "tower.txt" in file.headers["Content-Disposition"] and file.headers["ETag"] == f'"{old["sha256"]}"'


async def test_a_new_version_cannot_move_a_document(client):
    document = await client.upload("stay.txt", "stays where it is")
    files = {"file": ("stay.txt", b"another text")}
    reply = await client.put(f"/v1/documents/{document['id']}", files=files, data={"collection": "default"})
    assert_problem(reply, 422, "invalid_request")
    await client.delete(f"/v1/documents/{document['id']}")


async def test_a_page_cannot_start_after_a_document_that_the_key_may_not_see(client):
    hidden = await client.upload("hidden.txt", "hidden from that key")
    await client.post("/v1/collections", json={"name": "open"})
    made = (await client.post("/v1/keys", json={"name": "bound", "collections": ["open"]})).json()
    headers = {"Authorization": f"Bearer {made['key']}"}
    for after in (hidden["id"], "doc_none"):
        reply = await client.get("/v1/documents", params={"after": after}, headers=headers)
        assert_problem(reply, 404, "document_not_found")
    await client.delete("/v1/collections/open")
    await client.delete(f"/v1/documents/{hidden['id']}")


async def test_key_names_hold_nothing_that_steers_a_terminal(client):
    assert_problem(await client.post("/v1/keys", json={"name": "a\x1b[31m"}), 422, "invalid_request")


async def test_earlier_messages_of_a_chat_may_hold_what_cannot_be_read(client):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    earlier = [
        {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None, "refusal": "no"},
    ]
    body = {"model": "jamba-rag/default", "messages": [*earlier, {"role": "user", "content": "Who is the keeper?"}]}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    for content in ("", "  ", [], [image], [image, {"type": "text", "text": "What is this?"}]):
        body = {"model": "jamba-rag/default", "messages": [*earlier, {"role": "user", "content": content}]}
        told = assert_problem(await client.post("/v1/chat/completions", json=body), 422, "invalid_request")["detail"]
        assert ("only text can be read" in told) == (image in list(content))


async def test_lists_of_documents_have_an_end(client):
    body = {"query": "x", "document_ids": ["doc_none"] * 10_001}
    assert_problem(await client.post("/v1/search", json=body), 422, "invalid_request")


async def test_a_disk_that_is_nearly_full_keeps_room_to_delete(client, monkeypatch):
    document = await client.upload("kept.txt", "there before the disk was full")
    usage = type("Usage", (), {"total": 1 << 30, "free": 1 << 20})
    monkeypatch.setattr("ingest.files.shutil.disk_usage", lambda path: usage)
    assert_problem(await upload(client, "late.txt", b"too late"), 507, "storage_full")
    assert (await client.delete(f"/v1/documents/{document['id']}")).status_code == 204


async def test_a_document_that_comes_while_its_collection_is_deleted_leaves_no_state(client, monkeypatch):
    """Ready and answered from in the last moment before its row goes."""
    await client.post("/v1/collections", json={"name": "doomed"})
    service, late = client.app.state.service, []
    delete_rows, invalidate = service.store.delete_collection, service.cache.invalidate

    async def upload_and_ask():
        late.append((await client.upload("late.md", LIGHTHOUSE, collection="doomed"))["id"])
        await client.ask("Who built it?", collections=["doomed"])

    def delete_late(name):
        anyio.from_thread.run(upload_and_ask)
        return delete_rows(name)

    monkeypatch.setattr(service.store, "delete_collection", delete_late)
    forgotten = []
    monkeypatch.setattr(service.cache, "invalidate", lambda ids: (forgotten.extend(ids), invalidate(ids)))
    assert (await client.delete("/v1/collections/doomed")).status_code == 204
    assert forgotten == late and service.store.to_forget() == []


async def test_events_of_a_document_are_numbered_and_typed(client):
    reply = await client.post("/v1/documents", files={"file": ("watched.txt", b"watched words " * 2000)})
    path = f"/v1/documents/{reply.json()['data'][0]['id']}"
    events = await client.get(f"{path}/events")
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in events.text.strip().split("\n\n")]
    assert [block["id"] for block in blocks] == [str(number) for number in range(1, len(blocks) + 1)]
    assert {block["event"] for block in blocks[:-1]} <= {"document.progress"}
    assert blocks[-1]["event"] == "document.ready" and json.loads(blocks[-1]["data"])["status"] == "ready"
    await client.delete(path)


async def test_originals_go_with_their_versions_one_that_failed_too(client):
    originals = client.app.state.service.files.directory
    before = set(originals.iterdir())
    document = await client.upload("report.pdf", b"%PDF-1.7 first try")
    path, kept = f"/v1/documents/{document['id']}", []
    for content in (b"%PDF-1.7 second try", b"Words at last.", b"%PDF-1.7 worse again"):
        assert (await client.put(path, files={"file": ("report.pdf", content)})).status_code == 202
        await client.settle(document["id"])
        kept.append(len(set(originals.iterdir()) - before))
    assert kept == [1, 1, 2]  # the words answer on
    assert (await client.delete(path)).status_code == 204
    assert set(originals.iterdir()) == before


async def test_files_being_received_outlive_what_removes_unused_originals(client):
    """A replaced document removes originals that nobody needs: not those of a form that is still arriving."""
    files = client.app.state.service.files
    old = await client.upload("old.txt", "The old words.")
    before = set(files.directory.iterdir())

    async def slow_form():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="slow.txt"\r\n\r\nslow words\r\n--b\r\n'
        while all("-" in path.name for path in set(files.directory.iterdir()) - before):
            await asyncio.sleep(0.01)
        newer = {"file": ("old.txt", b"The newer words.")}
        assert (await client.put(f"/v1/documents/{old['id']}", files=newer)).status_code == 202
        assert (await client.settle(old["id"]))["version"] == 2
        yield b'Content-Disposition: form-data; name="file"; filename="last.txt"\r\n\r\nlast words\r\n--b--\r\n'

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    reply = await client.post("/v1/documents", content=slow_form(), headers=headers)
    assert (reply.status_code, reply.json()["errors"]) == (202, [])
    for document in reply.json()["data"]:
        assert (await client.settle(document["id"]))["status"] == "ready"
    assert len(set(files.directory.iterdir()) - before) == 3  # the old words have gone

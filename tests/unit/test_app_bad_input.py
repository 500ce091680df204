"""Bad input: each gets its problem+json, nothing is half stored, the service goes on."""

import asyncio
import re

import pytest
from app_kit import CONTEXT_TOKENS, LIGHTHOUSE, make_settings, running_service

from model.engine import JambaEngine
from model.engine_request import EngineOverloaded

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
async def _nothing_is_left_behind(client):
    """Whatever a test does wrong, documents and originals are as before."""
    service = client.app.state.service

    async def stored():
        listed = (await client.get("/v1/documents", params={"limit": 1000})).json()["data"]
        return [document["id"] for document in listed], sorted(path.name for path in service.files.directory.iterdir())

    before = await stored()
    yield
    assert await stored() == before


def assert_problem(reply, status: int, code: str) -> dict:
    body = reply.json()
    assert (reply.status_code, body["status"], body["code"]) == (status, status, code), body
    assert reply.headers["content-type"] == "application/problem+json"
    assert set(body) >= {"type", "title", "status", "detail", "code", "request_id"}
    assert body["request_id"] == reply.headers["x-request-id"]
    return body


async def upload(client, name: str, content: bytes, **fields: str):
    return await client.post("/v1/documents", files={"file": (name, content)}, data=fields)


@pytest.mark.parametrize(
    ("name", "content", "status", "code"),
    [
        ("empty.txt", b"", 422, "empty_file"),
        ("picture.pdf", b"\x89PNG\r\n\x1a\n" + bytes(100), 415, "unsupported_media_type"),
        ("program.exe", b"MZ" + bytes(100), 415, "unsupported_media_type"),
        ("n" * 10_000 + ".txt", b"text", 422, "invalid_request"),
        ("../../etc/passwd", b"text", 422, "invalid_request"),
        ("..\\secret.txt", b"text", 422, "invalid_request"),
        ("large.txt", b"x" * 300_000, 413, "file_too_large"),
    ],
    ids=["empty", "wrong-extension", "program", "long-name", "path", "windows-path", "large"],
)
async def test_a_bad_file_is_refused(limited, name, content, status, code):
    body = assert_problem(await upload(limited, name, content), status, code)
    assert [error["code"] for error in body["errors"]] == [code]


async def test_a_bad_file_sent_twice_in_one_form_is_refused_twice(client):
    files = [("file", (name, b"MZ" + bytes(100))) for name in ("a.exe", "b.exe")]
    body = assert_problem(await client.post("/v1/documents", files=files), 415, "unsupported_media_type")
    assert [error["filename"] for error in body["errors"]] == ["a.exe", "b.exe"]
    assert {error["code"] for error in body["errors"]} == {"unsupported_media_type"}


@pytest.mark.parametrize(
    ("method", "path", "known"),
    [
        ("GET", "/v1/documents?Limit=3&limit=2", "takes collection, status, limit, after"),
        ("POST", "/v1/documents?collection=default", "takes none; other values belong in the body"),
        ("GET", "/v1/collections?name=default", "takes none"),
        ("POST", "/v1/search?limit=3", "takes none"),
        ("POST", "/v1/answers?stream=true", "takes none"),
        ("DELETE", "/v1/keys/none?force=1", "takes none"),
        ("GET", "/v1/config?section=model", "takes none"),
    ],
)
async def test_an_unknown_query_parameter_is_named_with_those_there_are(client, method, path, known):
    body = assert_problem(await client.request(method, path), 422, "invalid_request")
    assert repr(path.partition("?")[2].partition("=")[0]) in body["detail"] and known in body["detail"]


async def test_a_query_parameter_given_twice_is_refused(client):
    body = assert_problem(await client.get("/v1/documents?status=ready&status=failed"), 422, "invalid_request")
    assert "'status' is given twice" in body["detail"]


async def test_a_field_of_a_form_given_twice_is_refused(client):
    parts = {"file": ("a.txt", b"text"), "collection": (None, "default")}
    reply = await client.post("/v1/documents", files=[*parts.items(), ("collection", (None, "other"))])
    assert "'collection' twice" in assert_problem(reply, 422, "invalid_request")["detail"]


async def test_clients_of_openai_may_send_query_parameters_that_mean_nothing_here(client):
    assert (await client.get("/v1/models?api-version=2026-01-01")).status_code == 200


@pytest.fixture(scope="module")
async def limited(client):
    """The module's client; its service takes files of at most 256 KiB."""
    object.__setattr__(client.app.state.settings.ingest, "max_file_bytes", 256 << 10)
    return client


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"collection": "nowhere"}, 404, "collection_not_found"),
        ({"collection": "../default"}, 404, "collection_not_found"),
        ({"metadata": "not json"}, 422, "invalid_request"),
        ({"metadata": "[1]"}, 422, "invalid_request"),
        ({"metadata": "null"}, 422, "invalid_request"),
        ({"metadata": '{"a": "\\ud800"}'}, 422, "invalid_request"),
        ({"metadata": '{"a": 1e999}'}, 422, "invalid_request"),
        ({"metadata": "[" * 50_000}, 422, "invalid_request"),
        ({"on_conflict": "maybe"}, 422, "invalid_request"),
        ({"colection": "default"}, 422, "invalid_request"),
    ],
)
async def test_bad_fields_are_refused(client, fields, status, code):
    assert_problem(await upload(client, "a.txt", b"text", **fields), status, code)


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        ({"Content-Type": "application/json"}, b"{}"),
        ({"Content-Type": "multipart/form-data"}, b"x"),
        ({"Content-Type": "multipart/form-data; boundary=b"}, b""),
        ({"Content-Type": "multipart/form-data; boundary=b"}, b"no boundary at all"),
        (
            {"Content-Type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="cut.txt"\r\n\r\nhalf of the te',
        ),
        ({"Content-Type": "multipart/form-data; boundary=b"}, b"--b\r\nX: y\r\n\r\ntext\r\n--b--\r\n"),
        (
            {"Content-Type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="n\x00l"\r\n\r\ntext\r\n--b--\r\n',
        ),
        (
            {"Content-Type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--b--\r\n',
        ),
        (
            {"Content-Type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="collection"\r\n\r\ndefault\r\n--b--\r\n',
        ),
        (
            {"Content-Type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n'
            b"Content-Transfer-Encoding: base64\r\n\r\ndGV4dA==\r\n--b--\r\n",
        ),
    ],
    ids=[
        "json",
        "no-boundary",
        "nothing",
        "noise",
        "cut-off",
        "no-name",
        "nul-in-name",
        "no-filename",
        "no-file",
        "base64",
    ],
)
async def test_bodies_that_are_no_upload_are_refused(client, headers, content):
    assert_problem(await client.post("/v1/documents", content=content, headers=headers), 422, "invalid_request")


@pytest.mark.parametrize(
    "names", ["filename*=UTF-8''%C3%BCber.txt", "filename=\"=?utf-8?B?eA==?=\"; filename*=utf-8''%C3%BCber.txt"]
)
async def test_names_are_read_as_clients_that_encode_them_meant_them(client, names):
    content = f'--b\r\nContent-Disposition: form-data; name="file"; {names}\r\n\r\n{names}\r\n--b--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    reply = await client.post("/v1/documents", content=content.encode(), headers=headers)
    assert [document["filename"] for document in reply.json()["data"]] == ["über.txt"]
    await client.delete(f"/v1/documents/{reply.json()['data'][0]['id']}")


@pytest.mark.parametrize("path", ["/v1/answers", "/v1/search", "/v1/collections", "/v1/chat/completions"])
@pytest.mark.parametrize("content", [b"{not json", b"", b"[]", b'"text"', b"\xff\xfe", b"{}"])
async def test_bodies_that_are_not_the_json_wanted_are_refused(client, path, content):
    reply = await client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert_problem(reply, 422, "invalid_request")


@pytest.mark.parametrize(
    "body",
    [
        {"question": ""},
        {"question": " \n"},
        {"question": "nul \x00"},
        {"question": "?!"},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "user", "content": "…"}]},
        {"question": 7},
        {"question": "Who?", "mode": "all"},
        {"question": "Who?", "unknown": 1},
        {"question": "Who?", "temperature": -1},
        {"question": "Who?", "max_output_tokens": 0},
        {"question": "Who?", "messages": [{"role": "user", "content": "Who?"}]},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "Hello"}]},
        {"mode": "rag"},
    ],
)
async def test_questions_that_make_no_sense_are_refused(client, body):
    assert_problem(await client.post("/v1/answers", json=body), 422, "invalid_request")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_question_longer_than_the_context_is_refused_before_the_first_byte(client, stream):
    body = {"question": "why " * CONTEXT_TOKENS * 2, "stream": stream}
    problem = assert_problem(await client.post("/v1/answers", json=body), 413, "context_too_long")
    assert str(CONTEXT_TOKENS) in problem["detail"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("turns", [[], [{"role": "user", "content": "why " * 300}]])
async def test_a_question_that_takes_long_to_read_is_refused_with_the_limit(client, stream, turns):
    service, long = client.app.state.service, {"role": "user", "content": "why " * 300}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(service, "max_question_tokens", 100)
        reply = await client.post("/v1/answers", json={"messages": [*turns, long], "stream": stream})
        chat = {"model": "jamba-rag/default", "messages": [long], "stream": stream}
        told = [reply, await client.post("/v1/chat/completions", json=chat)]
        for refused in told:
            detail = assert_problem(refused, 422, "invalid_request")["detail"]
            assert "limit is 100" in detail and "upload the text as a document" in detail
        short = [*turns, {"role": "user", "content": "why?"}]
        assert (await client.post("/v1/answers", json={"messages": short})).status_code == 200


async def test_documents_that_do_not_fit_are_refused_where_all_were_wanted(client):
    document = await client.upload("long.txt", "The owl sleeps by day and hunts at night. " * 500)
    body = {"question": "Who?", "mode": "full_context", "document_ids": [document["id"]]}
    assert_problem(await client.post("/v1/answers", json=body), 413, "context_too_long")
    assert (await client.ask("Who?", document_ids=[document["id"]]))["citations"]
    await client.delete(f"/v1/documents/{document['id']}")


@pytest.mark.parametrize("mode", ["auto", "rag"])
async def test_less_evidence_than_a_passage_is_refused_with_what_one_takes(client, mode):
    document = await client.upload("a.md", LIGHTHOUSE)
    body = {"question": "Who?", "mode": mode, "document_ids": [document["id"]], "max_evidence_tokens": 1}
    problem = assert_problem(await client.post("/v1/answers", json=body), 422, "invalid_request")
    needed = int(re.search(r"best takes (\d+)", problem["detail"])[1])
    assert_problem(
        await client.post("/v1/answers", json=body | {"max_evidence_tokens": needed - 1}), 422, problem["code"]
    )
    assert (await client.ask(**body | {"max_evidence_tokens": needed}))["usage"]["input_tokens"] > needed
    await client.delete(f"/v1/documents/{document['id']}")


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/v1/documents/doc_none", "document_not_found"),
        ("GET", "/v1/documents/doc_none/text", "document_not_found"),
        ("GET", "/v1/documents/doc_none/chunks", "document_not_found"),
        ("GET", "/v1/documents/doc_none/pages/1/image", "document_not_found"),
        ("GET", "/v1/documents/doc_none/file", "document_not_found"),
        ("GET", "/v1/documents/doc_none/events", "document_not_found"),
        ("POST", "/v1/documents/doc_none/retry", "document_not_found"),
        ("DELETE", "/v1/documents/doc_none", "document_not_found"),
        ("GET", "/v1/collections/none", "collection_not_found"),
        ("DELETE", "/v1/collections/none", "collection_not_found"),
        ("GET", "/v1/documents?collection=none", "collection_not_found"),
        ("GET", "/v1/models/jamba-rag/none", "model_not_found"),
        ("DELETE", "/v1/keys/key_none", "key_not_found"),
        ("GET", "/v1/nothing", "not_found"),
    ],
)
async def test_what_is_not_there_is_404(client, method, path, code):
    assert_problem(await client.request(method, path), 404, code)


@pytest.mark.parametrize("path", ["/v1/answers", "/v1/search"])
async def test_unknown_collections_and_documents_are_404(client, path):
    question = {"question" if path == "/v1/answers" else "query": "Who?"}
    reply = await client.post(path, json=question | {"collections": ["default", "none"]})
    assert_problem(reply, 404, "collection_not_found")
    assert_problem(await client.post(path, json=question | {"document_ids": ["none"]}), 404, "document_not_found")


@pytest.mark.parametrize(
    ("path", "field", "values", "told"),
    [
        ("/v1/search", "max_num_results", ["5", True, 5.5], "a whole number"),
        ("/v1/search", "rerank", ["yes", 1], "true or false"),
        ("/v1/answers", "temperature", ["0.5", True], "a number"),
        ("/v1/answers", "seed", ["7", False], "a whole number"),
        ("/v1/answers", "max_output_tokens", ["9", True], "a whole number"),
        ("/v1/answers", "stream", ["false", 0], "true or false"),
        ("/v1/chat/completions", "temperature", ["0.5", True], "a number"),
        ("/v1/chat/completions", "max_tokens", ["9"], "a whole number"),
        ("/v1/chat/completions", "stream", ["true"], "true or false"),
    ],
)
async def test_a_value_of_another_type_is_not_taken_for_one(client, path, field, values, told):
    body = {"/v1/search": {"query": "Who?"}, "/v1/answers": {"question": "Who?"}}.get(path)
    body = body or {"model": "jamba-rag/default", "messages": [{"role": "user", "content": "Who?"}]}
    for value in values:
        problem = assert_problem(await client.post(path, json=body | {field: value}), 422, "invalid_request")
        assert problem["detail"] == f"{field}: must be {told}"


async def test_a_whole_number_may_have_a_decimal_point(client):
    assert (await client.post("/v1/search", json={"query": "Who?", "max_num_results": 5.0})).status_code == 200


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "status=done"])
async def test_bad_query_parameters_are_refused(client, query):
    assert_problem(await client.get(f"/v1/documents?{query}"), 422, "invalid_request")


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("broken.docx", b"PK\x03\x04" + b"word/" + bytes(200), None),
        ("broken.pdf", b"%PDF-1.4\n" + bytes(200), None),
        ("legacy.txt", "Grüße aus Köln, naïve café".encode("latin-1"), ""),
        ("nul.txt", b"text with \x00 inside, and more of it", None),
        ("blank.txt", b" \n\n ", "empty_document"),
    ],
)
async def test_a_damaged_file_fails_with_a_reason_or_is_read(client, name, content, code):
    reply = await upload(client, name, content)
    if reply.status_code == 415:
        assert_problem(reply, 415, "unsupported_media_type")
        return
    document = await client.settle(reply.json()["data"][0]["id"])
    if document["status"] == "failed":
        assert document["last_error"]["message"] and (code is None or document["last_error"]["code"] == code)
    await client.delete(f"/v1/documents/{document['id']}")


async def test_too_many_answers_are_429_with_the_time_to_wait(tiny_checkpoint, tmp_path):
    settings = make_settings(tiny_checkpoint, tmp_path / "data", answers={"max_pending": 1})
    async with running_service(settings) as client:
        await client.upload("a.md", LIGHTHOUSE)
        service = client.app.state.service
        principal = client.app.state.authenticator.authenticate(client.headers["Authorization"])
        from app.schemas import AnswerRequest

        waiting = await service.start_answer(service.read_query(AnswerRequest(question="Who?"), principal))
        reply = await client.post("/v1/answers", json={"question": "Who?"})
        assert_problem(reply, 429, "overloaded")
        assert int(reply.headers["retry-after"]) > 0
        await waiting.collect()
        assert (await client.ask("Who?"))["text"]


async def test_questions_that_would_wait_too_long_are_429_until_answers_get_faster(tiny_checkpoint, tmp_path):
    settings = make_settings(tiny_checkpoint, tmp_path / "data", answers={"max_wait_s": 1e-6})
    async with running_service(settings) as client:
        await client.upload("a.md", LIGHTHOUSE)
        asked = [client.post("/v1/answers", json={"question": "Who?"}) for _ in range(6)]
        replies = await asyncio.gather(*asked)
        refused = [reply for reply in replies if reply.status_code == 429]
        assert len(refused) == 4 and {reply.status_code for reply in replies} == {200, 429}
        assert assert_problem(refused[0], 429, "overloaded")["detail"].endswith(
            f"try again in {refused[0].headers['retry-after']} s"
        )
        assert (await client.ask("Who?"))["text"]


async def test_the_engine_has_room_for_all_that_admitted_answers_try(tiny_checkpoint, tmp_path, monkeypatch):
    refused, begun, add = [], [], JambaEngine.add

    def watched(engine, request):
        begun.append(request)
        try:
            return add(engine, request)
        except EngineOverloaded as error:
            refused.append(error)
            raise

    monkeypatch.setattr(JambaEngine, "add", watched)
    answers = {"max_pending": 2, "quote_beginnings": 8}
    settings = make_settings(tiny_checkpoint, tmp_path / "data", model={"max_batch": 1}, answers=answers)
    async with running_service(settings) as client:
        await client.upload("a.md", LIGHTHOUSE)
        await asyncio.gather(client.ask("Who?"), client.ask("When?"))
    assert (len(begun), refused) == (16, [])


async def test_after_all_this_the_service_goes_on(client):
    good = await client.upload("good.md", LIGHTHOUSE)
    assert good["status"] == "ready"
    assert (await client.ask("Who is the keeper?"))["citations"]
    await client.delete(f"/v1/documents/{good['id']}")

"""Documents, collections, search and answers over HTTP, as the contract has them."""

import io
import json
import zipfile

import pytest
from app_kit import GARDEN, LIGHTHOUSE, make_settings, read_events, running_service

from ingest.files import FileStore
from retrieval.store import DocumentStore
from retrieval.words import WordIndex

pytestmark = pytest.mark.anyio

DOCUMENT_FIELDS = {
    *("id", "object", "collection", "filename", "media_type", "bytes", "sha256", "version", "status", "progress"),
    *("attempts", "last_error", "pages", "chunks", "tokens", "metadata", "duplicate_of", "created_at", "updated_at"),
}


@pytest.fixture(scope="module")
async def lighthouse(client) -> dict:
    return await client.upload("lighthouse.md", LIGHTHOUSE, metadata='{"kind": "tower"}')


@pytest.fixture(scope="module")
async def garden(client, lighthouse) -> dict:
    return await client.upload("garden.txt", GARDEN)


async def test_a_document_becomes_ready_and_can_be_looked_at(client, lighthouse):
    assert set(lighthouse) == DOCUMENT_FIELDS
    assert (lighthouse["status"], lighthouse["media_type"], lighthouse["version"]) == ("ready", "text/markdown", 1)
    assert lighthouse["metadata"] == {"kind": "tower"}
    path = f"/v1/documents/{lighthouse['id']}"
    original = await client.get(f"{path}/file")
    assert original.text == LIGHTHOUSE
    assert original.headers["content-disposition"].startswith("attachment")
    assert original.headers["cache-control"] == "private, no-cache"  # no browser keeps it without asking again
    text = (await client.get(f"{path}/text")).json()
    part = (await client.get(f"{path}/text", params={"start": 3, "end": 9})).json()
    assert part["text"] == text["text"][3:9] and text["pages"] == []
    for chunk in (await client.get(f"{path}/chunks")).json()["data"]:
        place = chunk["location"]
        assert text["text"][place["char_start"] : place["char_end"]] == chunk["text"]
        assert "page_start" not in place


async def test_several_files_and_one_bad_one(client):
    files = [("file", ("a.txt", b"alpha")), ("file", ("b.png", b"\x89PNG\r\n\x1a\n")), ("file", ("c.txt", b"gamma"))]
    reply = await client.post("/v1/documents", files=files)
    assert reply.status_code == 202
    body = reply.json()
    assert [document["filename"] for document in body["data"]] == ["a.txt", "c.txt"]
    assert [(error["filename"], error["code"]) for error in body["errors"]] == [("b.png", "unsupported_media_type")]
    for document in body["data"]:
        await client.settle(document["id"])


async def test_a_document_read_in_part_is_ready_and_says_what_is_missing(client):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("owl.txt", "The owl hunts by night.")
        file.writestr("photo.png", b"\x89PNG\r\n\x1a\n")
    document = await client.upload("owls.zip", archive.getvalue())
    gap = document["last_error"]
    assert (document["status"], gap["code"], gap["retryable"]) == ("ready", "partly_read", False)
    assert "1 of 2 files" in gap["message"] and "photo.png" in gap["message"]
    whole = {"file": ("owls.txt", b"The owl hunts by night, all of it.")}
    assert (await client.put(f"/v1/documents/{document['id']}", files=whole)).status_code == 202
    replaced = await client.settle(document["id"])
    assert (replaced["version"], replaced["status"], replaced["last_error"]) == (2, "ready", None)


async def test_the_same_bytes_are_the_same_document(client, lighthouse):
    again = await client.post("/v1/documents", files={"file": ("copy.md", LIGHTHOUSE.encode())})
    assert again.status_code == 200
    assert again.json()["data"][0]["duplicate_of"] == lighthouse["id"]
    refused = await client.post(
        "/v1/documents", files={"file": ("copy.md", LIGHTHOUSE.encode())}, data={"on_conflict": "error"}
    )
    assert (refused.status_code, refused.json()["code"]) == (409, "duplicate")
    assert (await client.get(f"/v1/documents/{lighthouse['id']}/file")).text == LIGHTHOUSE


async def test_an_idempotency_key_replays_the_reply_and_guards_against_another_request(client):
    headers = {"Idempotency-Key": "upload-1"}
    first = await client.post("/v1/documents", files={"file": ("once.txt", b"once")}, headers=headers)
    second = await client.post("/v1/documents", files={"file": ("once.txt", b"once")}, headers=headers)
    other = await client.post("/v1/documents", files={"file": ("once.txt", b"twice")}, headers=headers)
    assert (first.status_code, first.json()) == (second.status_code, second.json())
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
    await client.settle(first.json()["data"][0]["id"])


async def test_listing_is_paged_and_filtered(client, lighthouse, garden):
    whole = (await client.get("/v1/documents", params={"status": "ready"})).json()
    ids, after = [], None
    while True:
        params = {"limit": 2, "status": "ready"} | ({"after": after} if after else {})
        page = (await client.get("/v1/documents", params=params)).json()
        ids += [document["id"] for document in page["data"]]
        if not page["has_more"]:
            break
        after = ids[-1]
    assert ids == [document["id"] for document in whole["data"]]
    assert {lighthouse["id"], garden["id"]} <= set(ids)


async def test_a_listing_goes_on_when_the_last_document_of_a_page_was_deleted(client):
    await client.post("/v1/collections", json={"name": "walked"})
    await client.post("/v1/collections", json={"name": "other"})
    files = [("file", (f"{number}.txt", f"number {number}".encode())) for number in range(4)]
    sent = (await client.post("/v1/documents", files=files, data={"collection": "walked"})).json()["data"]
    first = (await client.get("/v1/documents", params={"collection": "walked", "limit": 2})).json()["data"]
    assert (await client.delete(f"/v1/documents/{first[1]['id']}")).status_code == 204
    after = {"after": first[1]["id"]}
    rest = (await client.get("/v1/documents", params={"collection": "walked"} | after)).json()
    assert [document["id"] for document in rest["data"]] == [document["id"] for document in sent[2:]]
    made = (await client.post("/v1/keys", json={"name": "b", "role": "reader", "collections": ["other"]})).json()
    foreign = await client.get("/v1/documents", params=after, headers={"Authorization": f"Bearer {made['key']}"})
    assert (foreign.status_code, foreign.json()["code"]) == (404, "document_not_found")


async def test_collections_come_and_go(client):
    made = await client.post("/v1/collections", json={"name": "birds"})
    assert made.status_code == 201 and made.json()["fits_context"] and made.json()["reads_whole"]
    assert (await client.post("/v1/collections", json={"name": "birds"})).json()["code"] == "collection_exists"
    document = await client.upload("owl.txt", "The owl hunts at night.", collection="birds")
    counted = (await client.get("/v1/collections/birds")).json()
    assert (counted["documents"], counted["chunks"]) == (1, 1) and counted["tokens"] == document["tokens"]
    assert (await client.delete("/v1/collections/birds")).status_code == 204
    assert (await client.get(f"/v1/documents/{document['id']}")).status_code == 404
    assert (await client.get("/v1/collections/birds")).json()["code"] == "collection_not_found"


@pytest.mark.parametrize("mode", ["hybrid", "dense", "lexical"])
async def test_search_finds_and_scores(client, lighthouse, garden, mode):
    reply = await client.post("/v1/search", json={"query": "Who is the keeper of the lighthouse?", "mode": mode})
    hit = reply.json()["data"][0]
    assert hit["document_id"] == lighthouse["id"] and hit["attributes"] == {"kind": "tower"}
    assert set(hit["scores"]) == {"dense", "lexical", "fused", "rerank"}
    if mode == "hybrid":
        assert hit["score"] > hit["scores"]["rerank"] and hit["scores"]["fused"] == 1
    else:
        assert hit["score"] == hit["scores"][mode] and hit["scores"]["rerank"] is None


async def test_search_keeps_to_filters_and_documents(client, lighthouse, garden):
    async def found(**fields) -> set[str]:
        reply = await client.post("/v1/search", json={"query": "the garden and the lighthouse", **fields})
        return {hit["document_id"] for hit in reply.json()["data"]}

    assert {lighthouse["id"], garden["id"]} <= await found(max_num_results=50)
    assert await found(filters={"kind": "tower"}) == {lighthouse["id"]}
    assert await found(document_ids=[garden["id"]]) == {garden["id"]}
    assert len((await client.post("/v1/search", json={"query": "the", "max_num_results": 1})).json()["data"]) <= 1


async def test_an_answer_has_the_shape_of_the_contract(client, lighthouse):
    answer = await client.ask("Who is the keeper?", document_ids=[lighthouse["id"]])
    assert set(answer) == {
        *("id", "object", "grounding", "text", "citations", "sources", "usage", "timings", "cache", "model"),
        "truncated",
    }
    assert set(answer["usage"]) == {"input_tokens", "cached_input_tokens", "output_tokens"}
    assert set(answer["timings"]) == {
        *("retrieval_ms", "pack_ms", "state_load_ms", "prefill_ms", "ttft_ms", "generation_ms"),
    }
    assert answer["grounding"] == "answered" and answer["citations"] and answer["sources"]
    text = (await client.get(f"/v1/documents/{lighthouse['id']}/text")).json()["text"]
    chunks = (await client.get(f"/v1/documents/{lighthouse['id']}/chunks")).json()["data"]
    for citation in answer["citations"]:
        place = citation["location"]
        assert citation["cited_text"] == text[place["char_start"] : place["char_end"]]
        assert answer["text"][citation["start"] : citation["end"]] == citation["cited_text"]
        assert citation["chunk_id"] in {chunk["id"] for chunk in chunks}
        assert citation["verification"] == "exact" and citation["filename"] == "lighthouse.md"


async def test_the_second_question_about_a_document_is_answered_from_its_cached_state(client, garden):
    first = await client.ask("How many roses?", document_ids=[garden["id"]], mode="full_context")
    second = await client.ask("When do visitors come?", document_ids=[garden["id"]], mode="full_context")
    assert second["cache"]["tier"] == "host"
    assert second["usage"]["cached_input_tokens"] == second["cache"]["prefix_tokens"] > 0
    assert first["usage"]["cached_input_tokens"] < second["usage"]["cached_input_tokens"]
    again = await client.ask("How many roses?", document_ids=[garden["id"]], mode="full_context")
    assert (again["text"], again["citations"]) == (first["text"], first["citations"])


async def test_a_stream_ends_with_the_same_answer(client, lighthouse):
    body = {"question": "Who built it?", "document_ids": [lighthouse["id"]]}
    whole = await client.ask(**body)
    reply = await client.post("/v1/answers", json=body | {"stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["cache-control"] == "no-cache, no-transform"
    assert reply.text.startswith("id: 1\nevent: answer.created\n")
    events = read_events(reply.text)
    kinds = [kind for kind, _ in events]
    assert kinds[:2] == ["answer.created", "answer.sources"] and kinds[-1] == "answer.completed"
    answer = events[-1][1]
    assert "".join(data["text"] for kind, data in events if kind == "answer.text.delta") == answer["text"]
    assert [data["citation"] for kind, data in events if kind == "answer.citation.added"] == answer["citations"]
    assert {name: answer[name] for name in ("text", "citations")} == {n: whole[n] for n in ("text", "citations")}


async def test_messages_are_answered_by_their_last_one(client, lighthouse):
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who built it?"},
    ]
    fields = {"document_ids": [lighthouse["id"]]}
    by_messages = (await client.post("/v1/answers", json={"messages": messages, **fields})).json()
    assert by_messages["text"] == (await client.ask("Who built it?", **fields))["text"]


async def test_a_seed_makes_sampling_repeatable(client, lighthouse):
    texts = [
        (await client.ask("Who?", document_ids=[lighthouse["id"]], temperature=1.5, seed=seed))["text"]
        for seed in (1, 1, 2, 3, 4, 5)
    ]
    assert texts[0] == texts[1] and len(set(texts)) > 1


async def test_without_documents_nothing_is_found_and_the_model_is_not_asked(client):
    await client.post("/v1/collections", json={"name": "empty"})
    answer = await client.ask("Who?", collections=["empty"])
    assert (answer["grounding"], answer["citations"], answer["usage"]["input_tokens"]) == ("not_found", [], 0)


async def test_a_new_version_takes_the_place_of_the_old(client):
    old = await client.upload("news.txt", "The old harbour is closed.")
    await client.ask("What is closed?", document_ids=[old["id"]])
    reply = await client.put(f"/v1/documents/{old['id']}", files={"file": ("news.txt", b"The new harbour is open.")})
    assert reply.status_code == 202
    new = await client.settle(old["id"])
    assert (new["version"], new["status"]) == (2, "ready")
    text = (await client.get(f"/v1/documents/{old['id']}/text")).json()["text"]
    assert "new harbour" in text
    found = (await client.post("/v1/search", json={"query": "harbour", "document_ids": [old["id"]]})).json()["data"]
    assert all("old" not in hit["text"] for hit in found) and found
    assert not client.app.state.service.files.path(old["sha256"]).exists()
    same = await client.put(f"/v1/documents/{old['id']}", files={"file": ("news.txt", b"The new harbour is open.")})
    assert same.status_code == 200


async def test_a_deleted_document_is_gone_from_everything(client):
    document = await client.upload("secret.txt", "The password of the vault is swordfish.")
    answer = await client.ask("What is the password?", document_ids=[document["id"]])
    assert answer["citations"]
    service = client.app.state.service
    assert service.cache.stats()[1]["host"]["items"] > 0
    before = service.cache.stats()[1]["host"]["items"]
    assert (await client.delete(f"/v1/documents/{document['id']}")).status_code == 204
    assert (await client.get(f"/v1/documents/{document['id']}")).json()["code"] == "document_not_found"
    found = (await client.post("/v1/search", json={"query": "password vault swordfish"})).json()["data"]
    assert not any("swordfish" in hit["text"] for hit in found)
    assert not service.files.path(document["sha256"]).exists()
    assert service.cache.stats()[1]["host"]["items"] < before
    assert (await client.delete(f"/v1/documents/{document['id']}")).status_code == 404


async def test_retry_of_a_failed_document(client):
    failed = await client.upload("broken.pdf", b"%PDF-1.7 nothing else")
    assert failed["status"] == "failed" and failed["last_error"]["code"]
    assert set(failed["last_error"]) == {"code", "message", "retryable", "page"}
    retried = await client.post(f"/v1/documents/{failed['id']}/retry")
    assert retried.status_code == 202 and retried.json()["status"] != "failed"
    assert (await client.settle(failed["id"]))["status"] == "failed"
    early = await client.get(f"/v1/documents/{failed['id']}/text")
    assert (early.status_code, early.json()["code"]) == (409, "document_not_ready")


async def test_an_answer_cut_off_before_its_first_word_does_not_say_that_it_is_not_there(client, garden):
    answer = await client.ask("How many kinds of roses?", max_output_tokens=1, document_ids=[garden["id"]])
    assert answer["truncated"] and answer["text"].startswith("The answer was cut off")


async def test_a_document_in_work_when_the_service_was_killed_is_taken_up_at_the_next_start(tiny_checkpoint, tmp_path):
    settings = make_settings(tiny_checkpoint, tmp_path / "data")
    content = GARDEN.encode()
    digest, _ = FileStore(tmp_path / "data" / "files").save_stream([content], 1000)
    store = DocumentStore(tmp_path / "data" / "rag.sqlite3")
    document, _ = store.create_document("default", "garden.txt", "text/plain", len(content), digest)
    store.lease_next("killed", 86_400)
    store.close()
    async with running_service(settings) as client:
        assert (await client.settle(document.id))["status"] == "ready"


async def test_a_model_that_refuses_says_that_it_is_not_there(tiny_checkpoint, tmp_path):
    settings = make_settings(tiny_checkpoint, tmp_path / "data", answers={"none_margin": -50})
    async with running_service(settings) as client:
        await client.upload("garden.txt", GARDEN)
        answer = await client.ask("Who is the keeper?")
        assert (answer["grounding"], answer["citations"]) == ("not_found", [])
        assert answer["sources"] and answer["text"]


async def test_rag_widens_once_before_it_gives_up(tiny_checkpoint, tmp_path):
    limits = {"none_margin": -50, "rag_evidence_tokens": 64, "max_evidence_tokens": 300}
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data", answers=limits)) as client:
        for number in range(8):
            await client.upload(f"{number}.md", f"# Owl {number}\n\nOwl number {number} lives in tree {number}.\n" * 4)
        reply = await client.post("/v1/answers", json={"question": "Where does owl 3 live?", "stream": True})
        kinds = [kind for kind, _ in read_events(reply.text)]
        assert kinds.count("answer.sources") == 2 and kinds[-1] == "answer.completed"


async def test_another_question_goes_on_where_evidence_is_shared_and_a_deletion_ends_that(tiny_checkpoint, tmp_path):
    limits = {"none_margin": 50, "rag_evidence_tokens": 300, "recent_evidence_tokens": 900}
    settings = make_settings(tiny_checkpoint, tmp_path / "data", answers=limits)
    async with running_service(settings) as client:
        animals = ("owl", "fox", "elk", "bee", "eel", "cod", "ant", "emu")
        uploads = {a: f"# {a}\n\nThe {a} sleeps in hole {n}, far from here.\n" * 2 for n, a in enumerate(animals)}
        ids = {animal: (await client.upload(f"{animal}.md", text))["id"] for animal, text in uploads.items()}
        first = await client.ask("Where do emu and cod sleep?", mode="rag")
        second = await client.ask("Where do emu and cod and owl sleep?", mode="rag")
        assert second["cache"]["prefix_tokens"] > first["usage"]["input_tokens"] // 2
        assert second["usage"]["input_tokens"] <= first["usage"]["input_tokens"] + 300
        await client.delete(f"/v1/documents/{ids['cod']}")
        third = await client.ask("Where do emu and owl sleep?", mode="rag")
        assert ids["cod"] not in {citation["document_id"] for citation in third["citations"]}


async def test_passages_read_apart_are_weighed_alone_and_the_likeliest_is_answered_from(tiny_checkpoint, tmp_path):
    settings = make_settings(
        tiny_checkpoint, tmp_path / "data", answers={"read_apart": True, "rag_evidence_tokens": 900}
    )
    async with running_service(settings) as client:
        animals = ("owl", "fox", "elk", "bee", "eel", "cod")
        uploads = {a: f"# {a}\n\nThe {a} sleeps in hole {n}, far from here.\n" * 2 for n, a in enumerate(animals)}
        ids = [(await client.upload(f"{animal}.md", text))["id"] for animal, text in uploads.items()]
        question = {"question": "Where do owl and fox and elk and bee and eel and cod sleep?", "mode": "rag"}
        service, margins, prompts = client.app.state.service, {}, []
        generate = service.engine.generate

        async def watch(request):
            prompts.append(len(request.token_ids))
            first = True
            async for output in generate(request):
                if first:
                    (document_id,), (quote, none) = request.tags, output.watch_logprobs
                    margins[document_id], first = none - quote, False
                yield output

        service.engine.generate = watch
        answer = await client.ask(**question)
        service.engine.generate = generate
        assert set(margins) == set(ids) and len(prompts) == len(ids) + 1
        assert {c["document_id"] for c in answer["citations"]} == {min(margins, key=margins.get)}
        assert answer["usage"]["input_tokens"] == sum(prompts[:-1])
        assert answer["timings"]["ttft_ms"] > answer["timings"]["prefill_ms"] > 0
        again = await client.ask(**question)
        assert again["citations"] == answer["citations"] and again["text"] == answer["text"]
        assert again["cache"]["prefix_tokens"] > answer["cache"]["prefix_tokens"]
        events = read_events((await client.post("/v1/answers", json=question | {"stream": True})).text)
        assert "".join(data["text"] for kind, data in events if kind == "answer.text.delta") == answer["text"]
        together = await client.ask(**question, document_ids=ids[:1])
        assert {c["document_id"] for c in together["citations"]} == {ids[0]}


async def test_health_metrics_and_config(client, lighthouse, monkeypatch):
    bare = {"Authorization": ""}
    assert (await client.get("/healthz", headers=bare)).json()["status"] == "alive"
    ready = await client.get("/readyz", headers=bare)
    assert ready.status_code == 200 and set(ready.json()["checks"].values()) == {"ok"}
    monkeypatch.setattr(WordIndex, "missing", 300_000)  # being made: words find what is there, and it is said
    ready = await client.get("/readyz", headers=bare)
    assert ready.status_code == 200 and ready.json()["checks"]["words"].startswith(
        "ok so far, being made: about 300000"
    )
    metrics = (await client.get("/metrics")).text
    assert "jamba_rag_chunks_without_words 300000.0" in metrics
    assert "jamba_rag_citations_rejected_total 0.0" in metrics
    assert 'route="/v1/documents/{document_id}"' in metrics
    config = (await client.get("/v1/config")).json()
    assert config["answers"]["max_quotes"] == 2


async def test_page_and_description_are_served_with_strict_headers(client):
    page = await client.get("/", headers={"Authorization": ""})
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    description = (await client.get("/openapi.json", headers={"Authorization": ""})).json()
    assert description["openapi"].startswith("3.1")
    docs = await client.get("/docs", headers={"Authorization": ""})
    assert docs.status_code == 200 and "<script" not in docs.text
    for path in description["paths"]:
        assert path in docs.text
    assert json.dumps(description).count("http://") == 0

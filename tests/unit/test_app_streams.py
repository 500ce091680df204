"""Connections as they are: clients that leave, clients that wait, uploads larger than memory should ever hold."""

import asyncio
import gc
import json
import resource
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from app_kit import GARDEN, LIGHTHOUSE, make_settings, read_events, running_service, serving

from app.schemas import AnswerRequest, Problem
from app.sse import KEEPALIVE, Event, format_events, send_with_keepalive
from app.uploads import BadUpload, read_field, read_in_thread, read_parts
from model.engine import JambaEngine, StepOutput

pytestmark = pytest.mark.anyio


async def test_a_client_that_leaves_a_stream_ends_its_generation(tiny_checkpoint, tmp_path, monkeypatch):
    step = JambaEngine.step
    monkeypatch.setattr(JambaEngine, "step", lambda engine: time.sleep(0.01) or step(engine))  # else it might be done
    long = {"max_output_tokens": 1500, "max_quote_tokens": 1000, "max_quotes": 500}
    settings = make_settings(tiny_checkpoint, tmp_path / "data", answers=long)
    with serving(settings) as url:
        headers = {"Authorization": f"Bearer {(settings.data_dir / 'admin.key').read_text().strip()}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as http:
            files = {"file": ("a.md", ((LIGHTHOUSE + "\n") * 4).encode())}
            document = (await http.post("/v1/documents", files=files)).json()["data"][0]
            await http.get(f"/v1/documents/{document['id']}/events")
            body = {"question": "Who?", "stream": True, "temperature": 2.0, "seed": 3}
            async with http.stream("POST", "/v1/answers", json=body) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("event: answer.text.delta"):
                        break
            await wait_until_idle(http)
            impatient = asyncio.create_task(http.post("/v1/answers", json=body | {"stream": False}))
            await wait_until_busy(http)
            impatient.cancel()
            await wait_until_idle(http)
            metrics = (await http.get("/metrics")).text
            assert "jamba_rag_answers_total{" not in metrics  # neither was finished


async def pending(http: httpx.AsyncClient) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith("jamba_rag_answers_pending")).split()[1])


async def wait_until_idle(http: httpx.AsyncClient) -> None:
    while await pending(http):
        await asyncio.sleep(0.02)


async def wait_until_busy(http: httpx.AsyncClient) -> None:
    while not await pending(http):
        await asyncio.sleep(0.005)


async def test_an_answer_that_nobody_reads_is_pending_for_nobody(tiny_checkpoint, tmp_path):
    """As when the client has gone before the reply began."""
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data")) as client:
        service = client.app.state.service
        principal = client.app.state.authenticator.authenticate(client.headers["Authorization"])
        answer = await service.start_answer(service.read_query(AnswerRequest(question="Who?"), principal))
        assert await pending(client) == 1
        del answer
        gc.collect()
        assert await pending(client) == 0


async def test_deleting_a_document_ends_the_answers_that_read_it(tiny_checkpoint, tmp_path):
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data")) as client:
        document = await client.upload("a.md", LIGHTHOUSE)
        service = client.app.state.service
        principal = client.app.state.authenticator.authenticate(client.headers["Authorization"])
        answer = await service.start_answer(service.read_query(AnswerRequest(question="Who?"), principal))
        events = answer.events()
        seen = [await anext(events), await anext(events)]
        assert [event.type for event in seen] == ["answer.created", "answer.sources"]
        assert (await client.delete(f"/v1/documents/{document['id']}")).status_code == 204
        rest = [event async for event in events]
        assert [event.type for event in rest] == ["answer.error"] and rest[0].data["code"] == "document_deleted"
        assert service.cache.stats()[1]["host"]["items"] == 0


@pytest.mark.parametrize("apart", [False, True])
async def test_a_stream_tells_how_far_the_model_has_read(tiny_checkpoint, tmp_path, monkeypatch, apart):
    monkeypatch.setattr("app.generation._PROGRESS_EVERY_S", 1e-4)
    answers = {"read_apart": apart, "rag_evidence_tokens": 1200}
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data", answers=answers)) as client:
        for number in range(3):
            await client.upload(f"{number}.md", LIGHTHOUSE * 2 + str(number))
        body = {"question": "Who is the keeper?", "mode": "rag", "stream": True}
        events = read_events((await client.post("/v1/answers", json=body, headers={"Prefer": "progress"})).text)
        kinds = [kind for kind, _ in events]
        told = [data for kind, data in events if kind == "answer.progress"]
        input_tokens = events[-1][1]["usage"]["input_tokens"]
        assert "answer.progress" not in kinds[kinds.index("answer.text.delta") :]
        assert input_tokens in {progress["total"] for progress in told}
        read = [progress["done"] for progress in told if progress["total"] == input_tokens]
        assert read == sorted(read) and {progress["unit"] for progress in told} == {"tokens"}
        assert any(progress["stage"] == "reading" and progress["done"] for progress in told)
        plain = read_events((await client.post("/v1/answers", json=body | {"question": "Who keeps it?"})).text)
        assert "answer.progress" not in {kind for kind, _ in plain}, "only who asks is told"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("lost", ["document", "key"])
async def test_a_deletion_ends_an_answer_that_the_model_still_reads_for(
    tiny_checkpoint, tmp_path, monkeypatch, stream, lost
):
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data")) as client:
        document = await client.upload("a.md", LIGHTHOUSE)
        key = (await client.post("/v1/keys", json={"name": "asker"})).json()
        steps = []

        def read_for_ever(engine: JambaEngine) -> list[StepOutput]:
            steps.append(time.sleep(0.01))
            return []

        with monkeypatch.context() as patched:
            patched.setattr(JambaEngine, "step", read_for_ever)
            body, headers = {"question": "Who?", "stream": stream}, {"Authorization": f"Bearer {key['key']}"}
            asking = asyncio.create_task(client.post("/v1/answers", json=body, headers=headers))
            while not steps:
                await asyncio.sleep(0.01)
            await client.delete(f"/v1/documents/{document['id']}" if lost == "document" else f"/v1/keys/{key['id']}")
            reply = await asyncio.wait_for(asking, 30)
        problem = read_events(reply.text)[-1][1] if stream else reply.json()
        code = "document_deleted" if lost == "document" else "unauthorized"
        assert (problem["code"], client.app.state.service.answers_pending) == (code, 0)


@pytest.mark.parametrize(("among_all", "searches"), [(True, 4), (False, 1)])
async def test_a_question_searches_anew_only_when_what_it_found_was_deleted(
    tiny_checkpoint, tmp_path, monkeypatch, among_all, searches
):
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data")) as client:
        kept = await client.upload("a.md", LIGHTHOUSE)
        others = [await client.upload(f"{i}.md", f"{GARDEN}{i}") for i in range(3)]
        service, found = client.app.state.service, []
        find = service.finder.find

        def find_and_delete(*arguments):
            found.append(find(*arguments))
            if others:
                service.delete_document(service.store.get_document(others.pop()["id"]))
            return found[-1]

        monkeypatch.setattr(service.finder, "find", find_and_delete)
        answer = await client.ask("Who is the keeper?", **({} if among_all else {"document_ids": [kept["id"]]}))
        assert {source["document_id"] for source in answer["sources"]} == {kept["id"]}
        assert len(found) == searches


async def one_by_one(*events: Event, pause_s: float = 0.0) -> AsyncIterator[Event]:
    for event in events:
        await asyncio.sleep(pause_s)
        yield event


async def test_events_are_numbered_and_idle_streams_say_so():
    slow = one_by_one(Event("a", {"x": "ü\n"}), Event("b", {}), pause_s=0.05)
    lines = [line async for line in send_with_keepalive(format_events(slow), keepalive_s=0.02)]
    assert KEEPALIVE in lines
    real = [line for line in lines if line != KEEPALIVE]
    assert real[0].startswith("id: 1\nevent: a\ndata: ") and real[0].endswith("\n\n")
    assert json.loads(real[0].split("data: ")[1]) == {"x": "ü\n"} and real[1].startswith("id: 2\nevent: b\n")


async def test_an_event_is_three_lines_whatever_a_client_takes_for_the_end_of_one():
    said = "one\u2028two\u2029three\x85four\x0bfive\x0csix\r\n\nü"
    problem = Problem(type=said, title=said, status=409, detail=said, code=said, request_id=said)
    lines = [line async for line in format_events(one_by_one(Event("a", problem), Event("b", {"x": said})))]
    assert all(len(line.splitlines()) == 4 for line in lines)
    assert json.loads(lines[0].splitlines()[2].removeprefix("data: "))["detail"] == said


async def test_a_stream_that_is_dropped_closes_its_source():
    closed = asyncio.Event()

    async def endless() -> AsyncIterator[Event]:
        try:
            while True:
                yield Event("tick", {})
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    stream = send_with_keepalive(format_events(endless()), keepalive_s=1)
    await anext(stream)
    await stream.aclose()
    assert closed.is_set()


class FormRequest:
    """The part of a Request that `read_parts` reads."""

    def __init__(self, body: bytes, piece: int, content_type: str = "multipart/form-data; boundary=XX") -> None:
        self.headers = {"content-type": content_type}
        self._body, self._piece = body, piece

    async def stream(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._body), self._piece):
            yield self._body[start : start + self._piece]
        yield b""


FORM = (
    b'--XX\r\nContent-Disposition: form-data; name="collection"\r\n\r\nbirds\r\n'
    b'--XX\r\nContent-Disposition: form-data; name="file"; filename="\xc3\xbcber \\"x\\".txt"\r\n'
    b"Content-Type: text/plain\r\n\r\nline\r\n--X\r\n--XY\r\nend\r\n"
    b'--XX\r\nContent-Disposition: form-data; name="file"; filename="%22empty%22"\r\n\r\n\r\n--XX--\r\n'
)


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 10_000])
async def test_a_form_is_the_same_however_it_arrives(piece):
    parts = []
    async for part in read_parts(FormRequest(FORM, piece)):
        if part.filename is None:
            parts.append((part.name, await read_field(part)))
        else:
            parts.append((part.filename, await read_in_thread(part, b"".join, 0)))
    assert parts == [("collection", "birds"), ('über "x".txt', b"line\r\n--X\r\n--XY\r\nend"), ('"empty"', b"")]


@pytest.mark.parametrize("end", range(10, len(FORM) - 4, 23))
async def test_a_form_that_is_cut_off_is_refused(end):
    with pytest.raises(BadUpload):
        async for part in read_parts(FormRequest(FORM[:end], 16)):
            async for _ in part.pieces:
                pass


async def test_a_refused_part_is_skipped_up_to_a_limit():
    def refuse(pieces: Iterator[bytes]) -> None:
        next(pieces)
        raise ValueError("no")

    body = (
        b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 5000 + b"\r\n--XX--\r\n"
    )
    async for part in read_parts(FormRequest(body, 100)):
        with pytest.raises(ValueError, match="no"):
            await read_in_thread(part, refuse, 10_000)
    async for part in read_parts(FormRequest(body, 100)):
        with pytest.raises(BadUpload, match="the rest is not read"):
            await read_in_thread(part, refuse, 1000)
        break


async def test_a_large_upload_is_not_held_in_memory(tiny_checkpoint, tmp_path):
    size, piece = 192 << 20, b"0123456789abcdef" * 4096

    def body() -> Iterator[bytes]:
        yield b'--XX\r\nContent-Disposition: form-data; name="file"; filename="large.bin"\r\n\r\n'
        for _ in range(size // len(piece)):
            yield piece
        yield b"\r\n--XX--\r\n"

    settings = make_settings(tiny_checkpoint, tmp_path / "data", ingest={"workers": 0})
    with serving(settings) as url:
        headers = {"Authorization": f"Bearer {(settings.data_dir / 'admin.key').read_text().strip()}"}
        httpx.post(f"{url}/v1/search", json={"query": "any"}, headers=headers, timeout=60)  # the embedder is there then
        headers["Content-Type"] = "multipart/form-data; boundary=XX"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reply = httpx.post(f"{url}/v1/documents", content=body(), headers=headers, timeout=120)
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert reply.status_code == 202 and reply.json()["data"][0]["bytes"] == size
    assert grown_kib < 64 << 10

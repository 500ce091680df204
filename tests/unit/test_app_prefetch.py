"""Collections that fit are read before the first question, out of its way, and never after they have changed."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import anyio.from_thread
import pytest
from app_kit import GARDEN, LIGHTHOUSE, ServiceClient, make_settings, running_service

from model.sampling import SamplingParams

pytestmark = pytest.mark.anyio

QUESTION = "Who is the keeper?"


@pytest.fixture
async def client(tiny_checkpoint, tmp_path):
    settings = make_settings(tiny_checkpoint, tmp_path / "data", answers={"prefetch_after_s": 0.05})
    async with running_service(settings) as client:
        yield client


async def until(look: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(1500):
        if await look():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not happen within 30 s")


async def is_ready(client: ServiceClient, name: str = "default") -> bool:
    return (await client.get(f"/v1/collections/{name}")).json()["state_ready"]


async def count(client: ServiceClient, outcome: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    name = f'jamba_rag_prefetches_total{{outcome="{outcome}"}} '
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


async def test_the_first_question_about_a_collection_finds_all_of_it_read(client):
    assert not await is_ready(client)
    await client.upload("lighthouse.md", LIGHTHOUSE)
    await client.upload("garden.md", GARDEN)
    await until(lambda: is_ready(client))
    cache = client.app.state.service.cache
    assert cache.stats()[0].lookups == 0  # nobody has asked yet
    answer = await client.ask(QUESTION)
    assert cache.stats()[0].lookups == cache.stats()[0].hits == 1
    prompt, prefix = answer["usage"]["input_tokens"], answer["cache"]["prefix_tokens"]
    assert answer["cache"]["tier"] == "host" and prompt - prefix < 40  # the question and what it ends with
    assert await count(client, "read") >= 1


async def test_it_answers_as_without(client, tiny_checkpoint, tmp_path):
    settings = make_settings(tiny_checkpoint, tmp_path / "other", cache={"host_max_bytes": 0})
    async with running_service(settings) as plain:
        for asked in (client, plain):
            await asked.upload("lighthouse.md", LIGHTHOUSE)
        await until(lambda: is_ready(client))
        warm, cold = [await asked.ask(QUESTION) for asked in (client, plain)]
    assert warm["cache"]["prefix_tokens"] > 0 == cold["cache"]["prefix_tokens"]
    assert (warm["text"], warm["grounding"]) == (cold["text"], cold["grounding"])


async def test_a_change_makes_it_read_again_and_a_deletion_leaves_nothing(client):
    await client.upload("garden.md", GARDEN)
    lighthouse = await client.upload("lighthouse.md", LIGHTHOUSE)
    await until(lambda: is_ready(client))
    assert (await client.delete(f"/v1/documents/{lighthouse['id']}")).status_code == 204
    await until(lambda: is_ready(client))
    assert "Moira" not in (await client.ask(QUESTION))["text"]
    await client.upload("lighthouse.md", LIGHTHOUSE)
    await until(lambda: is_ready(client))


async def test_no_token_of_a_deleted_document_is_kept(client):
    await client.upload("garden.md", GARDEN)
    await until(lambda: is_ready(client))
    prefetch = client.app.state.service.prefetch
    assert list(prefetch._read) == ["default"]
    await client.delete("/v1/collections/default")
    assert prefetch._read == {}


@pytest.mark.parametrize("late", ["its prompt is made", "it is kept"])
async def test_no_token_is_kept_of_a_document_that_goes_while(client, monkeypatch, late):
    service, replies = client.app.state.service, []
    place, name = (
        (service.format, "build_prompt") if late == "its prompt is made" else (service.prefetch, "_list_documents")
    )
    method, calls = getattr(place, name), []

    def delete_meanwhile(*arguments):
        result = method(*arguments)
        calls.append(arguments)
        if not replies and (arguments[1].passages if place is service.format else len(calls) == 2):
            (document,) = service.store.list_documents()
            replies.append(anyio.from_thread.run(client.delete, f"/v1/documents/{document.id}"))
            return method(*arguments) if place is service.format else result
        return result

    monkeypatch.setattr(place, name, delete_meanwhile)
    await client.post("/v1/documents", files={"file": ("lighthouse.md", LIGHTHOUSE.encode())})
    await until(lambda: handled(client))
    await until(lambda: asyncio.sleep(0, bool(replies)))
    await until(lambda: handled(client))
    assert [reply.status_code for reply in replies] == [204]
    assert all(not reading.request.tags for reading in service.prefetch._read.values())
    assert not service.format._kept._passages._entries


async def test_no_token_of_what_goes_while_its_prompt_is_made_waits_for_the_next_round(client, monkeypatch):
    service, deleted = client.app.state.service, []
    build_prompt = service.format.build_prompt

    def delete_before(question, evidence, *turns):
        if evidence.passages and not deleted:
            monkeypatch.setattr(service.prefetch, "_is_idle", lambda: False)  # from now on there is no next one
            (document,) = service.store.list_documents()
            deleted.append(anyio.from_thread.run(client.delete, f"/v1/documents/{document.id}"))
        return build_prompt(question, evidence, *turns)

    monkeypatch.setattr(service.format, "build_prompt", delete_before)
    await client.post("/v1/documents", files={"file": ("lighthouse.md", LIGHTHOUSE.encode())})
    await until(lambda: asyncio.sleep(0, bool(deleted)))
    await until(lambda: asyncio.sleep(0, not service.format._kept._passages._entries))


async def test_what_does_not_fit_is_not_read(client):
    await client.upload("long.md", "\n\n".join(f"Line {number} of a long list." for number in range(600)))
    await until(lambda: handled(client))
    assert not await is_ready(client)
    assert await count(client, "read") == 0


async def handled(client: ServiceClient) -> bool:
    service = client.app.state.service
    return service.prefetch._handled == service.store.generation()


async def read_endlessly(client: ServiceClient) -> asyncio.Task:
    """A prefetch of the collection, under way, that would go on for as long as the context lasts."""
    prefetch = client.app.state.service.prefetch
    await until(lambda: handled(client))
    reading = prefetch._read["default"]
    request = replace(reading.request, sampling=SamplingParams(max_new_tokens=1800, ignore_eos=True))
    ahead = asyncio.create_task(prefetch._read_one(replace(reading, request=request, end=1 << 30)))
    await until(lambda: running(client.app.state.service))
    return ahead


async def test_a_question_about_something_else_comes_first(client):
    await client.upload("lighthouse.md", LIGHTHOUSE)
    await until(lambda: is_ready(client))
    await client.post("/v1/collections", json={"name": "other"})
    other = await client.upload("garden.md", GARDEN, collection="other")
    ahead = await read_endlessly(client)
    answer = await client.ask("How many roses?", document_ids=[other["id"]])
    assert await ahead == "interrupted"
    assert answer["usage"]["output_tokens"] >= 1


async def test_deleting_one_of_its_documents_ends_it_and_another_does_not(client):
    lighthouse = await client.upload("lighthouse.md", LIGHTHOUSE)
    await client.post("/v1/collections", json={"name": "other"})
    other = await client.upload("garden.md", GARDEN, collection="other")
    await until(lambda: is_ready(client))
    ahead = await read_endlessly(client)
    assert (await client.delete(f"/v1/documents/{other['id']}")).status_code == 204
    assert await running(client.app.state.service)
    assert (await client.delete(f"/v1/documents/{lighthouse['id']}")).status_code == 204
    assert await ahead == "interrupted"


async def test_what_is_deleted_while_its_prompt_is_made_is_not_read(client, monkeypatch):
    service, read = client.app.state.service, []
    prepare, generate = service.prefetch._prepare, service.engine.generate

    def prepare_and_delete(collection):
        reading = prepare(collection)
        for document_id in reading.request.tags if reading else ():
            service.delete_document(service.store.get_document(document_id))
        return reading

    monkeypatch.setattr(service.prefetch, "_prepare", prepare_and_delete)
    monkeypatch.setattr(service.engine, "generate", lambda request: read.append(request.tags) or generate(request))
    await client.upload("lighthouse.md", LIGHTHOUSE)
    await until(lambda: handled(client))
    assert await count(client, "interrupted") == 1 and not read


async def test_being_cancelled_as_the_service_stops_leaves_the_engine_nothing_to_do(client):
    await client.upload("lighthouse.md", LIGHTHOUSE)
    await until(lambda: is_ready(client))
    ahead = await read_endlessly(client)
    ahead.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ahead
    engine = client.app.state.service.engine._engine
    while engine.has_work():
        await asyncio.sleep(0.02)


async def running(service) -> bool:
    return service.prefetch._stream is not None


async def test_a_question_that_begins_with_the_same_documents_lets_it_read_on(client):
    service = client.app.state.service
    await client.upload("lighthouse.md", LIGHTHOUSE)
    await until(lambda: is_ready(client))
    evidence = service.finder.read_whole("default")
    reading = service.prefetch._read["default"]
    service.prefetch._stream, service.prefetch._passages = service.engine.generate(reading.request), reading.passages
    await service.prefetch.give_way(evidence)
    outputs = [output async for output in service.prefetch._stream]
    assert outputs[-1].finish_reason == "length"
    service.prefetch._stream = None


async def test_who_may_not_read_the_same_collection_shares_no_state(client):
    await client.post("/v1/collections", json={"name": "other"})
    for collection in ("default", "other"):
        await client.upload("lighthouse.md", LIGHTHOUSE, collection=collection)
    service = client.app.state.service
    await until(lambda: is_ready(client))
    await until(lambda: is_ready(client, "other"))
    plans = [service.prefetch._read[name].plan for name in ("default", "other")]
    one, other = (list(service.prefetch._read[name].request.token_ids) for name in ("default", "other"))
    assert one == other
    assert not set(plans[0].block_keys) & set(plans[1].block_keys)
    assert not set(plans[0].snapshot_keys.values()) & set(plans[1].snapshot_keys.values())


async def test_a_collection_says_whether_a_question_reads_all_of_it(tiny_checkpoint, tmp_path):
    """Many tokens of the model for few of the embedder: figures, whose share of a text no estimate knows."""
    limits = {"auto_evidence_tokens": 300, "rag_evidence_tokens": 100}
    settings = make_settings(tiny_checkpoint, tmp_path / "data", answers=limits)
    async with running_service(settings) as client:

        async def look() -> tuple[bool, bool, bool]:
            facts = (await client.get("/v1/collections/default")).json()
            usage = (await client.ask(QUESTION, mode="auto"))["usage"]
            whole = (await client.ask(QUESTION, mode="full_context"))["usage"]
            return facts["fits_context"], facts["reads_whole"], usage["input_tokens"] == whole["input_tokens"]

        await client.upload("lighthouse.md", LIGHTHOUSE)
        assert await look() == (True, True, True)
        figures = await client.upload("figures.csv", "\n".join(f"{n}{n},{n * n}" for n in range(100, 160)))
        assert await look() == (True, False, False)
        await client.delete(f"/v1/documents/{figures['id']}")
        assert await look() == (True, True, True)

import asyncio
import gc
import threading
from contextlib import aclosing

import pytest
from engine_kit import SMALL, TOKENIZER, Answer, doc_request, run_one

from model.device_store import DeviceStateStore
from model.engine import JambaEngine
from model.engine_request import ContextTooLong
from model.engine_thread import EngineStopped, EngineThread
from model.prefix_cache import PrefixCache


class CountingEngine(JambaEngine):
    """Counts the steps that gave out something, and fails when told to."""

    fail_next = False
    working_steps = 0

    def step(self):
        if self.fail_next:
            raise OSError("the device is gone")
        outputs = super().step()
        self.working_steps += bool(outputs)
        return outputs


@pytest.fixture
def engine(model):
    engine = CountingEngine(
        model, TOKENIZER, PrefixCache([DeviceStateStore(1 << 24)], b"m", SMALL), max_context_tokens=5000
    )
    yield engine
    engine.close()


def request(question: str = "why?", **sampling: object):
    return doc_request(TOKENIZER, ["one document", "another"], question, **sampling)


async def collect(stream) -> Answer:
    return Answer([output async for output in stream])


async def until_idle(engine) -> None:
    while engine.has_work():
        await asyncio.sleep(0.001)


def run(engine, scenario) -> None:
    """`scenario(thread)` in an event loop, and the thread closed behind it."""

    async def main() -> None:
        thread = EngineThread(engine)
        try:
            await asyncio.wait_for(scenario(thread), timeout=60)
        finally:
            await thread.close(drain_s=5)
        assert not thread.is_alive

    asyncio.run(main())


def test_many_streams_at_once_give_what_the_engine_gives(engine, model):
    requests = [request(f"question {i}", temperature=0.5, seed=i) for i in range(6)]
    plain = JambaEngine(model, TOKENIZER, PrefixCache((), b"m", SMALL), max_context_tokens=5000)
    expected = [run_one(plain, one).token_ids for one in requests]
    plain.close()

    async def scenario(thread):
        answers = await asyncio.gather(*(collect(thread.generate(one)) for one in requests))
        assert [answer.token_ids for answer in answers] == expected

    run(engine, scenario)


def test_a_refused_request_raises_before_the_first_token(engine):
    async def scenario(thread):
        with pytest.raises(ContextTooLong):
            await thread.generate(request(max_new_tokens=6000))
        with pytest.raises(ContextTooLong):
            await anext(thread.generate(request(max_new_tokens=6000)))
        stream = await thread.generate(request())
        assert (await collect(stream)).end.finish_reason == "length"

    run(engine, scenario)


def test_closing_the_stream_aborts_within_one_step(engine):
    async def scenario(thread):
        async with aclosing(thread.generate(request(max_new_tokens=4000))) as stream:
            await anext(stream)
        working = engine.working_steps
        await until_idle(engine)
        assert engine.working_steps <= working + 2  # the one under way, and the one that reports the abort
        assert [output async for output in stream] == []

    run(engine, scenario)


def test_closing_before_the_engine_has_seen_the_request(engine):
    async def scenario(thread):
        stream = thread.generate(request(max_new_tokens=4000))
        await stream.aclose()
        assert [output async for output in stream] == []
        await collect(thread.generate(request(max_new_tokens=1)))  # behind it
        await until_idle(engine)
        assert engine.working_steps < 10

    run(engine, scenario)


def test_a_dropped_stream_does_not_run_on(engine):
    async def scenario(thread):
        stream = thread.generate(request(max_new_tokens=4000))
        await anext(stream)
        del stream
        gc.collect()
        await until_idle(engine)
        assert engine.working_steps < 3000

    run(engine, scenario)


def test_a_reader_that_is_cancelled_while_waiting_loses_nothing(engine):
    async def scenario(thread):
        stream = thread.generate(request(max_new_tokens=20))
        seen = []
        while not seen or seen[-1].finish_reason is None:
            try:
                seen.append(await asyncio.wait_for(anext(stream), timeout=0.0005))
            except TimeoutError:
                continue
        assert len(seen) == 20

    run(engine, scenario)


def test_close_lets_requests_finish_and_takes_no_more(engine):
    async def scenario(thread):
        stream = await thread.generate(request(max_new_tokens=30))
        closing = asyncio.create_task(thread.close(drain_s=30))
        answer = await collect(stream)
        assert (len(answer.token_ids), answer.end.finish_reason) == (30, "length")
        await closing
        with pytest.raises(EngineStopped):
            await thread.generate(request())

    run(engine, scenario)


def test_close_ends_what_does_not_finish_in_time(engine):
    async def scenario(thread):
        stream = await thread.generate(request(max_new_tokens=4000))
        await anext(stream)
        await thread.close(drain_s=0)
        with pytest.raises(EngineStopped, match="closed"):
            await collect(stream)

    run(engine, scenario)


def test_a_failing_engine_fails_its_streams_and_stops(engine, caplog):
    async def scenario(thread):
        stream = await thread.generate(request(max_new_tokens=4000))
        engine.fail_next = True
        with pytest.raises(EngineStopped, match="the device is gone") as failure:
            await collect(stream)
        assert isinstance(failure.value.__cause__, OSError)
        assert not thread.is_alive
        with pytest.raises(EngineStopped, match="the device is gone"):
            await thread.generate(request())

    run(engine, scenario)


def test_invalidation_while_answers_run(engine):
    async def scenario(thread):
        one = request()
        first = await collect(thread.generate(one))
        second = await collect(thread.generate(one))
        assert second.end.cached_tokens == one.boundaries[-1]
        engine.prefix_cache.invalidate({"one document"})
        third = await collect(thread.generate(one))
        assert third.end.cached_tokens == one.tag_starts["one document"]
        assert first.token_ids == second.token_ids == third.token_ids

    run(engine, scenario)


def test_an_event_loop_that_ends_leaves_no_request_behind(engine):
    threads = []

    async def main():
        threads.append(EngineThread(engine))
        await threads[0].generate(request(max_new_tokens=4000))

    asyncio.run(main())
    asyncio.run(threads[0].close(drain_s=20))
    assert engine.working_steps < 3000


def test_between_requests_the_engine_prepares_until_nothing_is_left(engine):
    """A request that comes meanwhile waits for a piece of it at most; what fails is left to the requests."""
    pieces, go_on = [], threading.Semaphore(2)

    def prepare(max_batch):
        for i in range(4):
            go_on.acquire()
            pieces.append(i)
            yield
        raise RuntimeError("no memory for a graph")

    engine._preparing = prepare(8)

    async def scenario(thread):
        while len(pieces) < 2:
            await asyncio.sleep(0.01)
        answer = asyncio.create_task(collect(thread.generate(request())))
        await asyncio.sleep(0.05)
        go_on.release()
        assert (await answer).end.finish_reason == "length"
        assert pieces == [0, 1, 2]
        go_on.release(2)
        while len(pieces) < 4:
            await asyncio.sleep(0.01)
        assert (await collect(thread.generate(request()))).end.finish_reason == "length"
        assert not engine.prepare()

    run(engine, scenario)

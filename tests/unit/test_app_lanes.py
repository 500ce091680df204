"""More searches and answers at once than there are threads: other calls go on."""

import asyncio
import threading

import pytest
from app_kit import LIGHTHOUSE, make_settings, running_service

MANY = 50  # anyio has 40 threads


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body", "slow"),
    [("/v1/search", {"query": "keeper"}, "search"), ("/v1/answers", {"question": "Who is the keeper?"}, "find")],
)
async def test_searches_that_take_long_hold_up_no_other_call(tiny_checkpoint, tmp_path, monkeypatch, path, body, slow):
    answers = {"max_pending": MANY, "max_wait_s": 0, "max_output_tokens": 1}
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data", answers=answers)) as client:
        document = await client.upload("light.md", LIGHTHOUSE)
        finder, begun, ended = client.app.state.service.finder, threading.Event(), threading.Event()
        work = getattr(finder, slow)

        def wait_and_work(*arguments):
            begun.set()
            assert ended.wait(60)
            return work(*arguments)

        monkeypatch.setattr(finder, slow, wait_and_work)
        waiting = [asyncio.create_task(client.post(path, json=body)) for _ in range(MANY)]
        try:
            while not begun.is_set():
                await asyncio.sleep(0.01)
            for _ in range(3):
                for other in ("/readyz", "/v1/documents", f"/v1/documents/{document['id']}"):
                    assert (await asyncio.wait_for(client.get(other), 30)).status_code == 200
            assert not any(task.done() for task in waiting)
        finally:
            ended.set()
        replies = await asyncio.gather(*waiting)
        assert {reply.status_code for reply in replies} == {200}

"""Server-Sent Events: typed events with ids, and comments that keep an idle connection open."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from pydantic import BaseModel
from starlette.responses import StreamingResponse

SSE_HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache, no-transform"}
STREAMS_TOO: dict[int | str, Any] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer; with `stream`, its Server-Sent Events"}
}
KEEPALIVE = ": keepalive\n\n"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Event:
    type: str
    data: BaseModel | Mapping[str, Any]


def event_response(events: AsyncGenerator[Event, None], keepalive_s: float) -> StreamingResponse:
    """A response that sends the events as they come; when the client leaves, the generator is closed."""
    return StreamingResponse(
        send_with_keepalive(format_events(events), keepalive_s), media_type="text/event-stream", headers=SSE_HEADERS
    )


async def format_events(events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
    """Each event in the wire format, numbered from 1."""
    try:
        number = 0
        async for event in events:
            number += 1
            data = event.data.model_dump_json() if isinstance(event.data, BaseModel) else json.dumps(event.data)
            yield f"id: {number}\nevent: {event.type}\ndata: {data}\n\n"
    finally:
        await events.aclose()


async def send_with_keepalive(lines: AsyncGenerator[str, None], keepalive_s: float) -> AsyncIterator[str]:
    """`lines`, with a comment whenever there was none for `keepalive_s`; `lines` is closed in every case."""
    async with aclosing(with_pauses(lines, keepalive_s)) as items:
        async for line in items:
            yield KEEPALIVE if line is None else line


async def with_pauses(source: AsyncGenerator[Item, None], pause_s: float) -> AsyncGenerator[Item | None, None]:
    """The items of `source`, and None whenever there was none for `pause_s`; `source` is closed in every case."""
    waiting: asyncio.Future[Item] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait({waiting}, timeout=pause_s)
            if not done:
                yield None
                continue
            try:
                item = waiting.result()
            except StopAsyncIteration:
                return
            finally:
                waiting = None
            yield item
    finally:
        with anyio.CancelScope(shield=True):  # the client may be gone: what runs for it is stopped all the same
            if waiting is not None:
                waiting.cancel()
                await asyncio.wait({waiting})
            await source.aclose()

"""Server-Sent Events: typed events with ids, and comments as keep-alives."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.errors import ServiceStopping, describe_error

SSE_HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache, no-transform"}
_EVENTS: dict[str, Any] = {"text/event-stream": {}}
STREAMS: dict[int | str, Any] = {200: {"content": _EVENTS, "description": "Server-Sent Events"}}
STREAMS_TOO: dict[int | str, Any] = {
    200: {"content": _EVENTS, "description": "The answer; with `stream`, its Server-Sent Events"}
}
KEEPALIVE = ": keepalive\n\n"

Item = TypeVar("Item")


@dataclass(frozen=True)
class Event:
    type: str
    data: BaseModel | Mapping[str, Any]


class EventStream(StreamingResponse):
    """Sends lines as they come, and a comment after `keepalive_s` without one; closes the generator if the client
    disconnects. If the service stops first, sends `last_line` of the problem, or just breaks the connection if that is
    empty."""

    def __init__(
        self, lines: AsyncGenerator[str, None], keepalive_s: float, last_line: Callable[[Mapping[str, Any]], str]
    ) -> None:
        super().__init__(send_with_keepalive(lines, keepalive_s), media_type="text/event-stream", headers=SSE_HEADERS)
        self._last_line, self._has_started = last_line, False

    async def stream_response(self, send: Send) -> None:
        self._has_started = True
        await super().stream_response(send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:  # by the server, not by a disconnecting client
            last = self._last_line(describe_error(ServiceStopping())) if self._has_started else ""
            if last:
                await send({"type": "http.response.body", "body": last.encode(), "more_body": False})
            raise


def event_response(
    events: AsyncGenerator[Event, None], keepalive_s: float, error_type: str | None = None
) -> EventStream:
    """A response that streams the events; if the service stops before they end, an event of `error_type` says so."""
    writer = EventWriter()

    def last_line(problem: Mapping[str, Any]) -> str:
        return "" if error_type is None or writer.has_ended else writer.write(Event(error_type, problem))

    return EventStream(format_events(events, writer), keepalive_s, last_line)


class EventWriter:
    """Writes events in the wire format, numbered from 1."""

    def __init__(self) -> None:
        self._number, self.has_ended = 0, False

    def write(self, event: Event) -> str:
        self._number += 1
        self.has_ended = event.type.endswith((".completed", ".error"))
        data = event.data.model_dump(mode="json") if isinstance(event.data, BaseModel) else event.data
        line = json.dumps(data)  # ASCII: many clients treat U+2028 and U+0085 as line ends
        return f"id: {self._number}\nevent: {event.type}\ndata: {line}\n\n"


async def format_events(
    events: AsyncGenerator[Event, None], writer: EventWriter | None = None
) -> AsyncGenerator[str, None]:
    """Each event in the wire format."""
    writer = writer or EventWriter()
    try:
        async for event in events:
            yield writer.write(event)
    finally:
        await events.aclose()


async def send_with_keepalive(lines: AsyncGenerator[str, None], keepalive_s: float) -> AsyncIterator[str]:
    """`lines`, with a comment after each `keepalive_s` without one; always closes `lines`."""
    async with aclosing(with_pauses(lines, keepalive_s)) as items:
        async for line in items:
            yield KEEPALIVE if line is None else line


async def with_pauses(source: AsyncGenerator[Item, None], pause_s: float) -> AsyncGenerator[Item | None, None]:
    """The items of `source`, and None after each `pause_s` without one; always closes `source`."""
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
        with anyio.CancelScope(shield=True):  # also stop the source if the client is gone
            if waiting is not None:
                waiting.cancel()
                await asyncio.wait({waiting})
            await source.aclose()

"""/v1/answers: questions answered from the documents, with every quote located."""

import asyncio

import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from app import schemas
from app.deps import KnownQuery, Reader, ServiceDep, SettingsDep
from app.generation import RunningAnswer
from app.sse import STREAMS_TOO, event_response

router = APIRouter(prefix="/v1", tags=["answers"], dependencies=[KnownQuery])


@router.post("/answers", response_model=schemas.Answer, responses=STREAMS_TOO)
async def create_answer(
    body: schemas.AnswerRequest, request: Request, principal: Reader, service: ServiceDep, settings: SettingsDep
) -> schemas.Answer | Response:
    """Answer from the indexed documents; with `stream`, as Server-Sent Events: `answer.created`, `answer.sources`,
    `answer.text.delta`, `answer.citation.added`, finally `answer.completed` (the whole answer) or `answer.error`. With
    the header `Prefer: progress` also `answer.progress`, every second before the first word: how much has been read."""
    query = await anyio.to_thread.run_sync(service.read_query, body, principal)
    answer = await service.start_answer(query)
    if body.stream:
        progress = "progress" in request.headers.get("Prefer", "")
        return event_response(answer.events(progress), settings.server.keepalive_s, "answer.error")
    return await collect_while_connected(request, answer)


async def collect_while_connected(request: Request, answer: RunningAnswer) -> schemas.Answer:
    """The finished answer. If the client disconnects first, the generation is aborted and ClientDisconnect raised."""
    work = asyncio.ensure_future(answer.collect())
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnect
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.wait({work, gone})


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

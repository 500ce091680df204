"""OpenAI-compatible /v1/chat/completions and /v1/models: one model name per collection, `jamba-rag/<collection>`.

The last user message is the question; earlier messages make it a follow-up. Citations are in
`choices[0].message.citations`, or in the last chunk.
"""

import json
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from app import schemas
from app.auth import Principal
from app.deps import Reader, ServiceDep, SettingsDep
from app.errors import InvalidRequest, ModelNotFound
from app.generation import RunningAnswer
from app.routes.answers import collect_while_connected
from app.service import RagService
from app.sse import STREAMS_TOO, Event, EventStream

router = APIRouter(prefix="/v1", tags=["openai"])

MODEL_PREFIX = "jamba-rag/"
_DONE = "data: [DONE]\n\n"


@router.get("/models")
def list_models(principal: Reader, service: ServiceDep) -> schemas.ModelList:
    """One model for each collection that the key may see."""
    visible = [collection for collection in service.store.list_collections() if principal.may_see(collection.name)]
    return schemas.ModelList(
        data=[schemas.ModelCard(id=MODEL_PREFIX + c.name, created=int(c.created_at)) for c in visible]
    )


@router.get("/models/{model:path}")
def get_model(model: str, principal: Reader, service: ServiceDep) -> schemas.ModelCard:
    """The model of one collection."""
    collection = service.store.get_collection(_collection_of(model, principal, service))
    return schemas.ModelCard(id=model, created=int(collection.created_at))


@router.post("/chat/completions", responses=STREAMS_TOO)
async def create_completion(
    body: schemas.ChatCompletionRequest,
    request: Request,
    principal: Reader,
    service: ServiceDep,
    settings: SettingsDep,
) -> Response:
    """Answer the last user message from the collection in the model name."""
    asked = await anyio.to_thread.run_sync(_read_request, body, principal, service)
    answer = await service.start_answer(await anyio.to_thread.run_sync(service.read_query, asked, principal))
    if body.stream:
        with_usage = bool((body.stream_options or {}).get("include_usage"))
        return EventStream(_chunks(answer, body.model, with_usage), settings.server.keepalive_s, _broken_off)
    return JSONResponse(_completion(await collect_while_connected(request, answer), body.model))


def _collection_of(model: str, principal: Principal, service: RagService) -> str:
    name = model.removeprefix(MODEL_PREFIX)
    visible = service.visible_collections(None, principal)
    if not model.startswith(MODEL_PREFIX) or name not in visible:
        raise ModelNotFound(f"there is no model {model!r}; models are named {MODEL_PREFIX}<collection>")
    return name


def _read_request(
    body: schemas.ChatCompletionRequest, principal: Principal, service: RagService
) -> schemas.AnswerRequest:
    collection = _collection_of(body.model, principal, service)
    last = body.messages[-1]
    if isinstance(last.content, list) and (other := [part.type for part in last.content if part.type != "text"]):
        raise InvalidRequest(f"the question has a part of type {other[0][:40]!r}; only text can be read")
    if last.role != "user" or not _text_of(last).strip():
        raise InvalidRequest("the last of messages must be the user's, with text: it is the question")
    return schemas.AnswerRequest(
        messages=[
            schemas.Message(role=message.role, content=_text_of(message))
            for message in body.messages
            if message.role in ("user", "assistant") and _text_of(message).strip()
        ],
        collections=[collection],
        max_output_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=body.temperature or 0.0,
        seed=None if body.seed is None else abs(body.seed),
    )


def _text_of(message: schemas.ChatMessage) -> str:
    content = message.content or ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _usage(answer: schemas.Answer) -> dict[str, Any]:
    usage = answer.usage
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens},
    }


def _finish_reason(answer: schemas.Answer) -> str:
    return "length" if answer.truncated else "stop"


def _completion(answer: schemas.Answer, model: str) -> dict[str, Any]:
    message = {
        "role": "assistant",
        "content": answer.text,
        "refusal": None,
        "citations": [citation.model_dump() for citation in answer.citations],
        "grounding": answer.grounding,
    }
    return {
        "id": f"chatcmpl-{answer.id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(answer)}],
        "usage": _usage(answer),
    }


async def _chunks(answer: RunningAnswer, model: str, with_usage: bool) -> AsyncGenerator[str, None]:
    """The answer as `chat.completion.chunk` events, ended by `[DONE]`."""
    head = {
        "id": f"chatcmpl-{answer.id}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
    }
    events = answer.events()
    try:
        async for event in events:
            for body in _translate(event, with_usage):
                yield f"data: {json.dumps(body if 'error' in body else head | body)}\n\n"
        yield _DONE
    finally:
        await events.aclose()


def _translate(event: Event, with_usage: bool) -> list[dict[str, Any]]:
    match event.type, event.data:
        case "answer.created", _:
            return [_choice({"role": "assistant", "content": ""})]
        case "answer.text.delta", dict() as data:
            return [_choice({"content": data["text"]})]
        case "answer.error", dict() as problem:
            return [_error(problem)]
        case "answer.completed", schemas.Answer() as answer:
            citations = [citation.model_dump() for citation in answer.citations]
            last = _choice({"citations": citations, "grounding": answer.grounding}, _finish_reason(answer))
            return [last, {"choices": [], "usage": _usage(answer)}] if with_usage else [last]
        case _:
            return []


def _error(problem: Mapping[str, Any]) -> dict[str, Any]:
    return {"error": {"message": problem["detail"], "type": problem["code"], "code": problem["code"]}}


def _broken_off(problem: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(_error(problem))}\n\n{_DONE}"


def _choice(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]}

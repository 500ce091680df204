"""/v1/documents: upload, read, replace, retry, delete."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse

from app import intake, page_images, schemas
from app.auth import Unauthorized
from app.deps import AuthenticatorDep, KnownQuery, Reader, ServiceDep, SettingsDep, Writer, tell_methods
from app.errors import InvalidRequest, describe_error
from app.page_images import is_known
from app.sse import STREAMS, Event, event_response
from retrieval.store import DocumentNotFound
from retrieval.types import Document, Status

router = APIRouter(prefix="/v1/documents", tags=["documents"], dependencies=[KnownQuery])

_POLL_S = 0.1
_BYTES = {"type": "string", "format": "binary"}
_FILE_FIELD = {"type": "array", "items": _BYTES, "minItems": 1}
_FIELDS = {
    "collection": {"type": "string", "default": "default", "description": "Made where it is not there."},
    "metadata": {"type": "string", "description": "A JSON object, for `filters`."},
    "on_conflict": {
        "type": "string",
        "enum": ["skip", "replace", "error"],
        "default": "skip",
        "description": "What becomes of bytes that the collection has already.",
    },
}


def _form(properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "required": ["file"], "properties": properties, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post(
    "",
    status_code=202,
    response_model=schemas.UploadResult,
    responses={200: {"model": schemas.UploadResult, "description": "Every file was there already"}},
    openapi_extra=_form({"file": _FILE_FIELD, **_FIELDS}),
)
async def upload_documents(
    request: Request,
    principal: Writer,
    service: ServiceDep,
    settings: SettingsDep,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """Queue files for ingestion. With the 202 their bytes are on disk; one bad file never fails the others."""
    reply = await intake.accept_upload(request, service, principal, settings.ingest, idempotency_key)
    request.state.written = [document["id"] for document in json.loads(reply.body)["data"]]
    return Response(reply.body, reply.status, media_type="application/json")


@router.get("")
def list_documents(
    principal: Reader,
    service: ServiceDep,
    response: Response,
    collection: str | None = None,
    status: Status | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: str | None = None,
) -> schemas.DocumentPage:
    """A page of documents, oldest first; `after` is the last id of the previous page, even if deleted since.

    The header Allow has POST if the key may also upload, and so delete.
    """
    tell_methods(response, principal.may_write)
    names = service.visible_collections(None if collection is None else [collection], principal)
    if after is not None:
        service.check_visible(after, principal)
    found = service.store.list_documents(names, status, limit + 1, after)
    data = [schemas.Document.model_validate(document) for document in found[:limit]]
    return schemas.DocumentPage(data=data, has_more=len(found) > limit)


@router.get("/{document_id}")
def get_document(document_id: str, principal: Reader, service: ServiceDep) -> schemas.Document:
    """One document, in the state of its newest version."""
    return schemas.Document.model_validate(service.visible_document(document_id, principal))


@router.get("/{document_id}/events", response_class=Response, responses=STREAMS)
async def watch_document(
    document_id: str,
    principal: Reader,
    service: ServiceDep,
    settings: SettingsDep,
    authenticator: AuthenticatorDep,
) -> Response:
    """Server-Sent Events: `document.progress` while it is ingested, then `document.ready` or `document.failed`."""

    def look() -> Document:
        authenticator.check_in_force(principal)
        return service.visible_document(document_id, principal)

    events = _progress_events(await anyio.to_thread.run_sync(look), look)
    return event_response(events, settings.server.keepalive_s)


async def _progress_events(document: Document, look: Callable[[], Document]) -> AsyncGenerator[Event, None]:
    shown: Document | None = None
    try:
        while document.status not in ("ready", "failed"):
            if document != shown:
                yield Event("document.progress", schemas.Document.model_validate(document))
                shown = document
            await asyncio.sleep(_POLL_S)
            document = await anyio.to_thread.run_sync(look)
        yield Event(f"document.{document.status}", schemas.Document.model_validate(document))
    except (DocumentNotFound, Unauthorized) as error:  # document deleted or key revoked meanwhile
        yield Event("document.failed", describe_error(error))


@router.get(
    "/{document_id}/file",
    response_class=FileResponse,
    responses={
        200: {"content": {"*/*": {"schema": _BYTES}}, "description": "The bytes, as the document's media type"},
        304: {"description": "The bytes that If-None-Match names are still right"},
    },
)
def get_file(
    document_id: str, principal: Reader, service: ServiceDep, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """The original bytes, always as a download: those of the version that answers, until a new one is ready."""
    service.visible_document(document_id, principal)
    document = service.store.answering_version(document_id)
    headers = {
        "Content-Security-Policy": "sandbox; default-src 'none'",
        "ETag": f'"{document.sha256}"',
        "Cache-Control": "private, no-cache",
    }
    if is_known(headers["ETag"], if_none_match):
        return Response(status_code=304, headers=headers)
    return FileResponse(
        service.files.find(document.sha256),
        media_type=document.media_type,
        filename=document.filename,
        headers=headers,
    )


@router.get("/{document_id}/text")
def get_text(
    document_id: str,
    principal: Reader,
    service: ServiceDep,
    start: Annotated[int, Query(ge=0)] = 0,
    end: Annotated[int | None, Query(ge=0)] = None,
) -> schemas.DocumentText:
    """The stored text, or its characters start..end, with their pages, whose offsets refer to the whole text."""
    if end is not None and end < start:
        raise InvalidRequest(f"end {end} is before start {start}")
    service.visible_document(document_id, principal)
    content = service.store.get_content(document_id)
    text = content.text[start:end]
    pages = [page for page in content.pages if page.char_start < start + len(text) and page.char_end > start]
    return schemas.DocumentText(text=text, pages=[schemas.PageSpan.model_validate(page) for page in pages])


@router.get(
    "/{document_id}/pages/{page}/image",
    response_class=Response,
    responses={
        200: {
            "content": {"image/png": {"schema": _BYTES}},
            "description": "The page; Highlight-Boxes says what is marked on it",
        },
        304: {"description": "The picture that If-None-Match names is still right"},
    },
)
def get_page_image(
    document_id: str,
    page: Annotated[int, Path(ge=1)],
    principal: Reader,
    service: ServiceDep,
    settings: SettingsDep,
    start: Annotated[int, Query(ge=0)] = 0,
    end: Annotated[int, Query(ge=0)] = 0,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """A page of a PDF as a PNG, with the characters start..end of the document's text highlighted.

    The header Highlight-Boxes lists the highlighted rectangles as `left top width height`, in fractions of the image,
    separated by commas; it is empty if the passage is not found on the page.
    """
    service.visible_document(document_id, principal)
    return page_images.respond(service, document_id, page, (start, end), if_none_match, settings.ingest.parse_max_bytes)


@router.get("/{document_id}/chunks")
def get_chunks(document_id: str, principal: Reader, service: ServiceDep) -> schemas.ChunkList:
    """The chunks that search finds, in order."""
    service.visible_document(document_id, principal)
    chunks = service.store.get_chunks(document_id)
    return schemas.ChunkList(data=[schemas.Chunk.model_validate(chunk) for chunk in chunks])


@router.put(
    "/{document_id}",
    status_code=202,
    responses={200: {"model": schemas.Document, "description": "The same bytes, name and metadata: nothing to do"}},
    openapi_extra=_form({"file": _BYTES, "metadata": _FIELDS["metadata"]}),
)
async def replace_document(
    document_id: str,
    request: Request,
    response: Response,
    principal: Writer,
    service: ServiceDep,
    settings: SettingsDep,
) -> schemas.Document:
    """Upload a new version, which replaces the old one once it is ready."""
    document, is_new = await intake.accept_version(request, service, principal, settings.ingest, document_id)
    response.status_code = 202 if is_new else 200
    return schemas.Document.model_validate(document)


@router.post("/{document_id}/retry", status_code=202)
def retry_document(document_id: str, principal: Writer, service: ServiceDep) -> schemas.Document:
    """Ingest a failed document again; others stay unchanged."""
    service.visible_document(document_id, principal)
    document = service.store.retry_document(document_id)
    service.wake_workers()
    return schemas.Document.model_validate(document)


@router.delete("/{document_id}", status_code=204)
def delete_document(document_id: str, principal: Writer, service: ServiceDep) -> None:
    """Delete a document everywhere: after the 204, no search, answer or cached model state contains any of it."""
    service.delete_document(service.visible_document(document_id, principal))

"""Maps exceptions to problem+json responses, in one table. Routes catch nothing.

Most exceptions are defined beside the code that raises them. Their message becomes `detail`, so it must say what is
wrong, the limit, and what to do.
"""

import difflib
import errno
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Mount

from app.auth import Forbidden, Unauthorized
from app.field_checks import in_plain_words
from app.limits import CollectionFull, RateLimited
from app.log import request_id_var
from app.uploads import BadUpload
from ingest.files import FileTooLarge, OriginalMissing
from ingest.parse import ParseError
from ingest.sniff import EmptyFile, UnsupportedMediaType
from model.engine_request import ContextTooLong, EngineOverloaded
from model.engine_thread import EngineStopped
from retrieval.packing import BudgetTooSmall
from retrieval.store import (
    CollectionExists,
    CollectionNotFound,
    DocumentNotFound,
    DocumentNotReady,
    DuplicateDocument,
    IdempotencyConflict,
    StorageBusy,
    StorageFull,
    StorageUnwritable,
)
from retrieval.whole import EvidenceTooLarge

log = logging.getLogger(__name__)

PROBLEM_TYPE = "application/problem+json"
_RETRY_AFTER_S = 2  # default


class InvalidRequest(ValueError):
    """The request is well-formed but not valid."""


class Overloaded(RuntimeError):
    """The service is at its limit of running and waiting work; `retry_after_s`: when there should be room."""

    def __init__(self, message: str, retry_after_s: int = _RETRY_AFTER_S) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class BodyTooLarge(ValueError):
    """The body of a request other than an upload exceeds the limit."""


class BodyStalled(ValueError):
    """The client stopped sending the body for longer than the timeout."""


class EncodedBody(ValueError):
    """The body of a request is compressed."""


class DocumentDeleted(RuntimeError):
    """A document was deleted while an answer was being made from it."""


class QuestionTooLong(ValueError):
    """The question has more characters than fit into any context; it is refused without tokenizing it."""


class ServiceStopping(EngineStopped):
    """The service is stopping, and this request did not finish within the grace period."""

    def __init__(self) -> None:
        super().__init__("the service is stopping; send the request again when it is back")


class KeyNotFound(ValueError):
    """No unrevoked key has this id."""


class PageNotFound(ValueError):
    """The document has no such page, or its format has no pages."""


class ModelNotFound(ValueError):
    """The model name belongs to no collection."""


class UploadRefused(ValueError):
    """No file of the request was accepted; `cause` is the error of the first one, `errors` lists all."""

    def __init__(self, cause: Exception, errors: Sequence[dict[str, str]]) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.errors = list(errors)


@dataclass(frozen=True)
class ErrorKind:
    status: int
    code: str
    title: str


ERRORS: dict[type[Exception], ErrorKind] = {
    Unauthorized: ErrorKind(401, "unauthorized", "A valid API key is needed"),
    Forbidden: ErrorKind(403, "forbidden", "The key's role does not allow this"),
    CollectionNotFound: ErrorKind(404, "collection_not_found", "No such collection"),
    DocumentNotFound: ErrorKind(404, "document_not_found", "No such document"),
    PageNotFound: ErrorKind(404, "page_not_found", "No such page"),
    KeyNotFound: ErrorKind(404, "key_not_found", "No such key"),
    ModelNotFound: ErrorKind(404, "model_not_found", "No such model"),
    BodyStalled: ErrorKind(408, "request_timeout", "The rest of the request did not come"),
    CollectionExists: ErrorKind(409, "collection_exists", "The collection is there already"),
    DocumentNotReady: ErrorKind(409, "document_not_ready", "The document is not ready yet"),
    DuplicateDocument: ErrorKind(409, "duplicate", "The same file is there already"),
    DocumentDeleted: ErrorKind(409, "document_deleted", "A document of the answer was deleted"),
    IdempotencyConflict: ErrorKind(409, "idempotency_conflict", "The Idempotency-Key was used with another request"),
    OriginalMissing: ErrorKind(410, "file_missing", "The original is gone"),
    FileTooLarge: ErrorKind(413, "file_too_large", "The file is too large"),
    ContextTooLong: ErrorKind(413, "context_too_long", "The prompt does not fit the model's context"),
    QuestionTooLong: ErrorKind(413, "context_too_long", "The prompt does not fit the model's context"),
    EvidenceTooLarge: ErrorKind(413, "context_too_long", "The documents do not fit the model's context"),
    BodyTooLarge: ErrorKind(413, "request_too_large", "The request is too large"),
    UnsupportedMediaType: ErrorKind(415, "unsupported_media_type", "This kind of file cannot be read"),
    EncodedBody: ErrorKind(415, "unsupported_media_type", "Compressed requests cannot be read"),
    ParseError: ErrorKind(422, "unreadable_document", "The document cannot be read"),
    EmptyFile: ErrorKind(422, "empty_file", "The file is empty"),
    BadUpload: ErrorKind(422, "invalid_request", "The upload is not a valid form"),
    InvalidRequest: ErrorKind(422, "invalid_request", "The request is not valid"),
    BudgetTooSmall: ErrorKind(422, "invalid_request", "No passage fits the evidence allowed"),
    Overloaded: ErrorKind(429, "overloaded", "The service is busy"),
    EngineOverloaded: ErrorKind(429, "overloaded", "The service is busy"),
    RateLimited: ErrorKind(429, "rate_limited", "The key has used up its limit"),
    EngineStopped: ErrorKind(503, "unavailable", "The service is stopping"),
    StorageBusy: ErrorKind(503, "storage_busy", "Another program is writing to the database"),
    StorageUnwritable: ErrorKind(503, "storage_not_writable", "The data directory cannot be written"),
    CollectionFull: ErrorKind(507, "collection_full", "The collection is full"),
    StorageFull: ErrorKind(507, "storage_full", "The disk is full"),
}
_INTERNAL = ErrorKind(500, "internal_error", "Something went wrong in the service")
_OPENAI_PATHS = ("/v1/chat/", "/v1/models")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_OF_SYSTEM = {errno.ENOSPC: StorageFull, errno.EDQUOT: StorageFull, errno.EROFS: StorageUnwritable}


def kind_of(error: BaseException) -> ErrorKind:
    """The row of the table for this exception, or that of an internal error."""
    for cls in type(error).__mro__:
        if cls in ERRORS:
            return ERRORS[cls]
    if isinstance(error, OSError) and error.errno in _OF_SYSTEM:
        return ERRORS[_OF_SYSTEM[error.errno]]
    return _INTERNAL


def problem_body(kind: ErrorKind, detail: str, **more: Any) -> dict[str, Any]:
    """Members of the problem+json for this request."""
    return {
        "type": f"urn:jamba-rag:problem:{kind.code}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "code": kind.code,
        "request_id": request_id_var.get(),
        **more,
    }


def describe_error(error: Exception) -> dict[str, Any]:
    """The problem of an exception, also for event streams. Internal errors are logged, not shown."""
    if isinstance(error, UploadRefused):
        return problem_body(kind_of(error.cause), str(error), errors=error.errors)
    kind = kind_of(error)
    if kind.status == 500:
        log.error("unexpected error", exc_info=error)
        return problem_body(kind, "the service's log has the cause under this request id")
    return problem_body(kind, str(error))


def problem_response(path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """problem+json; on OpenAI-compatible and unknown paths also with the member `error` that OpenAI clients read."""
    if path.startswith(_OPENAI_PATHS) or body["code"] == "not_found":
        error = {"message": body["detail"], "type": body["code"], "code": body["code"], "param": None}
        body = {**body, "error": error}
    return JSONResponse(body, body["status"], headers, media_type=PROBLEM_TYPE)


def install_error_handlers(app: FastAPI) -> None:
    """Answer exceptions of routes with problem+json; exceptions not listed here are handled in app/middleware.py."""
    for cls in (*ERRORS, UploadRefused, OSError):
        app.add_exception_handler(cls, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


async def _on_error(request: Request, error: Exception) -> Response:
    body = describe_error(error)
    return problem_response(request.url.path, body, error_headers(error, body["status"]))


def error_headers(error: Exception, status: int) -> dict[str, str]:
    """Headers of an error response: how to authenticate, when to retry, that the connection is closed."""
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, BodyStalled):
        return {"Connection": "close"}  # or late bytes of the body would be parsed as another request
    return {"Retry-After": str(getattr(error, "retry_after_s", _RETRY_AFTER_S))} if status in (429, 503) else {}


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    told: dict[str, str] = {}  # by field; for a union, only the message of its first type
    for field in error.errors()[:5]:
        told.setdefault(_place(field), _describe_field(field, _fields_of(request)))
    details = "; ".join(told.values())
    if error.errors()[0]["type"] == "model_attributes_type" and "json" not in request.headers.get("content-type", ""):
        details += "; send JSON with the header Content-Type: application/json"
    return problem_response(request.url.path, problem_body(ERRORS[InvalidRequest], details))


def _fields_of(request: Request) -> list[str]:
    """The fields of this route's body."""
    body = getattr(request.scope.get("route"), "body_field", None)
    return list(getattr(body and body.field_info.annotation, "model_fields", ()))


def _place(field: dict[str, Any]) -> str:
    names = [str(part) for part in field["loc"] if part != "body"]
    return ".".join(name for name in names if "[" not in name)  # brackets name the type of a union


def _describe_field(field: dict[str, Any], known: Sequence[str] = ()) -> str:
    names, place = [str(part) for part in field["loc"]], _place(field)
    if field["type"] == "json_invalid":
        return f"the body is not JSON: {field.get('ctx', {}).get('error', field['msg'])} at character {place}"
    message = field["msg"]
    if field["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(place, known, n=1)
        near = f"; the nearest is {nearest[0]!r}" if nearest else f"; those known are {', '.join(known)}"
        return f"there is no field {place[:80]!r}{near if known and place in names else ''}"
    if field["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return f"{place or 'body'}: must be a JSON object"
    if field["type"] == "string_pattern_mismatch":
        message = (
            "must be letters (a-z), digits, '.', '_' or '-', at most 64, a letter or digit first"  # of a collection
        )
    elif isinstance(field["input"], str):
        message = re.sub(r" (item|character)(s?) after validation", r" character\2", message)
    return f"{place or 'body'}: {in_plain_words(message)}"


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Errors of the framework itself: unknown paths, wrong methods, bodies that are not JSON."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400 and isinstance(cause := error.__cause__, Exception):
        problem = cause if type(cause) in ERRORS else InvalidRequest(f"the body is not JSON that can be read: {cause}")
        return problem_response(request.url.path, describe_error(problem))
    phrase = HTTPStatus(error.status_code).phrase
    kind = ErrorKind(error.status_code, phrase.lower().replace(" ", "_"), phrase)
    detail, headers = str(error.detail), dict(error.headers or {})
    if error.status_code == 404 and detail == phrase:
        detail = "there is no such path; /docs lists all calls"
    if error.status_code == 405 and (allowed := _allowed(request)):
        headers["Allow"], detail = allowed, f"this path takes {allowed}"
    body = problem_body(kind, f"{request.method} {request.url.path}: {detail}")
    return problem_response(request.url.path, body, headers)


def _allowed(request: Request) -> str:
    """All methods allowed on this path, of which the framework lists only the first route's. Empty below a mount."""
    routes = [route for route in request.app.routes if not isinstance(route, Mount)]
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    return ", ".join(m for m, scope in scopes.items() if any(r.matches(scope)[0] is Match.FULL for r in routes))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)

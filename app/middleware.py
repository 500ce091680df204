"""The middleware around all routes: request id, authentication, limits, response headers, access log."""

import asyncio
import logging
import re
import secrets
import time
from typing import Any
from urllib.parse import unquote

import anyio.to_thread
from fastapi import FastAPI
from opentelemetry.trace import Span, StatusCode
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.audit import AUDITED, WRITES
from app.auth import Principal
from app.errors import (
    METHODS,
    BodyStalled,
    BodyTooLarge,
    EncodedBody,
    Overloaded,
    ServiceStopping,
    describe_error,
    error_headers,
    problem_response,
)
from app.log import request_id_var

log = logging.getLogger("app.access")

MAX_BODY_BYTES = 32 << 20  # of requests that are not uploads
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
_OPEN_PATHS = re.compile(r"/|/web/.*|/healthz|/readyz|/docs|/openapi\.json|/favicon\.ico")
_UPLOAD_PATHS = re.compile(r"/v1/documents(/[^/]*)?")
_ABSOLUTE_FORM = re.compile(rb"(?:http|https)://([^/?#@]+)(/.*)?", re.IGNORECASE)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestFrame:
    """The outermost ASGI layer of the service; pure ASGI, so that streams pass through unbuffered."""

    def __init__(self, app: ASGIApp, owner: FastAPI, max_in_flight: int, stall_s: float) -> None:
        self._app, self._owner, self._max_in_flight, self._stall_s = app, owner, max_in_flight, stall_s
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _take_origin_form(scope)
        scope["headers"] = [header for header in scope["headers"] if header[0] != b"range"]  # ranges are not supported
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(8)
        token = request_id_var.set(request_id)
        start, sent = time.perf_counter(), _Sent(send, request_id)
        self._count(1)
        with self._owner.state.service.tracing.request(scope["method"], headers) as span:
            try:
                await self._handle(scope, _limit_body(receive, scope["path"], headers, self._stall_s), sent)
            finally:
                self._count(-1)
                self._describe(span, scope, sent.status, request_id)
                self._record(scope, sent.status, time.perf_counter() - start)
                request_id_var.reset(token)

    async def _handle(self, scope: Scope, receive: Receive, send: "_Sent") -> None:
        try:
            if not _OPEN_PATHS.fullmatch(scope["path"]):
                if self._in_flight > self._max_in_flight:
                    raise Overloaded(f"{self._max_in_flight} requests are open, which is the limit; try again shortly")
                await anyio.to_thread.run_sync(self._admit, scope)
            await self._app(scope, receive, send)
        except asyncio.CancelledError:  # by the server, `shutdown_s` after it began to stop
            if not send.has_started:
                await _refuse(ServiceStopping(), scope, receive, send)
        except Exception as error:  # from routes only those that errors.py does not list
            if send.has_started:
                raise
            await _refuse(error, scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        """Authenticate and count the request. Blocks. Raises Unauthorized, Forbidden, RateLimited and EncodedBody."""
        headers, authenticator = Headers(scope=scope), self._owner.state.authenticator
        authenticator.check_sender(headers.get("host", ""), headers.get("sec-fetch-site"))
        principal = authenticator.authenticate(headers.get("authorization"))
        scope.setdefault("state", {})["principal"] = principal
        self._owner.state.service.meter.admit_request(principal)
        if (encoding := headers.get("content-encoding", "")).lower() not in ("", "identity"):
            raise EncodedBody(f"the body has the Content-Encoding {encoding[:40]!r}; send it without compression")

    def _count(self, change: int) -> None:
        self._in_flight += change
        self._owner.state.service.metrics.requests_in_flight.set(self._in_flight)

    def _describe(self, span: Span, scope: Scope, status: int, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "other")
        span.update_name(f"{scope['method']} {route}")
        span.set_attributes({"http.route": route, "http.response.status_code": status, "request_id": request_id})
        if status >= 500:
            span.set_status(StatusCode.ERROR)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        metrics = self._owner.state.service.metrics
        method = scope["method"] if scope["method"] in METHODS else "other"
        metrics.requests.labels(method, route, str(status)).inc()
        metrics.request_seconds.labels(route).observe(seconds)
        principal = scope.get("state", {}).get("principal")
        if method in WRITES and scope["path"].startswith(AUDITED):
            self._audit(scope, status, principal)
        extra: dict[str, Any] = {
            "status": status,
            "ms": round(1000 * seconds, 1),
            "key": getattr(principal, "key_id", "-"),
        }
        if trace_id := self._owner.state.service.tracing.current_trace_id():
            extra["trace_id"] = trace_id
        log.info("%s %s -> %d in %.0f ms", scope["method"], scope["path"], status, 1000 * seconds, extra=extra)

    def _audit(self, scope: Scope, status: int, principal: Principal | None) -> None:
        self._owner.state.audit.write(
            request_id=request_id_var.get(),
            key=getattr(principal, "key_id", None),
            role=getattr(principal, "role", None),
            client=(scope.get("client") or ("local",))[0],
            method=scope["method"],
            path=scope["path"],
            status=status,
            written=scope.get("state", {}).get("written", []),
        )


def _take_origin_form(scope: Scope) -> None:
    """Of a target as it is sent to a proxy (RFC 9112, 3.2.2) take the path, and the host instead of the header's."""
    if match := _ABSOLUTE_FORM.fullmatch(scope.get("raw_path") or b""):
        host, path = match[1], match[2] or b"/"
        scope["path"], scope["raw_path"] = unquote(path.decode("ascii")), path
        scope["headers"] = [*(header for header in scope["headers"] if header[0] != b"host"), (b"host", host)]


class _Sent:
    """Adds the common headers to the response, and records its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self.status = 499  # if no response starts: the client disconnected before
        self.has_started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.has_started = message["status"], True
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._request_id
            del headers["Accept-Ranges"]
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
        await self._send(message)


async def _refuse(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    body = describe_error(error)
    await problem_response(scope["path"], body, error_headers(error, body["status"]))(scope, receive, send)


def _limit_body(receive: Receive, path: str, headers: Headers, stall_s: float) -> Receive:
    """Refuse bodies over MAX_BODY_BYTES while they arrive, and bodies that stall for `stall_s`; uploads have a limit
    per file instead."""
    is_form = headers.get("content-type", "").lower().startswith("multipart/")
    is_upload = is_form and _UPLOAD_PATHS.fullmatch(path)
    received, complete = 0, False

    async def limited() -> Message:
        nonlocal received, complete
        try:
            async with asyncio.timeout(None if complete else stall_s):  # after the body only a disconnect can follow
                message = await receive()
        except TimeoutError:
            raise BodyStalled(f"nothing more of the body has come for {stall_s} s; send the request again") from None
        complete = not message.get("more_body", False)
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES and not is_upload:
            raise BodyTooLarge(f"the body is over the limit of {MAX_BODY_BYTES} bytes")
        return message

    return limited

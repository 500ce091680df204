"""FastAPI dependencies of the routes: the service, the settings, and a principal of sufficient role."""

from typing import Annotated

from fastapi import Depends, Request, Response
from fastapi.security import HTTPBearer

from app.auth import Authenticator, Principal
from app.errors import InvalidRequest
from app.service import RagService
from app.settings import Settings
from retrieval.types import Role

_scheme = HTTPBearer(auto_error=False, description="An API key; the first start writes one to <data-dir>/admin.key.")


def _service(request: Request) -> RagService:
    return request.app.state.service


def _settings(request: Request) -> Settings:
    return request.app.state.settings


def _authenticator(request: Request) -> Authenticator:
    return request.app.state.authenticator


class _Require:
    """Dependency that returns the Principal from the middleware. Raises Forbidden if its role is below `role`."""

    def __init__(self, role: Role) -> None:
        self._role = role

    async def __call__(self, request: Request, _: Annotated[object, Depends(_scheme)]) -> Principal:
        principal: Principal = request.state.principal
        principal.require(self._role)
        return principal


def tell_methods(response: Response, may_post: bool) -> None:
    """Set the header Allow of a list, so that the web page offers to add entries only if this key may."""
    response.headers["Allow"] = "GET, POST" if may_post else "GET"


async def known_query(request: Request) -> None:
    """Refuse query parameters that would be silently ignored, unknown or repeated ones. Raises InvalidRequest."""
    names = [name for name, _ in request.query_params.multi_items()]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"the query parameter {repeated[:80]!r} is given twice")
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    if unknown := sorted(set(names) - set(known)):
        without = (
            "takes none"
            if request.method in ("GET", "HEAD", "DELETE")
            else "takes none; other values belong in the body"
        )
        there = f"takes {', '.join(known)}" if known else without
        named = ", ".join(repr(name[:80]) for name in unknown[:5])
        raise InvalidRequest(f"no such query parameter: {named}; {request.method} {request.url.path} {there}")


ServiceDep = Annotated[RagService, Depends(_service)]
SettingsDep = Annotated[Settings, Depends(_settings)]
AuthenticatorDep = Annotated[Authenticator, Depends(_authenticator)]
Reader = Annotated[Principal, Depends(_Require("reader"))]
Writer = Annotated[Principal, Depends(_Require("writer"))]
Admin = Annotated[Principal, Depends(_Require("admin"))]
KnownQuery = Depends(known_query)

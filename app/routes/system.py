"""Health, metrics, effective settings, and the page."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST

from app import schemas
from app.api_page import render_api_page
from app.deps import Admin, KnownQuery, Reader, ServiceDep, SettingsDep
from app.errors import Forbidden
from app.model_loading import chosen
from app.settings import public_settings

router = APIRouter(tags=["system"])

WEB = Path(__file__).resolve().parent.parent / "web"


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> schemas.Health:
    """The process is alive."""
    return schemas.Health(status="alive")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses={503: {"model": schemas.Health, "description": "Not ready to answer"}})
def readyz(service: ServiceDep, response: Response) -> schemas.Health:
    """Whether questions can be answered now, with the state of each component."""
    checks = service.check_ready()
    ready = all(state.startswith("ok") for state in checks.values())
    response.status_code = 200 if ready else 503
    return schemas.Health(status="ready" if ready else "not ready", checks=checks)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text"}},
)
def metrics(principal: Reader, service: ServiceDep) -> Response:
    """Prometheus metrics, for a key that is not bound to collections."""
    if principal.collections is not None:
        raise Forbidden("metrics are of the whole service; this key is bound to collections")
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/config", dependencies=[KnownQuery])
def get_config(principal: Admin, settings: SettingsDep, service: ServiceDep) -> dict[str, Any]:
    """Effective settings without secrets: where nothing is set, what `auto` stands for here and what the checkpoint
    advises for answers."""
    values = public_settings(settings)
    values["model"] |= chosen(settings.model)
    values["answers"] |= asdict(service.advice)
    return values


@router.head("/", include_in_schema=False)
@router.get("/", include_in_schema=False)
def page() -> FileResponse:
    return FileResponse(WEB / "index.html", media_type="text/html", headers={"Cache-Control": "no-cache"})


@router.get("/docs", include_in_schema=False)
def api_page(request: Request) -> HTMLResponse:
    return HTMLResponse(render_api_page(request.app.openapi()))

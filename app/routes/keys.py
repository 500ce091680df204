"""/v1/keys: API keys, for admins."""

from dataclasses import asdict

from fastapi import APIRouter, Request

from app import schemas
from app.deps import Admin, AuthenticatorDep, KnownQuery, ServiceDep
from app.errors import KeyNotFound
from app.service import RagService
from retrieval.types import ApiKey

router = APIRouter(prefix="/v1/keys", tags=["keys"], dependencies=[KnownQuery])


def _show(key: ApiKey, service: RagService) -> schemas.Key:
    limits = schemas.KeyLimits(**asdict(service.meter.limits_of(key.id)))
    return schemas.Key(**{name: getattr(key, name) for name in key.__slots__}, limits=limits)


@router.get("")
def list_keys(principal: Admin, service: ServiceDep) -> schemas.KeyList:
    """All keys, including revoked ones, with their effective limits, without the secrets."""
    return schemas.KeyList(data=[_show(key, service) for key in service.store.list_keys()])


@router.post("", status_code=201)
def create_key(
    body: schemas.KeyCreate,
    request: Request,
    principal: Admin,
    service: ServiceDep,
    authenticator: AuthenticatorDep,
) -> schemas.NewKey:
    """Create a key. Only this response ever contains it."""
    if body.collections is not None:
        service.visible_collections(body.collections, principal)
    row, key = authenticator.create_key(body.name, body.role, body.collections)
    service.meter.set_own_limits(row.id, body.limits.model_dump())
    request.state.written = [row.id]
    return schemas.NewKey(**_show(row, service).model_dump(), key=key)


@router.delete("/{key_id}", status_code=204)
def revoke_key(key_id: str, principal: Admin, service: ServiceDep) -> None:
    """Revoke a key at once, and end its running answers and streams."""
    if not service.store.revoke_key(key_id):
        raise KeyNotFound(f"there is no key {key_id[:80]!r} in force")
    service.end_answers_to(key_id)

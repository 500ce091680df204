"""/v1/keys: API keys, for admins."""

from fastapi import APIRouter

from app import schemas
from app.deps import Admin, AuthenticatorDep, ServiceDep
from app.errors import KeyNotFound

router = APIRouter(prefix="/v1/keys", tags=["keys"])


@router.get("")
def list_keys(principal: Admin, service: ServiceDep) -> schemas.KeyList:
    """All keys, revoked ones too; never the keys themselves."""
    return schemas.KeyList(data=[schemas.Key.model_validate(key) for key in service.store.list_keys()])


@router.post("", status_code=201)
def create_key(
    body: schemas.KeyCreate, principal: Admin, service: ServiceDep, authenticator: AuthenticatorDep
) -> schemas.NewKey:
    """Make a key. This reply is the only place where it is ever shown."""
    if body.collections is not None:
        service.visible_collections(body.collections, principal)
    row, key = authenticator.create_key(body.name, body.role, body.collections)
    return schemas.NewKey(**schemas.Key.model_validate(row).model_dump(), key=key)


@router.delete("/{key_id}", status_code=204)
def revoke_key(key_id: str, principal: Admin, service: ServiceDep) -> None:
    """End a key at once."""
    if not service.store.revoke_key(key_id):
        raise KeyNotFound(f"there is no key {key_id[:80]!r} in force")

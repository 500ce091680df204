"""/v1/collections: named sets of documents."""

from fastapi import APIRouter, Request, Response

from app import schemas
from app.deps import KnownQuery, Reader, ServiceDep, Writer, tell_methods
from app.errors import Forbidden
from app.service import RagService
from retrieval.types import Collection

router = APIRouter(prefix="/v1/collections", tags=["collections"], dependencies=[KnownQuery])


def _show(collection: Collection, service: RagService) -> schemas.Collection:
    return schemas.Collection.model_validate(
        {field: getattr(collection, field) for field in collection.__slots__}
        | {
            "fits_context": service.fits_context(collection),
            "reads_whole": service.reads_whole(collection),
            "state_ready": service.prefetch.is_ready(collection.name),
        }
    )


@router.get("")
def list_collections(principal: Reader, service: ServiceDep, response: Response) -> schemas.CollectionList:
    """All collections that the key may see, oldest first. The header Allow has POST if it may create new ones."""
    tell_methods(response, principal.may_write and principal.collections is None)
    visible = [collection for collection in service.store.list_collections() if principal.may_see(collection.name)]
    return schemas.CollectionList(data=[_show(collection, service) for collection in visible])


@router.post("", status_code=201)
def create_collection(
    body: schemas.CollectionCreate, request: Request, principal: Writer, service: ServiceDep
) -> schemas.Collection:
    """Create an empty collection. Forbidden for keys bound to collections."""
    if principal.collections is not None:
        raise Forbidden("this key is bound to collections and cannot make new ones")
    made = service.store.create_collection(body.name)
    request.state.written = [made.name]
    return _show(made, service)


@router.get("/{name}")
def get_collection(name: str, principal: Reader, service: ServiceDep) -> schemas.Collection:
    """One collection: counts, tokens, and whether it fits into the context as a whole."""
    return _show(service.store.get_collection(service.visible_collection(name, principal)), service)


@router.delete("/{name}", status_code=204)
def delete_collection(name: str, principal: Writer, service: ServiceDep) -> None:
    """Delete a collection with all its documents; `default` is only emptied."""
    service.delete_collection(service.visible_collection(name, principal))

"""/v1/search: the best passages for a query, without an answer."""

from fastapi import APIRouter

from app import schemas
from app.auth import Principal
from app.deps import KnownQuery, Reader, ServiceDep
from app.errors import InvalidRequest
from app.evidence import show_hits
from app.lanes import SEARCHES
from app.service import RagService
from retrieval.types import SearchParams

router = APIRouter(prefix="/v1", tags=["search"], dependencies=[KnownQuery])


@router.post("/search")
async def search(body: schemas.SearchRequest, principal: Reader, service: ServiceDep) -> schemas.SearchResult:
    """Hybrid, dense or lexical search over the collections that the key may see."""
    return await SEARCHES.run(_search, body, principal, service)


def _search(body: schemas.SearchRequest, principal: Principal, service: RagService) -> schemas.SearchResult:
    if body.rerank and not service.has_reranker:
        raise InvalidRequest(
            "rerank: this service has no reranker; leave it out, or set JAMBA_RAG_RETRIEVAL__RERANK=true"
        )
    scope = service.read_scope(body.collections, body.document_ids, principal)
    rerank = body.mode == "hybrid" if body.rerank is None else body.rerank
    params = SearchParams(body.max_num_results, body.mode, body.filters, scope.document_ids, rerank)
    return schemas.SearchResult(data=show_hits(service.search(body.query, scope.collections, params)))

"""Builds every component of the service once, in dependency order, and closes it once. Start at `create_app`.

The implementations of `Embedder` and `VectorIndex` are chosen here and nowhere else. The model's part is in
model_loading.py.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache

import anyio.to_thread
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from app.advice import take_advice
from app.api_texts import describe
from app.audit import AuditLog
from app.auth import Authenticator
from app.datadir import DataDir
from app.embedding import loading, open_embedder, open_reranker, take_over
from app.errors import install_error_handlers
from app.evidence import EvidenceFinder
from app.limits import KeyLimits, Meter
from app.metrics import Metrics
from app.middleware import RequestFrame
from app.model_loading import build_model, longest_question
from app.observed_store import ObservedStore
from app.readiness import make_checks
from app.routes import answers, collections, documents, keys, openai, search, system
from app.schemas import Problem
from app.service import RagService
from app.settings import Settings, check_home
from app.tracing import Tracing
from ingest.chunk import ChunkLimits
from ingest.files import FileStore
from ingest.jobs import IngestWorker
from ingest.parse.child import ParseLimits
from ingest.pipeline import IngestLimits
from model.engine_thread import EngineThread
from retrieval.index import open_index
from retrieval.search import FusionWeights, Retriever
from retrieval.store import DocumentStore
from retrieval.words import open_words

log = logging.getLogger(__name__)

VERSION = "0.1.0"


@dataclass
class _Parts:
    """What is started and stopped with the service. `data`: resources that the workers write to, closed last."""

    settings: Settings
    closing: ExitStack
    data: ExitStack
    service: RagService
    authenticator: Authenticator
    audit: AuditLog
    worker: IngestWorker
    engine_thread: EngineThread
    save_index: Callable[[], None]
    prefetch_after_s: float


def create_app(settings: Settings, answering: bool = True) -> FastAPI:
    """The whole service as an ASGI application; its components are built here and closed when its lifespan ends.

    Without `answering` the model's weights are not loaded: everything works except questions.

    Raises SettingsError, DataDirInUse, UnsupportedWeights, StoreUnusable.
    """
    check_home()
    with ExitStack() as stack:
        parts = _build(settings, stack, answering)
        parts.closing = stack.pop_all()
    app = FastAPI(
        title="Jamba RAG",
        version=VERSION,
        description="Upload documents, ask questions, get answers whose every quote is checked against the source. "
        "All calls below /v1, and /metrics, need the header `Authorization: Bearer <key>`.",
        lifespan=lambda _: _run(parts),
        telemetry={"tracing": False, "metrics": False, "logs": False},  # app/tracing.py, and nothing global
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name the host that the request named, without the proxy's TLS
        responses={
            "4XX": {"description": "The request is refused", "content": {"application/problem+json": _PROBLEM}},
            "5XX": {"description": "The service failed", "content": {"application/problem+json": _PROBLEM}},
        },
    )
    plain = app.openapi
    app.openapi = cache(lambda: describe(plain()))
    app.state.service, app.state.settings = parts.service, settings
    app.state.authenticator, app.state.audit = parts.authenticator, parts.audit
    for module in (documents, collections, search, answers, openai, keys, system):
        app.include_router(module.router)
    app.mount("/web", StaticFiles(directory=system.WEB), name="web")
    install_error_handlers(app)
    server = settings.server
    app.add_middleware(RequestFrame, owner=app, max_in_flight=server.max_requests_in_flight, stall_s=server.stall_s)
    return app


_PROBLEM = {"schema": Problem.model_json_schema()}


@asynccontextmanager
async def _run(parts: _Parts) -> AsyncIterator[None]:
    with parts.closing:
        await anyio.to_thread.run_sync(parts.service.recover)
        parts.worker.start()
        prefetching = asyncio.create_task(parts.service.prefetch.run(parts.prefetch_after_s))
        log.info("ready: model %s, data in %s", parts.service.model_name, parts.settings.data_dir)
        try:
            yield
        finally:
            prefetching.cancel()
            with suppress(asyncio.CancelledError):
                await prefetching
            limit_s = max(1, parts.settings.server.shutdown_s)  # idle workers need a moment, too
            stopping = asyncio.to_thread(parts.worker.stop, limit_s)
            stopped, _ = await asyncio.gather(stopping, parts.engine_thread.close(limit_s))
            if not stopped:
                log.warning(
                    "ingestion has not ended within %g s: its documents go back to the queue, and database and indexes "
                    "stay open until the process ends",
                    limit_s,
                )
                parts.data.pop_all()
            try:
                await asyncio.to_thread(parts.save_index)
            except OSError as error:
                log.warning("the vector index cannot be saved and will be rebuilt at the next start: %s", error)


def _build(settings: Settings, stack: ExitStack, answering: bool) -> _Parts:
    data = stack.enter_context(ExitStack())
    data_dir = data.enter_context(DataDir(settings.data_dir))
    store = ObservedStore(data_dir.database)
    data.callback(store.close)
    authenticator = Authenticator(store, settings.auth.enabled)
    authenticator.ensure_admin_key(data_dir.path)
    chosen = settings.retrieval
    embedder, reranker = take_over(store, open_embedder(chosen)), open_reranker(chosen)
    with loading(embedder, reranker) if answering else nullcontext():  # what asks nothing may need neither
        model = build_model(settings, stack, answering, _kept_secret(store, "document_nonce", 6))
    metrics, tracing = Metrics(), Tracing(settings.telemetry.otlp_endpoint)
    stack.callback(tracing.close)
    index = open_index(store, data_dir.index, embedder.dim, embedder.name)
    data.callback(index.close)
    weights = FusionWeights(chosen.dense_weight, chosen.lexical_weight)
    words = open_words(store, data_dir.words)
    data.callback(words.close, store)
    retriever = Retriever(store, index, embedder, weights, reranker, words=words)
    advice = take_advice(settings.model.path, settings.answers)
    files = FileStore(data_dir.files)
    worker = IngestWorker(
        *(store, retriever, embedder, files, _ingest_limits(settings)),
        threads=settings.ingest.workers,
        lease_s=settings.ingest.lease_s,
    )
    engine_thread = EngineThread(model.engine)
    stack.callback(engine_thread.halt)
    service = RagService(
        store=store,
        files=files,
        index=index,
        words=words,
        finder=EvidenceFinder(store, retriever, model.format, settings.answers, advice, chosen.evidence_hits),
        engine=engine_thread,
        cache=model.cache,
        engine_times=model.times,
        format=model.format,
        metrics=metrics,
        tracing=tracing,
        meter=Meter(store, KeyLimits(**settings.limits.model_dump())),
        settings=settings.answers,
        advice=advice,
        model_name=model.name,
        has_reranker=reranker is not None,
        max_question_tokens=longest_question(settings) if answering else 0,
        salt=bytes.fromhex(_kept_secret(store, "prefix_salt", 16)),
        wake_workers=worker.notify,
        checks=make_checks(store, files, index, words, engine_thread, settings.ingest.workers),
    )
    store.on_replaced, model.cache.on_moved = service.on_replaced, metrics.observe_states
    store.on_stage, store.on_ingested = metrics.observe_ingest, metrics.count_ingested
    metrics.watch(service.read_gauges)
    audit = AuditLog(data_dir.audit, settings.log.audit_max_bytes, settings.log.audit_files)
    save_index = lambda: index.save(data_dir.index)
    prefetch_after_s = settings.answers.prefetch_after_s if answering and model.cache.keeps_states else 0
    return _Parts(
        *(settings, stack, data, service, authenticator, audit, worker, engine_thread, save_index),
        prefetch_after_s=prefetch_after_s,
    )


def _ingest_limits(settings: Settings) -> IngestLimits:
    ingest = settings.ingest
    return IngestLimits(
        ParseLimits(wall_s=ingest.parse_timeout_s, memory_bytes=ingest.parse_max_bytes),
        ChunkLimits(target_tokens=ingest.chunk_tokens),
    )


def _kept_secret(store: DocumentStore, name: str, nbytes: int) -> str:
    """Random hexadecimal digits, generated once per database and stored.

    For the salt, so that deployments never share prefix states; and for the nonce that fences documents, which must be
    secret and constant, because a new nonce would invalidate all cached prefixes.
    """
    secret = store.get_setting(name)
    if secret is None:
        secret = secrets.token_hex(nbytes)
        store.set_setting(name, secret)
    return secret

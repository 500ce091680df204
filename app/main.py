"""Builds the service: every component once, in the order of need, and closes it once. Start at `create_app`.

Which implementation stands behind `Embedder`, `VectorIndex`, `StateStore` and `Engine` is decided here alone.
"""

import asyncio
import json
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import anyio.to_thread
import torch
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from app.advice import take_advice
from app.audit import AuditLog
from app.auth import Authenticator
from app.context_room import check_room
from app.datadir import DataDir
from app.embedding import loading, open_embedder, open_reranker, take_over
from app.errors import install_error_handlers
from app.evidence import EvidenceFinder
from app.limits import KeyLimits, Meter
from app.metrics import Metrics
from app.middleware import RequestFrame
from app.observed_store import ObservedStore
from app.prompting import AnswerFormat, QuoteFormat
from app.quotes import TokenBytes
from app.readiness import make_checks
from app.routes import answers, collections, documents, keys, openai, search, system
from app.schemas import Problem
from app.service import RagService
from app.settings import ModelSettings, RedisSettings, Settings, SettingsError, check_home
from app.text_format import TextFormat
from app.tracing import Tracing
from app.unloaded_engine import UnloadedEngine
from ingest.chunk import ChunkLimits
from ingest.files import FileStore
from ingest.jobs import IngestWorker
from ingest.parse.child import ParseLimits
from ingest.pipeline import IngestLimits
from model import load_model
from model.admission import measure_state_bytes
from model.chat_format import speaks_chat_format
from model.device_store import DeviceStateStore, PinnedStateStore
from model.engine import JambaEngine
from model.engine_request import Engine
from model.engine_thread import EngineThread
from model.engine_times import EngineTimes
from model.kernels import cpu
from model.prefix_cache import PrefixCache
from model.prefix_plan import PlanSettings, state_fingerprint
from model.redis_store import RedisStateStore
from model.state import HybridState, StateLayout
from model.state_store import StateStore
from model.tokenizer import Tokenizer
from model.w8a8 import UnsupportedDevice
from model.weights import Quantization
from retrieval.index import open_index
from retrieval.search import FusionWeights, Retriever
from retrieval.store import DocumentStore
from retrieval.words import open_words

log = logging.getLogger(__name__)

VERSION = "0.1.0"
_DEFAULT_CONTEXT_TOKENS = 262_144
_CPU_QUESTION_TOKENS = 8192


@dataclass(frozen=True)
class LoadedModel:
    """The answering model and everything between it and a prompt."""

    engine: Engine
    cache: PrefixCache
    tokenizer: Tokenizer
    format: AnswerFormat
    name: str
    times: EngineTimes = field(default_factory=EngineTimes)


@dataclass
class _Parts:
    """What has to be started and stopped around a running service."""

    settings: Settings
    closing: ExitStack
    service: RagService
    authenticator: Authenticator
    audit: AuditLog
    worker: IngestWorker
    engine_thread: EngineThread
    save_index: Callable[[], None]
    prefetch_after_s: float


def create_app(settings: Settings, answering: bool = True) -> FastAPI:
    """The whole service as an ASGI application; its components are built here and closed when its lifespan ends.

    Without `answering` the model's weights stay on the disk: everything works but questions.

    Raises SettingsError, DataDirInUse, UnsupportedWeights, StoreUnusable.
    """
    check_home()
    with ExitStack() as stack:
        parts = _build(settings, stack, answering)
        parts.closing = stack.pop_all()
    app = FastAPI(
        title="Jamba RAG",
        version=VERSION,
        description="Upload documents, ask questions, get answers whose every quote is checked against the source.",
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
            limit_s = parts.settings.server.shutdown_s
            stopped = asyncio.to_thread(parts.worker.stop, limit_s)
            await asyncio.gather(stopped, parts.engine_thread.close(limit_s))
            try:
                await asyncio.to_thread(parts.save_index)
            except OSError as error:
                log.warning("the vector index is not saved and will be made anew: %s", error)


def _build(settings: Settings, stack: ExitStack, answering: bool) -> _Parts:
    data_dir = stack.enter_context(DataDir(settings.data_dir))
    store = ObservedStore(data_dir.database)
    stack.callback(store.close)
    authenticator = Authenticator(store, settings.auth.enabled)
    authenticator.ensure_admin_key(data_dir.path)
    chosen = settings.retrieval
    opened, reranker = open_embedder(chosen), open_reranker(chosen)
    with loading(opened, reranker) if answering else nullcontext():  # what asks nothing may need neither
        model = build_model(settings, stack, answering, _kept_secret(store, "document_nonce", 6))
    embedder = take_over(store, opened)
    metrics, tracing = Metrics(), Tracing(settings.telemetry.otlp_endpoint)
    stack.callback(tracing.close)
    index = open_index(store, data_dir.index, embedder.dim, embedder.name)
    stack.callback(index.close)
    weights = FusionWeights(chosen.dense_weight, chosen.lexical_weight)
    words = open_words(store, data_dir.words)
    stack.callback(words.close, store)
    retriever = Retriever(store, index, embedder, weights, reranker, words=words)
    advice = take_advice(settings.model.path, settings.answers)
    files = FileStore(data_dir.files)
    worker = IngestWorker(
        *(store, retriever, embedder, files, _ingest_limits(settings)),
        threads=settings.ingest.workers,
        lease_s=settings.ingest.lease_s,
    )
    engine_thread = EngineThread(model.engine)
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
        tokenizer=model.tokenizer,
        model_name=model.name,
        has_reranker=reranker is not None,
        max_question_tokens=longest_question(settings) if answering else 0,
        salt=bytes.fromhex(_kept_secret(store, "prefix_salt", 16)),
        wake_workers=worker.notify,
        checks=make_checks(store, files, index, words, engine_thread),
    )
    store.on_replaced, model.cache.on_moved = service.on_replaced, metrics.observe_states
    store.on_stage, store.on_ingested = metrics.observe_ingest, metrics.count_ingested
    metrics.watch(service.read_gauges)
    audit = AuditLog(data_dir.audit, settings.log.audit_max_bytes, settings.log.audit_files)
    save_index = lambda: index.save(data_dir.index)
    prefetch_after_s = settings.answers.prefetch_after_s if answering and model.cache.keeps_states else 0
    return _Parts(
        *(settings, stack, service, authenticator, audit, worker, engine_thread, save_index),
        prefetch_after_s=prefetch_after_s,
    )


def _ingest_limits(settings: Settings) -> IngestLimits:
    ingest = settings.ingest
    return IngestLimits(
        ParseLimits(wall_s=ingest.parse_timeout_s, memory_bytes=ingest.parse_max_bytes),
        ChunkLimits(target_tokens=ingest.chunk_tokens),
    )


def _kept_secret(store: DocumentStore, name: str, nbytes: int) -> str:
    """Random hexadecimal digits, one per database.

    Of the salt, so that no two deployments share a prefix state, whatever else they share; of the nonce that fences
    documents, so that it can't be known, and stays, since with a new one no prefix would be found again.
    """
    secret = store.get_setting(name)
    if secret is None:
        secret = secrets.token_hex(nbytes)
        store.set_setting(name, secret)
    return secret


def build_model(settings: Settings, stack: ExitStack, answering: bool, nonce: str) -> LoadedModel:
    """Load the checkpoint and put engine and prefix cache around it; `stack` closes them. `nonce` fences documents."""
    path = check_checkpoint(settings.model.path)
    tokenizer = Tokenizer.load(path)
    max_context_tokens = settings.model.max_context_tokens or _read_context_length(path)
    device = choose_device(settings.model) if answering else None
    stores = _state_stores(settings, device, stack)
    if device is None:
        cache = PrefixCache(stores)
        stack.callback(cache.close)
        prompt_format = _choose_format(path, tokenizer, nonce, max_context_tokens)
        check_room(prompt_format, settings)
        return LoadedModel(UnloadedEngine(), cache, tokenizer, prompt_format, path.resolve().name)
    if settings.model.threads:
        torch.set_num_threads(settings.model.threads)
    quantize = choose_quantization(settings.model, device)
    try:
        model = load_model(path, device, choose_dtype(settings.model, device), quantize)
    except UnsupportedDevice as error:
        raise SettingsError(f"JAMBA_RAG_MODEL__QUANTIZE: {error}") from error
    fingerprint = state_fingerprint(path, quantize, model.new_state().layout.fingerprint())
    plan_settings = _plan_settings(settings, device)
    state_max_bytes = settings.model.state_max_bytes or None
    if (free_bytes := measure_state_bytes(model, plan_settings.segment_tokens)) is not None:
        kept_bytes = gpu_cache_bytes(settings, free_bytes, model.state_layout, max_context_tokens)
        if kept_bytes:  # an eighth is for what is just being saved, or waits to be written to the other tiers
            stores.insert(0, DeviceStateStore(kept_bytes - kept_bytes // 8, device))
        state_max_bytes = state_max_bytes or max(0, free_bytes - kept_bytes)
    cache = PrefixCache(stores, fingerprint, plan_settings)
    stack.callback(cache.close)
    engine = JambaEngine(
        model,
        tokenizer,
        cache,
        max_context_tokens=max_context_tokens,
        max_batch=settings.model.max_batch or (8 if device.type == "cpu" else 32),
        # An answer that was admitted is not turned away: it and its other beginnings find a place, and the prefetch.
        max_waiting=settings.answers.max_pending * take_advice(path, settings.answers).quote_beginnings + 1,
        state_max_bytes=state_max_bytes,
        draft_tokens=settings.model.draft_tokens,
    )
    stack.callback(engine.close)
    if not engine.max_context_tokens and not settings.model.state_max_bytes:
        raise SettingsError(f"{device} has no memory left for a question beside the weights of {path}")
    prompt_format = _choose_format(path, tokenizer, nonce, engine.max_context_tokens)
    check_room(prompt_format, settings)
    return LoadedModel(engine, cache, tokenizer, prompt_format, path.resolve().name, engine.times)


def longest_question(settings: Settings) -> int:
    """In tokens; 0: any that fits the context."""
    on_cpu = choose_device(settings.model).type == "cpu"
    return settings.answers.max_question_tokens or (_CPU_QUESTION_TOKENS if on_cpu else 0)


def gpu_cache_bytes(settings: Settings, free_bytes: int, layout: StateLayout, max_context_tokens: int) -> int:
    """Of a GPU's free memory, what prefix states may take: by default they leave room for one answer in full."""
    if settings.cache.gpu_max_bytes is not None:
        return settings.cache.gpu_max_bytes
    longest = HybridState(layout, "meta")
    longest.reserve(max_context_tokens)
    return max(0, min(free_bytes // 2, free_bytes - (settings.model.state_max_bytes or longest.nbytes)))


def main_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What the machine has, or what a container is let have of it."""
    machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no such file, or "max"
        return min(machine_bytes, int((cgroup / "memory.max").read_text()))
    return machine_bytes


def _choose_format(path: Path, tokenizer: Tokenizer, nonce: str, max_context_tokens: int) -> AnswerFormat:
    """Quotes held to the evidence token by token where the tokenizer has the marks for it, else quotes in text."""
    if speaks_chat_format(tokenizer):
        return QuoteFormat(tokenizer, TokenBytes.read(path), max_context_tokens)
    log.info("%s has no tokens for quotes: it is asked through its chat template", path)
    return TextFormat.load(path, tokenizer, nonce, max_context_tokens)


def _plan_settings(settings: Settings, device: torch.device) -> PlanSettings:
    """A GPU needs long segments to read its weights seldom enough, and every snapshot ends one."""
    segment, distance, sparse = (512, 512, 16) if device.type == "cpu" else (16_384, 2048, 2)
    cache = settings.cache
    segment = settings.model.segment_tokens or segment
    distance = distance if cache.snapshot_tokens is None else cache.snapshot_tokens
    sparse = sparse if cache.sparse_snapshots is None else cache.sparse_snapshots
    int8 = cache.snapshot_dtype == "int8"
    return PlanSettings(cache.block_tokens, segment, distance, segment * sparse, int8)


def check_checkpoint(path: Path) -> Path:
    """Raises SettingsError unless `path` looks like a checkpoint directory."""
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise SettingsError(
            f"{path} holds no checkpoint (config.json and *.safetensors); set JAMBA_RAG_MODEL__PATH to one"
        )
    return path


def choose_device(settings: ModelSettings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(settings.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"JAMBA_RAG_MODEL__DEVICE={device}: {torch.cuda.device_count()} CUDA devices are here")
    return device


def choose_dtype(settings: ModelSettings, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies it fast: on GPUs, and on CPUs with AVX512_BF16 or AMX."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()  # which those with AMX have too
    return torch.bfloat16 if fast else torch.float32


def choose_quantization(settings: ModelSettings, device: torch.device) -> Quantization | None:
    """`auto` is `w8a8` on CPUs where that is faster, for it changes less there than int8 weights do; else `int8`."""
    if settings.quantize == "auto":
        return "w8a8" if device.type == "cpu" and cpu.rounds_rows() else "int8"
    return None if settings.quantize == "none" else settings.quantize


def _read_context_length(path: Path) -> int:
    return json.loads((path / "config.json").read_text()).get("max_position_embeddings", _DEFAULT_CONTEXT_TOKENS)


def _state_stores(settings: Settings, device: torch.device | None, stack: ExitStack) -> list[StateStore]:
    """Tiers of prefix states below the memory of a GPU, the fastest first; without a model only what outlives it."""
    stores: list[StateStore] = []
    if device is not None:
        on_gpu, host_bytes = device.type == "cuda", settings.cache.host_max_bytes
        if host_bytes is None:
            host_bytes = main_memory_bytes() // 4 if on_gpu else 1 << 30
        if host_bytes:
            stores.append(PinnedStateStore(host_bytes) if on_gpu else DeviceStateStore(host_bytes))
    if settings.redis.url is not None:
        stores.append(_open_redis(settings.redis, settings.redis.url.get_secret_value(), settings.data_dir))
        stack.callback(stores[-1].close)
    return stores


def _open_redis(settings: RedisSettings, url: str, data_dir: Path) -> RedisStateStore:
    """Raises SettingsError for a url that is none; a server that cannot be used is only said in the log."""
    try:
        owed = data_dir / "owed-deletes.json"
        store = RedisStateStore(url, settings.key_prefix, settings.ttl_s, timeout_s=settings.timeout_s, owed_file=owed)
    except ValueError as error:
        raise SettingsError(f"JAMBA_RAG_REDIS__URL is {error}") from None
    store.open()
    return store

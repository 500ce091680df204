"""Prefills collections that fit into one prompt before anybody asks about them, so that the first question is warm too.

It has low priority: it waits until a collection has not changed for a while and nobody is being answered. A question
that does not begin with the same documents ends it within a step, and so does the deletion of one of its documents. The
state up to the last snapshot is kept. Start at `Prefetch.run`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import anyio.to_thread

from app.kept_tokens import passage_key
from app.prompting import engine_request
from model.engine_request import EngineOverloaded, EngineRequest
from model.engine_thread import EngineStopped, TokenStream
from model.prefix_plan import PrefixPlan
from model.sampling import SamplingParams
from retrieval.store import CollectionNotFound
from retrieval.types import Evidence

if TYPE_CHECKING:
    from app.service import RagService

log = logging.getLogger(__name__)

Outcome = Literal["read", "found", "interrupted", "failed"]


@dataclass(frozen=True)
class _Reading:
    """A whole collection as a question with default settings reads it. `end`: where its documents' tokens end."""

    documents: tuple[tuple[str, int], ...]  # (id, version)
    passages: tuple[Hashable, ...]
    request: EngineRequest
    plan: PrefixPlan
    end: int


class Prefetch:
    """The prefetcher of one service; all methods except `is_ready` and `forget` must run on the event loop."""

    def __init__(self, service: RagService) -> None:
        self._service = service
        self._read: dict[str, _Reading] = {}  # by collection: what was read last
        self._stream: TokenStream | None = None  # being read right now
        self._passages: tuple[Hashable, ...] = ()
        self._reads: frozenset[str] = frozenset()  # documents being read
        self._gone: set[str] = set()  # documents deleted since the last prompt was started
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Future[None] | None = None
        self._handled: int | None = None  # generation of the store that has been prefetched completely

    def is_ready(self, collection: str) -> bool:
        """Whether the state after the whole collection was computed and is still cached. Blocks."""
        reading = self._read.get(collection)
        if reading is None or reading.documents != self._list_documents(collection):
            return False
        return self._service.cache.kept_tokens(reading.plan) >= reading.end

    async def run(self, after_s: float) -> None:
        """Prefetch until cancelled, always after `after_s` seconds without a change; 0: never."""
        if not after_s:
            return
        self._loop, seen = asyncio.get_running_loop(), None
        while True:
            try:
                generation = await anyio.to_thread.run_sync(self._service.store.generation)
                if generation == seen != self._handled and self._is_idle() and await self._read_all():
                    self._handled = generation
                seen = generation
            except Exception:  # a failed prefetch does no harm
                log.exception("reading collections ahead failed; trying again after the next change")
                self._service.metrics.prefetches.labels("failed").inc()
                self._handled = seen
            await asyncio.sleep(after_s)

    async def give_way(self, evidence: Evidence) -> None:
        """A question is about to be read: end the prefetch, unless the question begins with the same documents."""
        ahead = self._passages
        if self._stream is not None and _passages(evidence)[: len(ahead)] != ahead:
            await self._stream.aclose()

    def forget(self, document_ids: Collection[str]) -> None:
        """These documents were deleted: end a prefetch that reads one, and drop their tokens. From any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end, frozenset(document_ids))

    def _end(self, document_ids: frozenset[str]) -> None:
        self._read = {name: read for name, read in self._read.items() if not document_ids & read.request.tags}
        self._gone |= document_ids
        if self._stream is not None and document_ids & self._reads:
            self._ending = asyncio.ensure_future(self._stream.aclose())  # or it may be garbage-collected

    def _is_idle(self) -> bool:
        return self._service.answers_pending == 0

    async def _read_all(self) -> bool:
        """Read every collection that fits; False if a question or a change came in between."""
        service = self._service
        for collection in await anyio.to_thread.run_sync(service.store.list_collections):
            self._gone = set()
            if not collection.documents or not service.fits_context(collection):
                continue
            if collection.pending:
                return False
            try:
                reading = await anyio.to_thread.run_sync(self._prepare, collection.name)
            finally:
                if self._gone:  # this loop may have cached their tokens after the deletion
                    service.format.forget(self._gone)
            if reading is None:
                continue
            outcome = await self._read_one(reading)
            service.metrics.prefetches.labels(outcome).inc()
            if outcome == "interrupted":
                return False
            documents = await anyio.to_thread.run_sync(self._list_documents, collection.name)
            if documents != reading.documents or not self._gone.isdisjoint(reading.request.tags):
                return False
            self._read[collection.name] = reading
            log.info("read collection %s ahead (%s): %d tokens", collection.name, outcome, reading.end)
        return True

    def _prepare(self, collection: str) -> _Reading | None:
        """None if a question would not read all of the collection, or it was deleted. Blocks."""
        service = self._service
        epoch, documents = service.cache.epoch, self._list_documents(collection)
        try:
            evidence = service.finder.read_whole(collection)
        except CollectionNotFound:
            return None
        if evidence is None or not evidence.passages:
            return None
        prompt = service.format.build_prompt("", evidence)
        request = engine_request(prompt, evidence, service.salt, epoch, SamplingParams(max_new_tokens=1))
        request = replace(request, counted=False)
        plan = service.cache.plan(
            request.token_ids, request.boundaries, request.salt, request.tag_starts, request.epoch
        )
        return _Reading(documents, _passages(evidence), request, plan, max(prompt.boundaries))

    def _list_documents(self, collection: str) -> tuple[tuple[str, int], ...]:
        try:
            documents = self._service.store.ready_documents([collection])
        except CollectionNotFound:
            return ()
        return tuple((document.id, document.version) for document in documents)

    async def _read_one(self, reading: _Reading) -> Outcome:
        if await anyio.to_thread.run_sync(self._service.cache.kept_tokens, reading.plan) >= reading.end:
            return "found"
        if not self._is_idle() or not self._gone.isdisjoint(reading.request.tags):
            return "interrupted"
        self._passages, self._reads = reading.passages, reading.request.tags
        self._stream = self._service.engine.generate(reading.request)
        reason = None
        try:
            async for output in self._stream:
                reason = output.finish_reason
        except (EngineOverloaded, EngineStopped):
            return "interrupted"
        finally:
            await self._stream.aclose()
            self._stream, self._passages, self._reads = None, (), frozenset()
        if reason == "error":
            raise RuntimeError("the engine gave up on reading a collection ahead")
        return "read" if reason in ("length", "stop") else "interrupted"


def _passages(evidence: Evidence) -> tuple[Hashable, ...]:
    return tuple(passage_key(passage) for passage in evidence.passages)

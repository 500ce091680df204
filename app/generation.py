"""One running answer, from the evidence to the finished `Answer`, as a stream of events or in one piece.

Start at `RunningAnswer.events`. Searching and packing are in evidence.py, interpreting tokens in answering.py.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import uuid4

import anyio.to_thread

from app import schemas
from app.answering import CUT_OFF_TEXT, NOT_FOUND_TEXT, AnswerPart, AnswerReader, Quoted, TextPiece
from app.auth import LOCAL_ADMIN, Unauthorized
from app.errors import DocumentDeleted, describe_error
from app.evidence import Found, Query, show_hits
from app.lanes import SEARCHES
from app.likeliest import QuoteSearch, ask_back_by, generate_likeliest, verdict_of
from app.measures import Measures
from app.progress import ReadingProgress
from app.prompting import engine_request
from app.quotes import QuoteLimits
from app.reading import chance_nats, none_margin, read_at_once, reads_apart, split_passages
from app.rows import OTHER_ROWS_NATS, AskedLines
from app.sse import Event, with_pauses
from model.engine_request import EngineRequest, StepOutput
from model.sampling import SamplingParams
from retrieval.location import locate
from retrieval.store import DocumentNotFound, DocumentNotReady
from retrieval.types import Evidence

if TYPE_CHECKING:
    from app.service import RagService

_PROGRESS_EVERY_S = 1.0


class GenerationFailed(RuntimeError):
    """The engine failed on an answer."""


class RunningAnswer:
    """Use once: `events` or `collect`. `document_ids`: documents that the model reads; `completed`: it ended normally;
    `lost`: documents, of any collection, that were deleted meanwhile.

    `admitted`: time of admission on the clock of `Pace`. `none_margin`: of the evidence being read, see reading.py.
    """

    def __init__(self, service: RagService, query: Query) -> None:
        self.id = f"ans_{uuid4().hex}"
        self.document_ids: frozenset[str] = frozenset()
        self.lost: set[str] = set()
        self.completed, self.admitted, self.none_margin = False, 0.0, 0.0
        self._service, self._query = service, query
        self._found: Found | None = None
        self._failure: Exception | None = None
        self._measures, self._progress = Measures(), ReadingProgress()
        self._room_tokens = query.max_output_tokens  # output tokens left for all further generations together
        self._citations: list[schemas.Citation] = []
        self._truncated = False
        self._was_counted = False  # whether this prompt was counted before, when its passage was read apart
        self._chance_nats = 0.0  # of the passages read, see reading.py
        self._epoch = 0  # epoch of the prefix cache before the documents were chosen
        self._gone: set[str] = set()  # documents deleted since then

    def lose(self, document_ids: frozenset[str]) -> None:
        """These documents were deleted: if the answer reads one of them, it ends with an error. From any thread."""
        self._gone.update(document_ids)
        self.lost.update(document_ids)
        if document_ids & self.document_ids:
            self._failure = DocumentDeleted("a document that the answer was made from is gone; ask again")

    def lose_key(self, key_id: str) -> None:
        """The key was revoked: if the answer is for that key, it ends with an error. From any thread."""
        if self._query.principal.key_id == key_id:
            self._failure = Unauthorized("this API key was revoked while the answer was made")

    async def _check_key(self) -> None:
        """Catch a revocation since the request began that was too early for `lose_key` to find this answer."""
        key_id, store = self._query.principal.key_id, self._service.store
        if key_id != LOCAL_ADMIN.key_id and not await anyio.to_thread.run_sync(store.is_in_force, key_id):
            raise Unauthorized("this API key was revoked while the question was sent")

    async def prepare(self, widened: bool = False) -> Found:
        """Search and pack; repeated if a hit was deleted meanwhile. Raises what `EvidenceFinder.find` raises."""
        await self._check_key()
        while True:
            self._gone, self.document_ids, self._epoch = set(), frozenset(), self._service.cache.epoch
            found = await SEARCHES.run(self._service.finder.find, self._query, widened)
            self._found, self.document_ids = found, found.document_ids
            self._measures.add_search(found)
            self._trace_search(found)
            if self._gone.isdisjoint(found.document_ids.union(hit.document_id for hit in found.hits)):
                return found

    def _trace_search(self, found: Found) -> None:
        now, stage = time.perf_counter(), self._service.tracing.stage
        packed_from = now - found.pack_ms / 1000
        stage("retrieve", packed_from - found.retrieval_ms / 1000, packed_from, hits=len(found.hits))
        stage("pack", packed_from, now, evidence_tokens=found.evidence.tokens, mode=found.evidence.mode)

    async def events(self, progress: bool = False) -> AsyncGenerator[Event, None]:
        """Typed events, `answer.completed` or `answer.error` last; `answer.progress` before the text if asked for."""
        async with aclosing(self._watch()) as run:
            try:
                async for event in run:
                    if progress or event.type != "answer.progress":
                        yield event
            except Exception as error:
                yield Event("answer.error", describe_error(error))

    async def collect(self) -> schemas.Answer:
        """The finished answer. Raises the error if it failed."""
        async with aclosing(self._watch()) as run:
            async for event in run:
                if isinstance(event.data, schemas.Answer):
                    return event.data
        raise GenerationFailed("the generation ended without an answer")

    async def _watch(self) -> AsyncGenerator[Event, None]:
        """The events of `_run`, plus progress. If its documents are deleted, the answer ends even during a prefill."""
        silent = True
        async with aclosing(with_pauses(self._run(), _PROGRESS_EVERY_S)) as run:
            async for event in run:
                if event is not None:
                    silent = silent and event.type != "answer.text.delta"
                    yield event
                    continue
                self._check_alive()
                if silent and (progress := self._progress.show()) is not None:
                    yield Event("answer.progress", progress)

    async def _run(self) -> AsyncGenerator[Event, None]:
        try:
            found = self._found or await self.prepare()
            yield Event("answer.created", {"id": self.id, "object": "answer", "model": self._service.model_name})
            while True:
                yield Event("answer.sources", {"sources": [h.model_dump() for h in show_hits(found.hits)]})
                reading = await self._choose(found.evidence)
                writer = self._service.format.read_answer(reading, self._query.question)
                async for event in self._attempt(reading, writer):
                    yield event
                if writer.quoted or not self._room_tokens or not found.may_widen:
                    break
                found = await self.prepare(widened=True)
            if not writer.text:
                yield Event("answer.text.delta", {"text": self._text_of(writer)})
            self._check_alive()
            answer, self.completed = self._finish(found, writer), True
            yield Event("answer.completed", answer)
        finally:
            self._service.meter.charge_tokens(self._query.principal, self._measures.computed_tokens)
            self._service.end_answer(self)

    async def _choose(self, evidence: Evidence) -> Evidence:
        """All of the evidence or, if passages are read apart, the one that most likely contains the answer."""
        service, self._was_counted = self._service, False
        self._chance_nats = chance_nats(evidence, 1)
        if not service.advice.read_apart or evidence.mode != "rag" or not service.format.decision_ids:
            return evidence
        if not reads_apart(evidence, await anyio.to_thread.run_sync(self._count_question)):
            return read_at_once(evidence)
        requests = [(await self._request(reading), reading) for reading in split_passages(evidence)]
        self._progress.begin(sum(len(request.token_ids) for request, _ in requests))
        self._chance_nats = chance_nats(evidence, len(requests))
        lines = await anyio.to_thread.run_sync(AskedLines, self._query.question, evidence.passages)
        weighed, read_tokens = [], 0
        for request, reading in requests:
            demerit = OTHER_ROWS_NATS if lines.lacks(reading.passages) else 0
            weighed.append((demerit + await self._weigh(request, reading, read_tokens), reading))
            read_tokens += len(request.token_ids)
        self._was_counted = True
        return min(weighed, key=lambda one: one[0])[1]

    def _count_question(self) -> int:
        """Tokens of the question, without the fixed parts of a prompt. Blocks."""
        count = self._service.format.count_prompt
        return count(self._query.question, self._query.turns) - count("")

    async def _weigh(self, request: EngineRequest, reading: Evidence, read_tokens: int) -> float:
        """The `none_margin` of this reading; `read_tokens` were read for others before it."""
        note, submitted = self._progress.note, time.perf_counter()
        request = replace(
            request, sampling=SamplingParams(max_new_tokens=1), on_read=lambda own: note(read_tokens + own)
        )
        async with aclosing(self._service.engine.generate(request)) as outputs:
            async for output in outputs:
                self._check_alive()
                _check_finish(output)
                self._measures.add_start(len(request.token_ids), output, self._trace_start(submitted, output))
                return await self._margin(reading, output)
        raise GenerationFailed("the engine ended without reading a passage")

    async def _margin(self, reading: Evidence, first: StepOutput) -> float:
        nats = self._service.advice.missing_words_nats
        return await anyio.to_thread.run_sync(none_margin, self._query.question, reading, first.watch_logprobs, nats)

    async def _attempt(self, reading: Evidence, writer: AnswerReader) -> AsyncIterator[Event]:
        """Answer from this evidence; again with refusing disallowed if the model refused below the threshold."""
        if not reading.passages:
            return
        async for event in self._generate(reading, writer, allow_none=True):
            yield event
        if writer.said_none and self._room_tokens and not self._refuses(writer):
            async for event in self._generate(reading, writer, allow_none=False):
                yield event

    def _text_of(self, writer: AnswerReader) -> str:
        """The answer; if it has no quote, what the model said instead, or why there is nothing."""
        nothing = self._found.nothing if self._found and not self._measures.input_tokens else NOT_FOUND_TEXT
        return writer.text or writer.unchecked_text or (CUT_OFF_TEXT if self._truncated else nothing)

    def _refuses(self, writer: AnswerReader) -> bool:
        return writer.none_margin > self._service.advice.none_margin

    def _is_refused(self, writer: AnswerReader, none_margin: float) -> bool:
        """Whether an answer with this margin is refused; recorded in the writer with the margin."""
        self.none_margin = writer.none_margin = none_margin
        refused = self._refuses(writer)
        writer.said_none = writer.said_none or refused
        return refused

    async def _request(self, reading: Evidence) -> EngineRequest:
        query, form = self._query, self._service.format
        prompt = await anyio.to_thread.run_sync(form.build_prompt, query.question, reading, query.turns)
        sampling = SamplingParams(
            max_new_tokens=self._room_tokens,
            temperature=query.temperature,
            seed=query.seed,
            stop=form.stop_texts,
            stop_token_ids=form.stop_ids,
        )
        request = engine_request(prompt, reading, self._service.salt, self._epoch, sampling)
        # because of `turn`, its next passage goes before the first passage of later answers
        return replace(request, watch_tokens=form.decision_ids, turn=self.admitted)

    async def _outputs(self, reading: Evidence, allow_none: bool) -> AsyncIterator[StepOutput]:
        """The model's output tokens for this evidence."""
        service = self._service
        counted = allow_none and not self._was_counted  # a repeated generation is not counted again
        limits = QuoteLimits(service.settings.max_quote_tokens, service.settings.max_quotes, allow_none)
        constraint = await anyio.to_thread.run_sync(service.format.constrain, reading, limits)
        request = await self._request(reading)
        request = replace(request, constraint=constraint, counted=counted, on_read=self._progress.note)
        self._progress.begin(len(request.token_ids))
        search = QuoteSearch()
        if constraint is not None:
            search = await anyio.to_thread.run_sync(self._search_quotes, reading, limits)
        submitted = time.perf_counter()
        async with aclosing(generate_likeliest(service.engine, request, search)) as outputs:
            async for output in outputs:
                if counted:
                    counted = False
                    self._measures.add_start(len(request.token_ids), output, self._trace_start(submitted, output))
                self._check_alive()
                _check_finish(output)
                yield output

    def _search_quotes(self, reading: Evidence, limits: QuoteLimits) -> QuoteSearch:
        """The search over candidate quotes besides the greedy one. Blocks."""
        form, advice, question = self._service.format, self._service.advice, self._query.question
        lines = AskedLines(question, reading.passages)
        rows = replace(reading, passages=tuple(lines.named()))
        named = form.constrain(rows, limits) if rows.passages else None
        back = ask_back_by(form, question, advice.ask_back, advice.verdict)
        return QuoteSearch(form.decision_ids[0], advice.quote_beginnings, question, lines.misses, named, back)

    async def _generate(self, reading: Evidence, writer: AnswerReader, allow_none: bool) -> AsyncIterator[Event]:
        self._check_alive()
        self._truncated, first = False, allow_none
        async with aclosing(self._outputs(reading, allow_none)) as outputs:
            async for output in outputs:
                if first:
                    first = False
                    self._measures.add_first_token()
                    self._service.finder.remember(reading)
                    if output.watch_logprobs:
                        margin = self._chance_nats + await self._margin(reading, output)
                        if self._is_refused(writer, margin):
                            return
                if output.branch_logprobs:  # the quote's verdict, before any of it is shown
                    doubt = -self._service.advice.verdict * verdict_of([output])
                    if self._is_refused(writer, writer.none_margin + doubt):
                        return
                self._note(output)
                if output.token_id is not None:
                    async for event in self._show(writer.push(output.token_id)):
                        yield event
        async for event in self._show(writer.finish()):
            yield event

    def _trace_start(self, submitted: float, output: StepOutput) -> float:
        """Report to tracing how the time to first token was spent; returns the milliseconds of it spent waiting."""
        now, timings, stage = time.perf_counter(), output.timings, self._service.tracing.stage
        prefill_from = now - timings.prefill_ms / 1000
        load_from = max(submitted, prefill_from - timings.state_load_ms / 1000)
        stage("queue", submitted, load_from)
        stage("state_load", load_from, prefill_from, tier=output.tier, cached_tokens=output.cached_tokens)
        stage("prefill", prefill_from, now)
        return 1000 * (load_from - submitted)

    def _note(self, output: StepOutput) -> None:
        self._measures.output_tokens += output.token_id is not None
        self._room_tokens -= output.token_id is not None
        self._truncated = output.finish_reason == "length"

    async def _show(self, parts: Iterable[AnswerPart]) -> AsyncIterator[Event]:
        for part in await anyio.to_thread.run_sync(list, parts):  # locating a quote in long documents takes time
            if isinstance(part, TextPiece):
                yield Event("answer.text.delta", {"text": part.text})
            else:
                citation = await anyio.to_thread.run_sync(self._cite, part)
                self._citations.append(citation)
                yield Event("answer.citation.added", {"citation": citation.model_dump()})

    def _cite(self, quoted: Quoted) -> schemas.Citation:
        quote = quoted.quote
        passage = quote.passage
        try:
            chunk = self._service.store.chunk_at(passage.document_id, quote.char_start, quote.char_end)
        except (DocumentNotFound, DocumentNotReady):  # just deleted: `_check_alive` will end the answer
            chunk = None
        return schemas.Citation(
            start=quoted.start,
            end=quoted.end,
            document_id=passage.document_id,
            filename=passage.filename,
            chunk_id=chunk.id if chunk else "",
            cited_text=quote.text,
            location=schemas.Location.model_validate(
                locate(passage.pages, passage.headings, quote.char_start, quote.char_end)
            ),
            verification=quote.verification,
        )

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _finish(self, found: Found, writer: AnswerReader) -> schemas.Answer:
        measures, metrics = self._measures, self._service.metrics
        answer = schemas.Answer(
            id=self.id,
            grounding="answered" if writer.quoted else "not_found",
            text=self._text_of(writer),
            citations=self._citations,
            sources=show_hits(found.hits),
            usage=schemas.Usage(
                input_tokens=measures.input_tokens,
                cached_input_tokens=measures.cached_tokens,
                output_tokens=measures.output_tokens,
            ),
            timings=measures.timings(),
            cache=schemas.CacheUse(tier=measures.tier, prefix_tokens=measures.cached_tokens),
            model=self._service.model_name,
            truncated=self._truncated,
        )
        metrics.record_answer(answer, found.evidence.mode, writer.rejected, measures.queue_ms)
        if measures.first_token is not None:
            now = time.perf_counter()
            self._service.tracing.stage("decode", measures.first_token, now, output_tokens=measures.output_tokens)
        return answer


def _check_finish(output: StepOutput) -> None:
    if output.finish_reason in ("error", "abort"):
        raise GenerationFailed(f"the generation ended with {output.finish_reason!r}: {output.error or 'no reason'}")

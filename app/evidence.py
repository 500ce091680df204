"""Decides what the model reads for a question: mode, search, budget, packing. Start at `EvidenceFinder.find`."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from app import schemas
from app.advice import Advice
from app.answering import NO_DOCUMENTS_TEXT, NO_MATCH_TEXT, STILL_READING_TEXT
from app.auth import LOCAL_ADMIN, Principal
from app.conversation import Turn, standalone_query
from app.prompting import AnswerFormat
from app.setting_groups import AnswerSettings
from retrieval.packing import BudgetTooSmall, RecentEvidence, pack_evidence, rank_documents
from retrieval.search import Retriever
from retrieval.store import DocumentStore
from retrieval.types import Evidence, EvidenceMode, Filters, Hit, SearchParams
from retrieval.whole import EvidenceTooLarge, WholeSelections

SHOWN_SOURCES = 10


@dataclass(frozen=True)
class Query:
    """A question whose rights have been checked: `collections` exist and are visible. `turns`: the conversation so far.

    Its tokens count towards the limits of `principal`.
    """

    question: str
    collections: Sequence[str]
    document_ids: Sequence[str] | None
    filters: Filters | None
    mode: EvidenceMode
    max_evidence_tokens: int | None
    max_output_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    turns: Sequence[Turn] = ()
    principal: Principal = LOCAL_ADMIN


@dataclass(frozen=True)
class Found:
    """The evidence for a question. `may_widen`: more would fit, if this turns out not to contain the answer.

    `nothing`: the message if there is no passage.
    """

    hits: Sequence[Hit]
    evidence: Evidence
    retrieval_ms: float
    pack_ms: float
    may_widen: bool
    nothing: str = NO_DOCUMENTS_TEXT

    @property
    def document_ids(self) -> frozenset[str]:
        return frozenset(passage.document_id for passage in self.evidence.passages)


class EvidenceFinder:
    """Finds evidence within the room that the model's context leaves. Thread safe; everything blocks."""

    def __init__(
        self,
        store: DocumentStore,
        retriever: Retriever,
        prompt_format: AnswerFormat,
        settings: AnswerSettings,
        advice: Advice,
        evidence_hits: int,
    ) -> None:
        self._store, self._retriever, self._format = store, retriever, prompt_format
        self._settings, self._advice, self._evidence_hits = settings, advice, evidence_hits
        self._recent = RecentEvidence()
        self._whole = WholeSelections(store, prompt_format.count_tokens, prompt_format.cut_ahead)
        self._reading: dict[object, set[str]] = {}  # running `read_whole` calls -> documents deleted since

    def find(self, query: Query, widened: bool = False) -> Found:
        """Evidence for a question; with `widened` as much as fits. Raises ContextTooLong, CollectionNotFound,
        EvidenceTooLarge if `full_context` was requested and doesn't fit, and BudgetTooSmall if nothing fits."""
        whole_budget = self._whole_budget(query)
        start = time.perf_counter()
        whole = None if widened else self._pack_whole(query, whole_budget)
        tried = time.perf_counter()
        wanted = self._evidence_hits * (4 if widened else 1)
        params = SearchParams(wanted, "hybrid", query.filters, query.document_ids, rerank=whole is None)
        asked = standalone_query(query.question, query.turns)
        hits = self._retriever.search(asked, query.collections, params)
        found = time.perf_counter()
        evidence = rank_documents(whole, hits) if whole else self._pack(query, hits, whole_budget, widened)
        packed = time.perf_counter()
        return Found(
            hits[:SHOWN_SOURCES],
            evidence,
            1000 * (found - tried),
            1000 * (tried - start + packed - found),
            may_widen=not widened and query.mode == "auto" and evidence.mode == "rag",
            nothing=NO_DOCUMENTS_TEXT if evidence.passages else self._explain_nothing(query),
        )

    def _explain_nothing(self, query: Query) -> str:
        """Why no document was read."""
        if any(known.pending for known in self._store.list_collections() if known.name in query.collections):
            return STILL_READING_TEXT
        return NO_MATCH_TEXT if query.filters else NO_DOCUMENTS_TEXT

    def remember(self, evidence: Evidence) -> None:
        """Record evidence that the model has read, for later evidence to begin with."""
        self._recent.remember(evidence)

    def forget(self, document_ids: Collection[str]) -> None:
        """Drop all cached text because these documents were deleted. Call it before the format's `forget`."""
        self._whole.forget()
        for gone in list(self._reading.values()):
            gone.update(document_ids)

    def read_whole(self, collection: str) -> Evidence | None:
        """The whole collection as evidence, as a question with default settings reads it; None if such a question reads
        only parts of it. Raises CollectionNotFound."""
        reader, gone = object(), set[str]()
        self._reading[reader] = gone
        try:
            return self._whole.pack([collection], self.whole_budget("auto"))
        except EvidenceTooLarge:
            return None
        finally:
            del self._reading[reader]
            if gone:
                self._format.forget(gone)  # this call may have cached their tokens after the deletion

    def whole_budget(self, mode: EvidenceMode = "full_context") -> int:
        """Largest evidence in tokens that a short question with default settings takes whole in this mode."""
        query = Query("", (), None, None, mode, None, self._settings.max_output_tokens)
        budget = self._whole_budget(query)
        return self._auto_budget(query, budget) if mode == "auto" else budget

    def search(self, query: str, collections: Sequence[str], params: SearchParams) -> list[Hit]:
        """The best chunks, best first. Raises CollectionNotFound."""
        return self._retriever.search(query, collections, params)

    def _whole_budget(self, query: Query) -> int:
        room = self._format.room_for_evidence(query.question, query.max_output_tokens, query.turns)
        return min(room, query.max_evidence_tokens or self._settings.max_evidence_tokens or room)

    def _pack_whole(self, query: Query, whole_budget: int) -> Evidence | None:
        """All selected documents, if they should be read whole and fit; this needs no reranked hits."""
        if query.mode == "rag":
            return None
        try:
            budget = whole_budget if query.mode == "full_context" else self._auto_budget(query, whole_budget)
            return self._whole.pack(query.collections, budget, query.document_ids, query.filters)
        except EvidenceTooLarge:
            if query.mode == "full_context":
                raise
            return None

    def _pack(self, query: Query, hits: Sequence[Hit], whole_budget: int, widened: bool) -> Evidence:
        budget = self._auto_budget if widened else self._rag_budget
        try:
            return self._pack_hits(query, hits, budget(query, whole_budget), whole_budget)
        except BudgetTooSmall as error:  # budgets are tuned for English; other languages take many more tokens
            if error.needed_tokens > whole_budget:
                raise
            return self._pack_hits(query, hits, error.needed_tokens, whole_budget)

    def _auto_budget(self, query: Query, whole_budget: int) -> int:
        if query.max_evidence_tokens is not None or self._advice.auto_evidence_tokens is None:
            return whole_budget
        return min(whole_budget, self._advice.auto_evidence_tokens)

    def _rag_budget(self, query: Query, whole_budget: int) -> int:
        if query.max_evidence_tokens is not None:
            return whole_budget
        return min(whole_budget, self._advice.rag_evidence_tokens)

    def _pack_hits(self, query: Query, hits: Sequence[Hit], budget_tokens: int, whole_budget: int) -> Evidence:
        return pack_evidence(
            self._store,
            query.collections,
            hits,
            budget_tokens,
            self._format.count_tokens,
            query.document_ids,
            query.filters,
            None if self._advice.read_apart else self._recent,
            self._recent_budget(query, budget_tokens, whole_budget),
        )

    def _recent_budget(self, query: Query, budget_tokens: int, whole_budget: int) -> int:
        if query.max_evidence_tokens is not None:
            return budget_tokens
        return min(whole_budget, self._advice.recent_evidence_tokens or 2 * self._advice.rag_evidence_tokens)


def describe_scores(scores: Mapping[str, float]) -> dict[str, float | None]:
    """The four scores of a hit under their API names; None for a score that was not computed."""
    return {name: scores.get(name) for name in ("dense", "lexical", "fused", "rerank")}


def show_hits(hits: Iterable[Hit]) -> list[schemas.Hit]:
    """Search results in the form of the API."""
    return [
        schemas.Hit(
            document_id=hit.document_id,
            filename=hit.filename,
            chunk_id=hit.chunk.id,
            text=hit.chunk.text,
            score=hit.score,
            scores=schemas.Scores(**describe_scores(hit.scores)),
            location=schemas.Location.model_validate(hit.location),
            attributes=dict(hit.attributes),
        )
        for hit in hits
    ]

"""From a question to ranked chunks: dense and lexical candidates, fused into one score; hits are read from the store.

What the model reads of them is decided in packing.py. Start at `Retriever.search`.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .embedder import Embedder
from .index import VectorIndex
from .lexical import query_identifiers, query_terms
from .rerank import Reranker, rerank
from .store import DocumentStore, Selection
from .types import Fusion, Hit, SearchParams
from .words import WordIndex

_RRF_OFFSET = 60  # Source: Cormack, Clarke, Buettcher 2009
_KEPT_SELECTIONS = 16
_RARE_CHUNKS = 10  # full lexical weight for a code in at most this many chunks, because embeddings miss codes
_COMMIT_EVERY_S = 2.0  # of the word index during ingestion

Scores = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class FusionWeights:
    """How the dense and lexical scores of a hybrid search are fused; measured in docs/retrieval.md.

    `minmax`: the scores of each half are scaled so that no similarity is 0 and the best score 1, weighted and summed;
    `rrf`: weighted reciprocal rank fusion. `candidates`: minimum number from each half. `trust_from`, `trust_all`:
    the lexical weight counts in full if the best lexical score is at least `trust_all` of what a passage with all words
    of the question is expected to have, not at all up to `trust_from`, in proportion between; the dense half gets the
    rest. Source: Bruch, Gai, Ingber 2023, section 4: the minimum of a score is its theoretical one, not the worst seen.
    """

    dense: float = 0.3
    lexical: float = 0.7
    fusion: Fusion = "minmax"
    candidates: int = 100
    trust_from: float = 0.6
    trust_all: float = 0.9

    def __post_init__(self) -> None:
        if min(self.dense, self.lexical) < 0 or self.dense + self.lexical <= 0:
            raise ValueError(f"weights must be >= 0 and not both 0, got dense {self.dense}, lexical {self.lexical}")
        if not 0 <= self.trust_from < self.trust_all:
            raise ValueError(f"trust_from {self.trust_from} must be >= 0 and below trust_all {self.trust_all}")

    def trust(self, best: float, expected: float) -> float:
        """Share of the lexical weight that counts, 0 to 1, for the `best` BM25 found and the `expected` one."""
        share = best / expected if expected > 0 else 1.0
        return min(1.0, max(0.0, (share - self.trust_from) / (self.trust_all - self.trust_from)))


class Retriever:
    """Searches the store and the indexes. Thread safe; sees every write that ended before the search began."""

    def __init__(
        self,
        store: DocumentStore,
        index: VectorIndex,
        embedder: Embedder,
        weights: FusionWeights | None = None,
        reranker: Reranker | None = None,
        words: WordIndex | None = None,
    ) -> None:
        """`reranker` reorders the best hits; without `words` the word index is kept in memory.

        Raises EmbedderMismatch if the store's vectors come from another embedder.
        """
        store.require_embedder(embedder.name, embedder.dim)
        self._store = store
        self._index = index
        self._embedder = embedder
        self._weights = weights or FusionWeights()
        self._words = WordIndex() if words is None else words
        self._reranker = reranker
        self._selections: OrderedDict[tuple[int, str], Selection] = OrderedDict()
        self._lock = threading.Lock()

    def catch_up(self, source: DocumentStore) -> bool:
        """Update the indexes after a write to the store, so that the next search has little left to do.

        Words are committed at most every two seconds; a search commits the rest.
        """
        changed = self._index.catch_up(source)
        return self._words.catch_up(source, _COMMIT_EVERY_S) or changed

    def search(self, query: str, collections: Sequence[str], params: SearchParams | None = None) -> list[Hit]:
        """The best chunks first, equal scores in storage order; empty for a query without words.

        Raises CollectionNotFound; ValueError when max_num_results is below 1.
        """
        params = params or SearchParams()
        if params.max_num_results < 1:
            raise ValueError(f"max_num_results is {params.max_num_results}, must be at least 1")
        selection = self._select(collections, params)
        if selection.is_empty or not query.strip():
            return []
        reranker = self._reranker if params.rerank else None
        wanted = max(params.max_num_results, reranker.hits if reranker else 0)
        limit = max(self._weights.candidates, 2 * wanted)
        dense: Scores = {}
        lexical: Scores = {}
        if params.mode != "dense":
            lexical = self._search_lexical(query, selection, limit)
        if params.mode != "lexical":
            dense = self._search_dense(query, selection, limit, also=list(lexical))
        score = self._fuse(query, selection, dense, lexical) if params.mode == "hybrid" else dense or lexical
        ranked = sorted(score, key=lambda row: (-score[row], row))[: 2 * wanted]
        found = self._store.load_hits(ranked)
        # meanwhile a row may have been deleted or, without a filter, one of a new collection added
        seen = [row for row in ranked if row in found and found[row].collection in collections]
        hits = [_scored(found[row], row, score, dense, lexical, params) for row in seen[:wanted]]
        return (rerank(reranker, query, hits) if reranker else hits)[: params.max_num_results]

    def _fuse(self, query: str, selection: Selection, dense: Scores, lexical: Scores) -> Scores:
        best = max(lexical.values(), default=0.0)
        expected = self._words.expected_score(query_terms(query), selection.collection_rows)
        named = self._words.has_rare(query_identifiers(query), _RARE_CHUNKS, selection.collection_rows)
        trust = 1.0 if named else self._weights.trust(best, expected)
        return fuse_scores(dense, lexical, self._weights, self._words.share * trust)  # the word index may be filling

    def _search_lexical(self, query: str, selection: Selection, limit: int) -> Scores:
        self._words.catch_up(self._store)
        rows = (selection.collection_rows, selection.document_rows)
        return dict(self._words.search(query_terms(query), limit, *rows))

    def _search_dense(self, query: str, selection: Selection, limit: int, also: Sequence[int]) -> Scores:
        """Cosines of the nearest chunks and of the rows `also`, so that lexical hits have a dense score in fusion."""
        self._index.catch_up(self._store)
        vector = self._embedder.embed_query(query)
        rows, scores = self._index.search(vector, limit, selection.chunk_rows)
        dense = dict(zip(rows.tolist(), scores.tolist(), strict=True))
        if missing := sorted(row for row in also if row not in dense):
            rows, scores = self._index.search(vector, len(missing), np.array(missing, dtype=np.int64))
            dense.update(zip(rows.tolist(), scores.tolist(), strict=True))
        return dense

    def _select(self, collections: Sequence[str], params: SearchParams) -> Selection:
        ids = None if params.document_ids is None else sorted(params.document_ids)
        wanted = (sorted(collections), ids, dict(params.filters or {}))
        key = (self._store.generation(), json.dumps(wanted, default=list, sort_keys=True))
        with self._lock:
            if (known := self._selections.get(key)) is not None:
                self._selections.move_to_end(key)
                return known
        selection = self._store.select_chunks(collections, params.document_ids, params.filters)
        with self._lock:
            self._selections[key] = selection
            while len(self._selections) > _KEPT_SELECTIONS:
                self._selections.popitem(last=False)
        return selection


def fuse_scores(dense: Scores, lexical: Scores, weights: FusionWeights, trust: float = 1.0) -> dict[int, float]:
    """Row -> fused score in 0..1 for every row of either half; rows that a half did not find get 0 from it.

    `trust`: share of the lexical weight that counts, see FusionWeights; a dense weight of 0 stays 0.
    """
    scale = _scale_minmax if weights.fusion == "minmax" else _scale_ranks
    share = weights.lexical / (weights.dense + weights.lexical) * (trust if weights.dense else 1.0)
    halves = ((1 - share, scale(dense)), (share, scale(lexical)))
    return {row: sum(weight * half.get(row, 0.0) for weight, half in halves) for row in dense.keys() | lexical.keys()}


def _scale_minmax(scores: Scores) -> Scores:
    best = max(scores.values(), default=0.0)
    return {row: max(0.0, score / best) if best > 0 else 0.0 for row, score in scores.items()}


def _scale_ranks(scores: Scores) -> Scores:
    ranked = sorted(scores, key=lambda row: (-scores[row], row))
    return {row: (_RRF_OFFSET + 1) / (_RRF_OFFSET + 1 + rank) for rank, row in enumerate(ranked)}


def _scored(hit: Hit, row: int, score: Scores, dense: Scores, lexical: Scores, params: SearchParams) -> Hit:
    scores = {name: half[row] for name, half in (("dense", dense), ("lexical", lexical)) if row in half}
    if params.mode == "hybrid":
        scores["fused"] = score[row]
    return replace(hit, score=score[row], scores=scores)

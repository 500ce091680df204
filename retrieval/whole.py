"""Whole selections of documents as evidence, built once for all questions until a document changes.

If a selection is too large, packing.py chooses parts of it. Start at `WholeSelections.pack`.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence

from .store import DocumentStore
from .types import Document, Evidence, Filters, ParsedDocument, Passage

TokenCounter = Callable[[Sequence[Passage]], int]
"""Tokens that the prompt spends on one document, given its passages in order, headers and separators included."""

_CHARS_A_TOKEN = 4  # about
_KEPT = 8  # selections


class EvidenceTooLarge(ValueError):
    """`full_context` was requested, but the selected documents do not fit the budget."""

    def __init__(self, num_documents: int, budget_tokens: int) -> None:
        super().__init__(
            f"the {num_documents} documents selected take more than the {budget_tokens} tokens there are for "
            f"evidence; select fewer, or use mode auto or rag"
        )


class WholeSelections:
    """Thread safe. `count_tokens` is called for each document of a selection, after `cut_ahead` for several at once."""

    def __init__(
        self, store: DocumentStore, count_tokens: TokenCounter, cut_ahead: Callable[[Sequence[Passage]], object]
    ) -> None:
        self._store, self._count_tokens, self._cut_ahead = store, count_tokens, cut_ahead
        self._generation = 0  # store generation of everything cached
        self._kept: dict[str, tuple[Evidence | None, int, int]] = {}  # evidence, lower bound of its tokens, documents
        self._lock = threading.Lock()

    def pack(
        self,
        collections: Sequence[str],
        budget_tokens: int,
        document_ids: Sequence[str] | None = None,
        filters: Filters | None = None,
    ) -> Evidence:
        """Every ready document of the selection, in canonical order, `relevance` empty.

        Raises EvidenceTooLarge if they exceed the budget; CollectionNotFound.
        """
        key = json.dumps((list(collections), document_ids, filters), default=list, sort_keys=True)
        with self._store.snapshot():
            generation = self._store.generation()
            evidence, tokens, num_documents = self._find(generation, key) or (None, 0, 0)
            if evidence is None and tokens <= budget_tokens:
                documents = self._store.ready_documents(collections, document_ids, filters)
                evidence = _pack_whole(self._store, documents, budget_tokens, self._count_tokens, self._cut_ahead)
                tokens, num_documents = evidence.tokens if evidence else budget_tokens + 1, len(documents)
                self._keep(generation, key, (evidence, tokens, num_documents))
        if evidence is None or tokens > budget_tokens:
            raise EvidenceTooLarge(num_documents, budget_tokens)
        return evidence

    def forget(self) -> None:
        """Drop everything cached, for example after a delete; nothing read before this call is cached after it."""
        generation = self._store.generation()
        with self._lock:
            self._generation = max(generation, self._generation)
            self._kept.clear()

    def _find(self, generation: int, key: str) -> tuple[Evidence | None, int, int] | None:
        with self._lock:
            if generation > self._generation:
                self._generation, self._kept = generation, {}
            return self._kept.get(key) if generation == self._generation else None

    def _keep(self, generation: int, key: str, made: tuple[Evidence | None, int, int]) -> None:
        with self._lock:
            if generation == self._generation:
                self._kept[key] = made
                while len(self._kept) > _KEPT:
                    del self._kept[next(iter(self._kept))]


def _pack_whole(
    store: DocumentStore,
    documents: Sequence[Document],
    budget_tokens: int,
    count_tokens: TokenCounter,
    cut_ahead: Callable[[Sequence[Passage]], object],
) -> Evidence | None:
    """These documents, whole; None if they exceed the budget."""
    passages: list[Passage] = []
    tokens = 0
    for batch in _read_whole(store, documents, _CHARS_A_TOKEN * budget_tokens):
        cut_ahead(batch)
        for passage in batch:
            tokens += count_tokens([passage])
            if tokens > budget_tokens:
                return None
            passages.append(passage)
    return Evidence(tuple(passages), "full_context", tokens)


def _read_whole(store: DocumentStore, documents: Sequence[Document], batch_chars: int) -> Iterator[list[Passage]]:
    """The documents that have any text, in batches of about `batch_chars` characters."""
    batch: list[Passage] = []
    chars = 0
    for document in documents:
        content = store.get_content(document.id)
        if content.text.strip():
            batch.append(passage_of(document, content, (0, len(content.text))))
            chars += len(content.text)
        if chars >= batch_chars:
            yield batch
            batch, chars = [], 0
    yield batch


def passage_of(document: Document, content: ParsedDocument, span: tuple[int, int]) -> Passage:
    return Passage(
        document_id=document.id,
        document_version=document.version,
        collection=document.collection,
        ordinal=document.ordinal,
        filename=document.filename,
        title=document.title,
        text=content.text[span[0] : span[1]],
        char_start=span[0],
        char_end=span[1],
        pages=content.pages,
        headings=content.headings,
    )

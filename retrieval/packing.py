"""Hits and documents to evidence: which spans the model reads, within a token budget, in an order that can be cached.

Order is always canonical (age of the collection, ordinal, place in the text), never by score: the same documents are
the same prompt prefix whatever was asked. Who is most relevant is said apart, in `Evidence.relevance`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from .store import DocumentStore
from .types import Document, Evidence, EvidenceMode, Filters, Hit, ParsedDocument, Passage

TokenCounter = Callable[[Sequence[Passage]], int]
"""Tokens that the prompt spends on one document, given its passages in order, headers and separators included."""

Span = tuple[int, int]


class EvidenceTooLarge(ValueError):
    """`full_context` was asked for, and the documents selected do not fit the budget."""


def count_texts(count_tokens: Callable[[str], int], per_document: int = 0, per_passage: int = 0) -> TokenCounter:
    """Return a counter for a prompt that adds fixed numbers of tokens around the texts."""
    return lambda passages: per_document + sum(per_passage + count_tokens(passage.text) for passage in passages)


def pack_evidence(
    store: DocumentStore,
    collections: Sequence[str],
    hits: Sequence[Hit],
    budget_tokens: int,
    count_tokens: TokenCounter,
    mode: EvidenceMode = "auto",
    document_ids: Sequence[str] | None = None,
    filters: Filters | None = None,
) -> Evidence:
    """Choose evidence of at most `budget_tokens`, by `count_tokens` summed over its documents.

    `full_context`: every ready document of the selection, whole; raises EvidenceTooLarge if they don't fit.
    `rag`: the hits (best first), widened to whole sections and then to neighbouring chunks as far as the budget goes.
    `auto`: the first if it fits, else the second. Text stands in it once, also where chunks overlap; hits on text
    that has been replaced or deleted since are left out. Raises CollectionNotFound.
    """
    with store.snapshot():
        documents = store.ready_documents(collections, document_ids, filters)
        if mode != "rag":
            whole = _pack_whole(store, documents, hits, budget_tokens, count_tokens)
            if whole is not None:
                return whole
            if mode == "full_context":
                raise EvidenceTooLarge(
                    f"the {len(documents)} documents selected take more than the {budget_tokens} tokens there are for "
                    f"evidence; select fewer, or use mode auto or rag"
                )
        return _pack_hits(store, documents, hits, budget_tokens, count_tokens)


def _pack_whole(
    store: DocumentStore,
    documents: Sequence[Document],
    hits: Sequence[Hit],
    budget_tokens: int,
    count_tokens: TokenCounter,
) -> Evidence | None:
    passages: list[Passage] = []
    tokens = 0
    for document in documents:
        content = store.get_content(document.id)
        if not content.text.strip():
            continue
        passage = _passage(document, content, (0, len(content.text)))
        tokens += count_tokens([passage])
        if tokens > budget_tokens:
            return None
        passages.append(passage)
    return Evidence(tuple(passages), "full_context", tokens, _relevance(hits, {p.document_id for p in passages}))


def _pack_hits(
    store: DocumentStore,
    documents: Sequence[Document],
    hits: Sequence[Hit],
    budget_tokens: int,
    count_tokens: TokenCounter,
) -> Evidence:
    current = {(document.id, document.version): document for document in documents}
    live = [hit for hit in hits if (hit.document_id, hit.document_version) in current]
    packed = {
        hit.document_id: _PackedDocument(current[hit.document_id, hit.document_version], store, count_tokens)
        for hit in live
    }
    left = budget_tokens
    for widen in (_itself, _section, _neighbours):
        for hit in live:
            for span in widen(packed[hit.document_id], hit):
                left -= packed[hit.document_id].try_add(span, left)
    chosen = [packed[document.id] for document in documents if document.id in packed and packed[document.id].spans]
    passages = tuple(passage for one in chosen for passage in one.passages())
    relevance = _relevance(live, {passage.document_id for passage in passages})
    return Evidence(passages, "rag", budget_tokens - left, relevance)


@dataclass(slots=True)
class _PackedDocument:
    """Spans of one document chosen so far: sorted, not touching; and what they cost."""

    document: Document
    store: DocumentStore
    count_tokens: TokenCounter
    spans: list[Span] = field(default_factory=list)
    tokens: int = 0
    content: ParsedDocument = field(init=False)
    chunk_spans: list[Span] = field(init=False)

    def __post_init__(self) -> None:
        self.content = self.store.get_content(self.document.id)
        self.chunk_spans = [(chunk.char_start, chunk.char_end) for chunk in self.store.get_chunks(self.document.id)]

    def try_add(self, span: Span, budget_tokens: int) -> int:
        """Add a span, without white space at its ends, if that costs no more than the budget; returns what it cost,
        0 if it was not added."""
        span = _trim(span, self.content.text)
        if span[0] >= span[1] or any(start <= span[0] and span[1] <= end for start, end in self.spans):
            return 0
        spans = _merge([*self.spans, span], self.content.text)
        tokens = self.count_tokens([_passage(self.document, self.content, merged) for merged in spans])
        cost = tokens - self.tokens
        if cost > budget_tokens:
            return 0
        self.spans, self.tokens = spans, tokens
        return cost

    def passages(self) -> list[Passage]:
        return [_passage(self.document, self.content, span) for span in self.spans]

    def covers(self, span: Span) -> bool:
        return any(start < span[1] and span[0] < end for start, end in self.spans)


def _itself(packed: _PackedDocument, hit: Hit) -> Iterator[Span]:
    yield hit.chunk.char_start, hit.chunk.char_end


def _section(packed: _PackedDocument, hit: Hit) -> Iterator[Span]:
    """From the heading over the chunk to the next one of its level or above; without headings, its pages."""
    start, end = hit.chunk.char_start, hit.chunk.char_end
    if not packed.covers((start, end)):
        return
    content = packed.content
    if content.headings:
        above = [heading for heading in content.headings if heading.char_start <= start]
        level = above[-1].level if above else 0
        after = (h.char_start for h in content.headings if h.char_start > start and (h.level <= level or not above))
        yield (above[-1].char_start if above else 0), max(end, next(after, len(content.text)))
    elif pages := [page for page in content.pages if page.char_start < end and page.char_end > start]:
        yield min(start, pages[0].char_start), max(end, pages[-1].char_end)


def _neighbours(packed: _PackedDocument, hit: Hit) -> Iterator[Span]:
    """The chunk after, then the one before: an answer more often goes on than begins earlier."""
    if not packed.covers((hit.chunk.char_start, hit.chunk.char_end)):
        return
    position = hit.chunk.ordinal
    for neighbour in (position + 1, position - 1):
        if 0 <= neighbour < len(packed.chunk_spans):
            yield packed.chunk_spans[neighbour]


def _trim(span: Span, text: str) -> Span:
    """Without white space at its ends; start >= end if there is nothing else in it."""
    kept = text[span[0] : span[1]]
    return span[1] - len(kept.lstrip()), span[0] + len(kept.rstrip())


def _merge(spans: Sequence[Span], text: str) -> list[Span]:
    """Sorted spans, those joined that overlap or have nothing but white space between them."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and (start <= merged[-1][1] or text[merged[-1][1] : start].isspace()):
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _passage(document: Document, content: ParsedDocument, span: Span) -> Passage:
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


def _relevance(hits: Sequence[Hit], packed: set[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(hit.document_id for hit in hits if hit.document_id in packed))

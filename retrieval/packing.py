"""From hits to evidence: which spans the model reads, within a token budget, in an order that suits prefix caching.

Whole documents without a search: whole.py. Start at `pack_evidence`.

The order is canonical (age of the collection, ordinal, position in the text), never by score: the same documents give
the same prompt prefix whatever was asked. If recent evidence begins with something that this question needs too, the
new evidence begins with the same and appends what is missing: `RecentEvidence`. Relevance is recorded separately, in
`Evidence.relevance`.
"""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby
from typing import NamedTuple, Self

from .store import DocumentStore
from .types import Document, Evidence, Filters, Hit, ParsedDocument, Passage
from .whole import TokenCounter, passage_of

Span = tuple[int, int]
Group = tuple["Place", ...]
Pack = tuple[Group, ...]
"""Where the passages of evidence stand, document by document."""

_TRIED_BEGINNINGS = 4
_ANY_TOKENS = 1 << 62


class BudgetTooSmall(ValueError):
    """None of the passages found fits the budget; the best one needs `needed_tokens`."""

    def __init__(self, budget_tokens: int, needed_tokens: int) -> None:
        self.needed_tokens = needed_tokens
        super().__init__(
            f"{budget_tokens} tokens of evidence hold none of the passages found, of which the best takes "
            f"{needed_tokens}; allow that many (max_evidence_tokens), or shorten the question if it leaves no room"
        )


def pack_evidence(
    store: DocumentStore,
    collections: Sequence[str],
    hits: Sequence[Hit],
    budget_tokens: int,
    count_tokens: TokenCounter,
    document_ids: Sequence[str] | None = None,
    filters: Filters | None = None,
    recent: "RecentEvidence | None" = None,
    recent_tokens: int = 0,
) -> Evidence:
    """The hits (best first), widened to whole sections and then to neighbouring chunks as far as the budget allows.

    `budget_tokens` bounds the sum of `count_tokens` over the documents. With `recent` the evidence begins like earlier
    evidence and appends the missing hits, if that leaves fewer tokens to prefill; it may then have `recent_tokens`, or
    the budget if that is more. Overlapping text appears only once; hits on text that has since been replaced or deleted
    are left out. Raises BudgetTooSmall if no hit fits the budget; CollectionNotFound.
    """
    with store.snapshot():
        documents = store.ready_documents(collections, document_ids, filters)
        reader = _Reader(store, count_tokens)
        evidence = _pack_hits(reader, documents, hits, budget_tokens)
        if recent is not None:
            evidence = begin_alike(evidence, recent, reader, documents, hits, max(recent_tokens, budget_tokens))
        return evidence


class _Reader:
    """Texts and chunks of documents, read once per evidence."""

    def __init__(self, store: DocumentStore, count_tokens: TokenCounter) -> None:
        self.count_tokens = count_tokens
        self.content: Callable[[str], ParsedDocument] = cache(store.get_content)
        self.chunk_spans: Callable[[str], list[Span]] = cache(store.chunk_spans)


def _pack_hits(reader: _Reader, documents: Sequence[Document], hits: Sequence[Hit], budget_tokens: int) -> Evidence:
    live = _live(documents, hits)
    packed, left = _pack_spans(reader, documents, live, budget_tokens, _WAYS)
    if not packed:
        _, rest = _pack_spans(reader, documents, live[:1], _ANY_TOKENS, (_itself,))
        if rest < _ANY_TOKENS:  # otherwise there was no hit, or only hits without words
            raise BudgetTooSmall(budget_tokens, _ANY_TOKENS - rest)
    passages = tuple(passage for one in packed for passage in one.passages())
    return Evidence(passages, "rag", budget_tokens - left, _relevance(live, {p.document_id for p in passages}))


def _live(documents: Sequence[Document], hits: Sequence[Hit]) -> list[Hit]:
    """The hits whose text still exists."""
    current = {(document.id, document.version) for document in documents}
    return [hit for hit in hits if (hit.document_id, hit.document_version) in current]


def _pack_spans(
    reader: _Reader,
    documents: Sequence[Document],
    hits: Sequence[Hit],
    budget_tokens: int,
    ways: Sequence[Callable[["_PackedDocument", Hit], Iterator[Span]]],
    taken: Sequence[Passage] = (),
) -> tuple[list["_PackedDocument"], int]:
    """Documents with spans around the hits, in canonical order, and the rest of the budget.

    Each way of widening is applied to all hits before the next. Nothing in `taken` is packed again.
    """
    wanted = {hit.document_id for hit in hits}
    packed = {}
    for document in documents:
        if document.id in wanted:
            spans = [(passage.char_start, passage.char_end) for passage in taken if passage.document_id == document.id]
            packed[document.id] = _PackedDocument(document, reader, spans)
    left = budget_tokens
    for widen in ways:
        for hit in hits:
            for span in widen(packed[hit.document_id], hit):
                left -= packed[hit.document_id].try_add(span, left)
    return [one for one in packed.values() if one.spans], left


class Place(NamedTuple):
    """Position of a passage."""

    document_id: str
    version: int
    char_start: int
    char_end: int

    @classmethod
    def of(cls, passage: Passage) -> Self:
        return cls(passage.document_id, passage.document_version, passage.char_start, passage.char_end)

    @classmethod
    def of_hit(cls, hit: Hit) -> Self:
        """The hit's position, without white space at its ends."""
        start, end = _trim((0, len(hit.chunk.text)), hit.chunk.text)
        return cls(hit.document_id, hit.document_version, hit.chunk.char_start + start, hit.chunk.char_start + end)

    def holds(self, other: "Place") -> bool:
        return self[:2] == other[:2] and self.char_start <= other.char_start and other.char_end <= self.char_end


class RecentEvidence:
    """Recently read evidence, for new evidence to begin with. Thread safe.

    The beginning of a prompt that was read before comes from the prefix cache (`model/prefix_cache.py`); such a
    beginning ends at the end of a document.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._packs: OrderedDict[Pack, None] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, evidence: Evidence) -> None:
        """Record evidence that the model has just read."""
        pack = _groups(evidence.passages)
        with self._lock:
            for beginning in [other for other in self._packs if other == pack[: len(other)]]:
                del self._packs[beginning]
            self._packs[pack] = None
            while len(self._packs) > self._limit:
                self._packs.popitem(last=False)

    def known_groups(self, pack: Pack) -> int:
        """How many first documents of a pack are the beginning of one that was read."""
        with self._lock:
            packs = list(self._packs)
        return max((_shared(pack, other) for other in packs), default=0)

    def beginnings(self, documents: Sequence[Document], hits: Sequence[Hit]) -> list[tuple[Pack, list[Hit]]]:
        """Beginnings that consist of these documents and contain some of the hits, each with the hits that it lacks,
        fewest first. Each is as short as possible."""
        with self._lock:
            packs = list(self._packs)
        current = {(document.id, document.version) for document in documents}
        wanted: dict[tuple[str, int], list[tuple[Place, Hit]]] = defaultdict(list)
        for hit in hits:
            place = Place.of_hit(hit)
            wanted[place[:2]].append((place, hit))
        found: dict[Pack, set[int]] = {}
        for pack in packs:
            held = set[int]()  # by id, as comparing hits compares all their fields
            for end, group in enumerate(pack, start=1):
                if group[0][:2] not in current:
                    break
                more = {id(hit) for own, hit in wanted.get(group[0][:2], ()) if any(one.holds(own) for one in group)}
                if not more <= held:
                    found[pack[:end]] = held = held | more
        lacking = [(pack, [hit for hit in hits if id(hit) not in held]) for pack, held in found.items()]
        return sorted(lacking, key=lambda one: sum(hit.chunk.tokens for hit in one[1]))[:_TRIED_BEGINNINGS]


def begin_alike(
    evidence: Evidence,
    recent: RecentEvidence,
    reader: _Reader,
    documents: Sequence[Document],
    hits: Sequence[Hit],
    budget_tokens: int,
) -> Evidence:
    """Evidence that begins like recently read evidence, if there is some that has every hit of `evidence`, fits the
    budget and has fewer new tokens; otherwise `evidence`."""
    own, by_id = _groups(evidence.passages), {document.id: document for document in documents}
    known = sum(len(group) for group in own[: recent.known_groups(own)])
    fewest = _count(evidence.passages[known:], reader.count_tokens)
    places = [place for group in own for place in group]
    held = [hit for hit in _live(documents, hits) if _hold(places, hit)]
    for beginning, missing in recent.beginnings(documents, held):
        taken = [
            passage_of(by_id[one.document_id], reader.content(one.document_id), (one.char_start, one.char_end))
            for group in beginning
            for one in group
        ]
        tokens, last = _count(taken, reader.count_tokens), taken[-1].document_id
        room = min(budget_tokens - tokens, fewest - 1)
        packed, left = _pack_spans(reader, documents, missing, room, (_itself,), taken)
        packed.sort(key=lambda one: one.document.id == last)  # or the two would merge into one new document
        passages = (*taken, *(passage for one in packed for passage in one.passages()))
        if (
            room >= 0
            and all(_hold([Place.of(passage) for passage in passages], hit) for hit in missing)
            and not (packed and packed[0].document.id == last)
            and _collections(passages) == _collections(evidence.passages)  # cache keys depend on them
        ):
            evidence, fewest = Evidence(passages, "rag", tokens + room - left, evidence.relevance), room - left
    return evidence


def _hold(places: Sequence[Place], hit: Hit) -> bool:
    wanted = Place.of_hit(hit)
    return any(place.holds(wanted) for place in places)


def _groups(passages: Sequence[Passage]) -> Pack:
    """Groups successive passages of the same document, which form one document of the prompt."""
    return tuple(tuple(map(Place.of, group)) for _, group in groupby(passages, key=lambda passage: passage.document_id))


def _shared(one: Pack, other: Pack) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _count(passages: Sequence[Passage], count_tokens: TokenCounter) -> int:
    groups = groupby(passages, key=lambda passage: passage.document_id)
    return sum(count_tokens(list(group)) for _, group in groups)


def _collections(passages: Sequence[Passage]) -> list[str]:
    return list(dict.fromkeys(passage.collection for passage in passages))


@dataclass(slots=True)
class _PackedDocument:
    """Spans of one document chosen so far: sorted, not touching; and what they cost."""

    document: Document
    reader: _Reader
    taken: Sequence[Span] = ()  # spans of this document that the beginning already has
    spans: list[Span] = field(default_factory=list)
    tokens: int = 0

    @property
    def content(self) -> ParsedDocument:
        return self.reader.content(self.document.id)

    def try_add(self, span: Span, budget_tokens: int) -> int:
        """Add a span, without white space at its ends, if it fits the budget and does not overlap `taken`; returns its
        cost in tokens, 0 if it was not added."""
        span = _trim(span, self.content.text)
        if span[0] >= span[1] or any(start <= span[0] and span[1] <= end for start, end in self.spans):
            return 0
        if any(start < span[1] and span[0] < end for start, end in self.taken):
            return 0
        spans = _merge([*self.spans, span], self.content.text)
        tokens = self.reader.count_tokens([passage_of(self.document, self.content, merged) for merged in spans])
        cost = tokens - self.tokens
        if cost > budget_tokens:
            return 0
        self.spans, self.tokens = spans, tokens
        return cost

    def passages(self) -> list[Passage]:
        return [passage_of(self.document, self.content, span) for span in self.spans]

    def covers(self, span: Span) -> bool:
        return any(start < span[1] and span[0] < end for start, end in self.spans)


def _itself(packed: _PackedDocument, hit: Hit) -> Iterator[Span]:
    yield hit.chunk.char_start, hit.chunk.char_end


def _section(packed: _PackedDocument, hit: Hit) -> Iterator[Span]:
    """From the chunk's heading to the next heading of the same or a higher level; without headings, its pages."""
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
    """The next chunk, then the previous one: an answer more often continues after a chunk than starts before it."""
    if not packed.covers((hit.chunk.char_start, hit.chunk.char_end)):
        return
    position, spans = hit.chunk.ordinal, packed.reader.chunk_spans(packed.document.id)
    for neighbour in (position + 1, position - 1):
        if 0 <= neighbour < len(spans):
            yield spans[neighbour]


_WAYS = (_itself, _section, _neighbours)


def _trim(span: Span, text: str) -> Span:
    """The span without white space at its ends; start >= end if it has nothing else."""
    kept = text[span[0] : span[1]]
    return span[1] - len(kept.lstrip()), span[0] + len(kept.rstrip())


def _merge(spans: Sequence[Span], text: str) -> list[Span]:
    """Sorted spans; those that overlap or have only white space between them are joined."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and (start <= merged[-1][1] or text[merged[-1][1] : start].isspace()):
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def rank_documents(evidence: Evidence, hits: Sequence[Hit]) -> Evidence:
    """Evidence that was packed without hits, with its documents ranked by these hits."""
    return replace(evidence, relevance=_relevance(hits, {passage.document_id for passage in evidence.passages}))


def _relevance(hits: Sequence[Hit], packed: set[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(hit.document_id for hit in hits if hit.document_id in packed))

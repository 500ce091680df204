"""The value types of retrieval, frozen and almost without behaviour.

Offsets are in characters (code points) of a document's stored text, end exclusive. Times are Unix seconds. Pages count
from 1, and are None or empty for formats without pages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .parsed import Heading, Page
from .parsed import ParsedDocument as ParsedDocument

Status = Literal["queued", "parsing", "chunking", "embedding", "indexing", "ready", "failed", "deleting"]
Stage = Literal["queued", "parsing", "chunking", "embedding", "indexing", "ready"]
OnConflict = Literal["skip", "replace", "error"]
SearchMode = Literal["hybrid", "dense", "lexical"]
Fusion = Literal["minmax", "rrf"]
EvidenceMode = Literal["auto", "rag", "full_context"]
Role = Literal["reader", "writer", "admin"]
FilterValue = str | int | float | bool | None
Filters = Mapping[str, FilterValue | Sequence[FilterValue]]


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` `unit`s ("pages", "chunks", "bytes"); total 0: not known yet."""

    stage: str
    done: int = 0
    total: int = 0
    unit: str = ""


@dataclass(frozen=True, slots=True)
class DocumentError:
    code: str
    message: str
    retryable: bool
    page: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A document, in the state of its newest version, which may be in ingestion while an older one is in use.

    `ordinal` is the d-number in its collection, never reused; a new version gets a new one. `pages` is None until
    parsed, and for formats without pages. `duplicate_of` is set only in the reply to an upload of existing bytes.
    """

    id: str
    collection: str
    ordinal: int
    filename: str
    media_type: str
    bytes: int
    sha256: str
    version: int
    status: Status
    progress: Progress
    attempts: int
    last_error: DocumentError | None
    pages: int | None
    chunks: int
    tokens: int
    metadata: Mapping[str, object]
    created_at: float
    updated_at: float
    title: str | None = None
    duplicate_of: str | None = None


@dataclass(frozen=True, slots=True)
class Collection:
    """`documents`, `chunks` and `tokens` count ready versions in use; `pending` and `failed` count newest versions."""

    name: str
    documents: int
    chunks: int
    tokens: int
    pending: int
    failed: int
    created_at: float


@dataclass(frozen=True, slots=True)
class Location:
    """The location of a span, with the fields of the API's `location`."""

    char_start: int
    char_end: int
    page_start: int | None = None
    page_end: int | None = None
    heading_path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A searchable piece: `text` is exactly the document's text[char_start:char_end]; `ordinal` counts from 0."""

    id: str
    document_id: str
    ordinal: int
    char_start: int
    char_end: int
    text: str
    page_start: int | None = None
    page_end: int | None = None
    heading_path: tuple[str, ...] = ()
    tokens: int = 0

    @property
    def location(self) -> Location:
        return Location(self.char_start, self.char_end, self.page_start, self.page_end, self.heading_path)


@dataclass(frozen=True, slots=True)
class SearchParams:
    """Parameters of one search. `filters`: metadata key -> value, or a list of which one must match.

    `rerank`: whether to use the reranker, if there is one.
    """

    max_num_results: int = 10
    mode: SearchMode = "hybrid"
    filters: Filters | None = None
    document_ids: Sequence[str] | None = None
    rerank: bool = True


@dataclass(frozen=True, slots=True)
class Hit:
    """A found chunk. `scores` holds dense (cosine), lexical (BM25, higher is better), fused and rerank, if computed.

    `score` is the one it was ranked by; `document_version` is the version of the text searched.
    """

    chunk: Chunk
    filename: str
    collection: str
    score: float
    scores: Mapping[str, float]
    attributes: Mapping[str, object]
    document_version: int
    title: str | None = None

    @property
    def document_id(self) -> str:
        return self.chunk.document_id

    @property
    def location(self) -> Location:
        return self.chunk.location


@dataclass(frozen=True, slots=True)
class Passage:
    """One contiguous span: `text` is exactly the document's stored text[char_start:char_end].

    `pages` and `headings` are those of the whole document, so that quotes can be located without the store:
    `locate(passage.pages, passage.headings, start, end)`.
    """

    document_id: str
    document_version: int
    collection: str
    ordinal: int
    filename: str
    title: str | None
    text: str
    char_start: int
    char_end: int
    pages: tuple[Page, ...] = field(default=(), repr=False)
    headings: tuple[Heading, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the model reads: passages grouped by document, in canonical order (collection, ordinal, char_start), or a
    beginning of earlier evidence followed by what it lacked, each in that order.

    `relevance`: document ids, best first; empty without a search. `tokens`: sum of the caller's token counts of each
    document's passages.
    """

    passages: tuple[Passage, ...]
    mode: Literal["rag", "full_context"]
    tokens: int
    relevance: tuple[str, ...] = ()


# Position in the order in which chunks were added: generation, last row read of it
Position = tuple[int, int]
# Row, rows of its collection and document, text, name of the file with title and headings
ChunkText = tuple[int, int, int, str, str]


@dataclass(frozen=True, slots=True)
class IndexChange:
    """Searchable chunks (row ids) that a write added and removed, as of `generation`; and the originals (SHA-256) and
    documents (ids) that it released."""

    generation: int
    added: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    originals: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """`collections` None: all. Only the hash of the key is stored."""

    id: str
    name: str
    role: Role
    collections: tuple[str, ...] | None
    created_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class StoredReply:
    """The reply to an earlier request with the same Idempotency-Key."""

    status: int
    body: str

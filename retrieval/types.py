"""What retrieval stores and returns: frozen values, no behaviour beyond small derived ones.

Offsets are positions in a document's stored text, counted in characters (code points), end exclusive. Times are Unix
seconds. Pages count from 1 and are None or empty where the format has none.
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
    """`done` of `total` `unit`s ("pages", "chunks", "bytes"); total 0 = not known yet."""

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
    """One upload as the API shows it: its newest version, which may still be on its way while an older one answers.

    `ordinal` is the d-number in its collection, never reused; a new version gets a new one. `pages` is None until
    parsed and where the format has none. `duplicate_of` is set only on the reply to an upload that was there already.
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
    """`documents`, `chunks` and `tokens` count what answers now; `pending` and `failed` count newest versions."""

    name: str
    documents: int
    chunks: int
    tokens: int
    pending: int
    failed: int
    created_at: float


@dataclass(frozen=True, slots=True)
class Location:
    """Where a span stands; field for field the API's `location`."""

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
    """What one search wants. `filters`: metadata key -> value, or a list of which one must match.

    `rerank` False leaves out the reranker, where there is one.
    """

    max_num_results: int = 10
    mode: SearchMode = "hybrid"
    filters: Filters | None = None
    document_ids: Sequence[str] | None = None
    rerank: bool = True


@dataclass(frozen=True, slots=True)
class Hit:
    """A found chunk. `scores` holds dense (cosine), lexical (BM25, higher is better), fused and rerank, if computed.

    `score` is the one it was ranked by; `document_version` that of the text searched.
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

    `pages` and `headings` are the whole document's, so that a quote is located without asking the store again:
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
    beginning of earlier evidence and then what it lacked, each in that order.

    `relevance` names document ids best first, empty where nothing was searched for. `tokens` is what the caller's
    counter gives for each document's passages, summed.
    """

    passages: tuple[Passage, ...]
    mode: Literal["rag", "full_context"]
    tokens: int
    relevance: tuple[str, ...] = ()


# In the order in which chunks came: generation, last row taken of it
Position = tuple[int, int]
# Row, rows of its collection and document, text, name of the file with title and headings
ChunkText = tuple[int, int, int, str, str]


@dataclass(frozen=True, slots=True)
class IndexChange:
    """What a write did to the searchable chunks (row ids), as of `generation`; the originals (SHA-256) and documents
    (ids) let go."""

    generation: int
    added: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    originals: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ApiKey:
    """`collections` None = all of them. The key itself is never stored, only its hash."""

    id: str
    name: str
    role: Role
    collections: tuple[str, ...] | None
    created_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class StoredReply:
    """What an earlier request with the same Idempotency-Key was answered."""

    status: int
    body: str

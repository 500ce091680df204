"""Request and response bodies of the HTTP interface. No logic.

Requests forbid unknown fields, except those compatible with OpenAI, whose clients send options without meaning here.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from app import field_checks
from retrieval.types import Role, Status

COLLECTION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MAX_DOCUMENT_IDS = 10_000

Text = Annotated[str, AfterValidator(field_checks.plain)]
Question = Annotated[Text, AfterValidator(field_checks.not_blank)]
CollectionName = Annotated[str, Field(pattern=COLLECTION_PATTERN)]
DocumentId = Annotated[Text, Field(min_length=1, max_length=128)]
Flag = Annotated[bool, Field(strict=True)]
Numeric, Whole = BeforeValidator(field_checks.number), BeforeValidator(field_checks.whole_number)
Count = Annotated[int, Field(ge=1), Whole]
Size = Annotated[int, Field(ge=0, lt=2**63), Whole]
Temperature = Annotated[float, Field(ge=0, le=2), Numeric]
FilterValue = str | int | Annotated[float, Field(allow_inf_nan=False)] | bool | None
Filters = Annotated[
    dict[Text, Annotated[FilterValue | list[FilterValue], BeforeValidator(field_checks.filterable)]],
    BeforeValidator(field_checks.by_key),
]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Response(BaseModel):
    model_config = ConfigDict(from_attributes=True, frozen=True)


# Errors


class Problem(Response):
    """RFC 9457 problem+json; `errors` lists the files if a whole upload was refused."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str


# Documents


class Progress(Response):
    stage: str
    done: int
    total: int
    unit: str


class DocumentError(Response):
    code: str
    message: str
    retryable: bool
    page: int | None


class Document(Response):
    id: str
    object: Literal["document"] = "document"
    collection: str
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
    metadata: dict[str, Any]
    duplicate_of: str | None
    created_at: float
    updated_at: float


class UploadError(Response):
    filename: str
    code: str
    detail: str


class UploadResult(Response):
    object: Literal["list"] = "list"
    data: list[Document]
    errors: list[UploadError]


class DocumentPage(Response):
    object: Literal["list"] = "list"
    data: list[Document]
    has_more: bool


class PageSpan(Response):
    page: int
    label: str | None
    char_start: int
    char_end: int


class DocumentText(Response):
    text: str
    pages: list[PageSpan]


class Location(Response):
    """Offsets into the document's `/text` in code points, end exclusive. Page fields are absent without pages."""

    page_start: int | None = None
    page_end: int | None = None
    char_start: int
    char_end: int
    heading_path: list[str]

    @model_serializer(mode="wrap")
    def _leave_out_pages(self, handler: SerializerFunctionWrapHandler):  # a return type would hide the fields
        return {name: value for name, value in handler(self).items() if value is not None}


class Chunk(Response):
    id: str
    object: Literal["chunk"] = "chunk"
    document_id: str
    ordinal: int
    text: str
    tokens: int
    location: Location


class ChunkList(Response):
    object: Literal["list"] = "list"
    data: list[Chunk]


# Collections


class CollectionCreate(Request):
    name: CollectionName


class Collection(Response):
    """`fits_context`: whether all of it fits into one prompt, as `full_context` needs. `reads_whole`: whether `auto`
    reads it whole, so that all questions share one cached prefix, instead of the best passages. `state_ready`: whether
    that prefix has been prefetched and is cached, so that the next question starts at once."""

    name: str
    object: Literal["collection"] = "collection"
    documents: int
    chunks: int
    tokens: int
    pending: int
    failed: int
    fits_context: bool
    reads_whole: bool
    state_ready: bool
    created_at: float


class CollectionList(Response):
    object: Literal["list"] = "list"
    data: list[Collection]


# Search


class SearchRequest(Request):
    query: Annotated[Question, Field(max_length=32_768)]
    collections: list[CollectionName] | None = Field(None, max_length=1000)
    document_ids: list[DocumentId] | None = Field(None, max_length=MAX_DOCUMENT_IDS)
    filters: Filters | None = None
    max_num_results: Annotated[int, Field(ge=1, le=50), Whole] = 10
    mode: Literal["hybrid", "dense", "lexical"] = "hybrid"
    rerank: Flag | None = Field(None, description="Unset: in hybrid mode, as answers search, if there is a reranker.")


class Scores(Response):
    dense: float | None = None
    lexical: float | None = None
    fused: float | None = None
    rerank: float | None = None


class Hit(Response):
    document_id: str
    filename: str
    chunk_id: str
    text: str
    score: float
    scores: Scores
    location: Location
    attributes: dict[str, Any]


class SearchResult(Response):
    object: Literal["list"] = "list"
    data: list[Hit]


# Answers


class Message(Request):
    role: Literal["system", "user", "assistant"]
    content: Question


class AnswerRequest(Request):
    """Either `question` or `messages`; the last message is the question and must be the user's.

    Earlier messages of user and assistant make it a follow-up; system messages are ignored.
    """

    question: Question | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=1000)
    collections: list[CollectionName] | None = Field(None, min_length=1, max_length=1000)
    document_ids: list[DocumentId] | None = Field(None, min_length=1, max_length=MAX_DOCUMENT_IDS)
    filters: Filters | None = None
    mode: Literal["auto", "rag", "full_context"] = "auto"
    max_evidence_tokens: Count | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature = 0.0
    seed: Size | None = None
    stream: Flag = False


class Citation(Response):
    """`start`, `end` are offsets into the answer's text in code points; `cited_text` is a slice of the stored text."""

    start: int
    end: int
    document_id: str
    filename: str
    chunk_id: str
    cited_text: str
    location: Location
    verification: Literal["exact", "normalized"]


class Usage(Response):
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int


class Timings(Response):
    retrieval_ms: float
    pack_ms: float
    state_load_ms: float
    prefill_ms: float
    ttft_ms: float
    generation_ms: float


Tier = Literal["gpu", "host", "redis", "none"]


class CacheUse(Response):
    tier: Tier
    prefix_tokens: int


class Answer(Response):
    id: str
    object: Literal["answer"] = "answer"
    grounding: Literal["answered", "not_found"]
    text: str
    citations: list[Citation]
    sources: list[Hit]
    usage: Usage
    timings: Timings
    cache: CacheUse
    model: str
    truncated: bool


# OpenAI shapes


class ChatContentPart(BaseModel):
    type: str
    text: Text = ""


class ChatMessage(BaseModel):
    """Only the text of user and assistant messages is used."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[ChatContentPart] | None = None


class ChatCompletionRequest(BaseModel):
    """The supported part of OpenAI's request; other fields are accepted and ignored."""

    model: str = Field(max_length=128)
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Temperature | None = None
    seed: Annotated[int, Field(gt=-(2**63), lt=2**63), Whole] | None = None
    n: Literal[1] | None = None
    stream: Flag | None = None
    stream_options: dict[str, JsonValue] | None = None


class ModelCard(Response):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["jamba-rag"] = "jamba-rag"


class ModelList(Response):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Response):
    status: str
    checks: dict[str, str] = {}


# Keys


class KeyLimits(Request):
    """Limits of a key; 0: no limit, null: as the deployment."""

    requests_per_minute: Size | None = None
    tokens_per_minute: Size | None = None
    upload_bytes_per_day: Size | None = None
    documents_per_collection: Size | None = None


class KeyCreate(Request):
    name: Annotated[Text, Field(min_length=1, max_length=100), AfterValidator(field_checks.printable)]
    role: Role = "reader"
    collections: list[CollectionName] | None = Field(None, min_length=1)
    limits: KeyLimits = KeyLimits()


class Key(Response):
    id: str
    object: Literal["key"] = "key"
    name: str
    role: Role
    collections: list[str] | None
    limits: KeyLimits
    created_at: float
    revoked_at: float | None


class NewKey(Key):
    key: str


class KeyList(Response):
    object: Literal["list"] = "list"
    data: list[Key]

"""What the OpenAPI description says of fields, parameters and bodies beyond their types; /docs shows it. No logic.

A field means the same wherever it has the same name; where it doesn't, `Schema.field` comes before `field`, and
`path?parameter` before `parameter`.
"""

from collections.abc import Mapping
from typing import Any

_IMAGE, _TEXT = "/v1/documents/{document_id}/pages/{page}/image", "/v1/documents/{document_id}/text"

FIELDS: Mapping[str, str] = {
    "/v1/documents?collection": "List this one alone.",
    "/v1/documents?status": "List these alone.",
    "after": "The last id of the page before.",
    "attempts": "How often this version was tried.",
    "attributes": "The document's metadata.",
    "bytes": "Size of the original.",
    "cache": "What was kept of the prompt from earlier questions.",
    "cached_input_tokens": "Tokens of the prompt that were not read again.",
    "char_end": "Behind the last character, in the document's text.",
    "char_start": "First character, in the document's text.",
    "checks": "State of each part that answers need.",
    "chunk_id": "The passage.",
    "chunks": "Passages that search can find.",
    "citations": "Quotes in `text`, in its order; each was found in the stored text.",
    "cited_text": "The quote as the document has it.",
    "code": "Kind of the problem, for programs.",
    "collection": "The set that it belongs to.",
    "collections": "Search in these alone; default: all that the key may see.",
    "Key.collections": "The key sees these alone; null: all.",
    "NewKey.collections": "The key sees these alone; null: all.",
    "KeyCreate.collections": "Bind the key to these; what lies outside does not exist to it. Default: all.",
    "content": "What was said.",
    "created": "Unix time, in seconds.",
    "created_at": "Unix time, in seconds.",
    "data": "The entries.",
    "dense": "Cosine of the embeddings.",
    "detail": "What went wrong and what to do, for people.",
    "document_id": "The document.",
    "document_ids": "Use these documents alone; default: all.",
    "documents": "Documents that answer now.",
    "documents_per_collection": "Most documents that uploads may bring a collection to.",
    "done": "How much of `total` is done.",
    "end": "Behind the last character, in the answer's `text`.",
    f"{_IMAGE}?end": "Behind the last character to mark.",
    f"{_TEXT}?end": "Behind the last character wanted; default: the end.",
    "errors": "Files that were refused; the others are in `data`.",
    "failed": "Documents that could not be read.",
    "filename": "Name as uploaded.",
    "filters": "Names and values of metadata; all must hold, a list is any of its values.",
    "fits_context": "Whether `full_context` is possible.",
    "fused": "Dense and lexical ranks together.",
    "generation_ms": "From the first token to the end.",
    "grounding": "Whether the documents hold an answer.",
    "has_more": "Whether another page follows.",
    "heading_path": "Titles above it, the outermost first.",
    "id": "Name of this object for other calls.",
    "idempotency-key": "Any text; the same request with the same key again gets the first reply.",
    "if-none-match": "The ETag that the client has; a 304 then says that it is still right.",
    "input_tokens": "Tokens of the prompt, documents included.",
    "key": "The key itself, shown only now.",
    "key_id": "Id of the key, not the key.",
    "label": "The page's printed number, where it has one.",
    "last_error": "Why it failed, will be tried again or was read only in part; null: nothing to tell.",
    "lexical": "BM25 of the words.",
    "limit": "Most entries of the page.",
    "limits": "What the key may ask for.",
    "location": "Where it stands.",
    "max_completion_tokens": "Most tokens of the answer.",
    "max_evidence_tokens": "Most tokens of documents to read; default: as the mode and the model have it.",
    "max_num_results": "Most passages.",
    "max_output_tokens": "Most tokens of the answer.",
    "max_tokens": "As `max_completion_tokens`, which comes first.",
    "media_type": "What the file is, found from its content.",
    "message": "What went wrong, for people.",
    "messages": "The conversation, oldest first; its end is the question.",
    "metadata": "The JSON object given at the upload.",
    "mode": "`hybrid`: by meaning and words; `dense`: by meaning; `lexical`: by words.",
    "AnswerRequest.mode": "`full_context`: read every document whole; `rag`: the best passages; `auto`: whole if "
    "the collection is small enough, else passages.",
    "model": "Name of the model.",
    "ChatCompletionRequest.model": "`jamba-rag/<collection>`.",
    "/v1/models/{model}?model": "`jamba-rag/<collection>`.",
    "n": "Answers wanted: one.",
    "name": "Name of the collection.",
    "Key.name": "What the key is for.",
    "NewKey.name": "What the key is for.",
    "KeyCreate.name": "What the key is for.",
    "object": "Kind of this object.",
    "ordinal": "Place among the document's passages, from 0.",
    "output_tokens": "Tokens of the answer.",
    "owned_by": "Who serves the model.",
    "pack_ms": "Choosing and laying out what is read.",
    "page": "Number of the page, from 1.",
    "page_end": "Last page, from 1; absent where the format has no pages.",
    "page_start": "First page, from 1; absent where the format has no pages.",
    "pages": "Number of pages; null where the format has none.",
    "DocumentText.pages": "Pages that the text lies on.",
    "pending": "Documents that are queued or being read.",
    "prefill_ms": "Reading what was not kept.",
    "prefix_tokens": "Tokens that were kept.",
    "progress": "How far the ingestion is.",
    "query": "Words or a question.",
    "question": "What you want to know.",
    "reads_whole": "Whether `auto` reads all of it.",
    "requests_per_minute": "Most calls.",
    "rerank": "Score of the reranker.",
    "SearchRequest.rerank": "Whether the reranker sorts the passages; unset: in hybrid mode, where there is one.",
    "retrieval_ms": "Searching.",
    "retryable": "Whether trying again may help.",
    "revoked_at": "Unix time, in seconds; null: in force.",
    "role": "`reader` asks and reads, `writer` also adds and deletes, `admin` also handles keys.",
    "ChatMessage.role": "Who said it.",
    "Message.role": "Who said it.",
    "score": "What it was ranked by.",
    "scores": "All scores that were computed.",
    "seed": "The same seed draws the same answer.",
    "sha256": "Of the original.",
    "sources": "Passages that were read; with `not_found` the nearest come first.",
    "stage": "What is being done.",
    "start": "First character, in the answer's `text`.",
    f"{_IMAGE}?start": "First character to mark.",
    f"{_TEXT}?start": "First character wanted.",
    "state_load_ms": "Loading what was kept.",
    "state_ready": "Whether the next question starts at once.",
    "status": "How far it is: `ready` documents answer; `failed` ones can be retried.",
    "Health.status": "One word for all.",
    "stream": "Send the answer as Server-Sent Events, as it is written.",
    "stream_options": "`include_usage` adds the usage to the last chunk.",
    "temperature": "0: always the likeliest words; higher: more varied.",
    "text": "The text.",
    "tier": "Where it was kept.",
    "timings": "Milliseconds of each step.",
    "tokens": "Tokens of the text, as the embedder counts them.",
    "tokens_per_minute": "Most tokens read and written.",
    "total": "What `done` will be at the end; 0: not known yet.",
    "truncated": "Whether the answer was cut off at its limit.",
    "ttft_ms": "From the request to the first token.",
    "type": "Kind of the part; `text` is read.",
    "unit": "What `done` and `total` count.",
    "updated_at": "Unix time, in seconds.",
    "upload_bytes_per_day": "Most bytes of uploads.",
    "usage": "Tokens read and written.",
    "duplicate_of": "The document that had the same bytes already; null: new.",
    "verification": "`exact`: letter for letter; `normalized`: up to white space and the like.",
    "version": "Counts from 1; a replacement has the next one.",
}

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "AnswerRequest": {"question": "When does the lease end?", "collections": ["contracts"]},
    "ChatCompletionRequest": {
        "model": "jamba-rag/contracts",
        "messages": [{"role": "user", "content": "When does the lease end?"}],
    },
    "Citation": {
        "start": 0,
        "end": 16,
        "document_id": "doc_8d1f",
        "filename": "lease.pdf",
        "chunk_id": "chunk_52c0",
        "cited_text": "28 February 2031",
        "location": {"page_start": 2, "page_end": 2, "char_start": 1840, "char_end": 1856, "heading_path": ["Term"]},
        "verification": "exact",
    },
    "CollectionCreate": {"name": "contracts"},
    "KeyCreate": {"name": "reading room", "role": "reader", "collections": ["contracts"]},
    "SearchRequest": {"query": "end of the lease", "filters": {"year": [2023, 2024]}, "max_num_results": 5},
}


def describe(openapi: dict[str, Any]) -> dict[str, Any]:
    """The description with these texts, put in place."""
    schemas = openapi["components"]["schemas"]
    for name, schema in schemas.items():
        for field, value in schema.get("properties", {}).items():
            if text := FIELDS.get(f"{name}.{field}", FIELDS.get(field)):
                value.setdefault("description", text)
        if name in EXAMPLES:
            schema["examples"] = [EXAMPLES[name]]
    for path, methods in openapi["paths"].items():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                name = parameter["name"]
                if text := FIELDS.get(f"{path}?{name}", FIELDS.get(name)):
                    parameter.setdefault("description", text)
    return openapi

"""Ingests one upload, from bytes to searchable chunks. Start at `ingest_document`; jobs.py decides when to call it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ingest.chunk import ChunkLimits, chunk_document
from ingest.files import FileStore
from ingest.parse import ParseError
from ingest.parse.cage import parse_in_child
from ingest.parse.child import ParseLimits
from retrieval.embedder import Embedder, text_to_embed
from retrieval.store import DocumentStore
from retrieval.types import Chunk, Document, ParsedDocument, Stage

_PROGRESS_EVERY_S = 0.25
_CONTEXT_TOKENS = 40  # tokens of the embedder's window reserved for title and headings


class IngestEmbedder(Embedder, Protocol):
    """An embedder that can also count its tokens of a text."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens included."""


@dataclass(frozen=True, slots=True)
class IngestLimits:
    """Limits for one document, and its chunk size. `embed_batch`: chunks embedded between two progress reports."""

    parse: ParseLimits = field(default_factory=ParseLimits)
    chunk: ChunkLimits = field(default_factory=ChunkLimits)
    embed_batch: int = 64


@dataclass(frozen=True, slots=True)
class Job:
    """One version of a document, leased to a worker. `check` is called often and raises when the work must end."""

    document: Document
    store: DocumentStore
    worker_id: str | None = None
    check: Callable[[], None] = lambda: None

    def set_progress(self, stage: Stage, done: int = 0, total: int = 0, unit: str = "") -> None:
        """Raises LeaseLost if the version was superseded or deleted, or is leased to another worker."""
        self.check()
        self.store.set_progress(
            self.document.id, stage, done, total, unit, version=self.document.version, worker_id=self.worker_id
        )

    def reporter(self, stage: Stage, unit: str) -> Callable[[int, int], None]:
        """A callback (done, total) that stores progress, at most four times a second and at the end."""
        last = 0.0

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last >= _PROGRESS_EVERY_S:
                last = now
                self.set_progress(stage, done, total, unit)

        return report


class Index(Protocol):
    """An index derived from the store: a vector index, or all indexes of a search (`retrieval.search.Retriever`)."""

    def catch_up(self, source: DocumentStore) -> bool: ...


def ingest_document(
    job: Job, index: Index, embedder: IngestEmbedder, files: FileStore, limits: IngestLimits | None = None
) -> int:
    """Parse, chunk, embed, index one stored upload; returns its number of chunks. Safe to repeat.

    Raises ParseError; StorageFull; LeaseLost and whatever `job.check` raises. Then only the progress has changed.
    """
    limits = limits or IngestLimits()
    parsed = _parse(job, files, limits.parse)
    job.set_progress("chunking", 0, len(parsed.text), "characters")
    chunks = _chunk(job, parsed, embedder, limits.chunk)
    vectors = _embed(job, parsed, chunks, embedder, limits.embed_batch)
    job.set_progress("indexing", 0, len(chunks), "chunks")
    job.store.replace_chunks(  # one transaction: SQLite is the source of truth
        *(job.document.id, parsed, chunks, vectors, embedder.name),
        version=job.document.version,
        worker_id=job.worker_id,
    )
    index.catch_up(job.store)  # can be rebuilt from the store
    return len(chunks)


def _parse(job: Job, files: FileStore, limits: ParseLimits) -> ParsedDocument:
    path = files.path(job.document.sha256)
    if not path.is_file():
        raise ParseError("file_missing", "the original is no longer on the disk of the service; upload it again")
    files.require_room()
    job.set_progress("parsing", 0, 0, "pages")
    return parse_in_child(path, job.document.media_type, limits, job.reporter("parsing", "pages"), job.check)


def _chunk(job: Job, parsed: ParsedDocument, embedder: IngestEmbedder, limits: ChunkLimits) -> list[Chunk]:
    count_tokens, report = token_counter(embedder), job.reporter("chunking", "characters")
    total, counted = len(parsed.text), 0

    def count_or_end(text: str) -> int:
        nonlocal counted
        job.check()  # a text of 256 MiB takes minutes
        counted += len(text)
        report(min(counted // 2, max(0, total - 1)), total)  # counted twice: in paragraph and in chunk
        return count_tokens(text)

    return chunk_document(parsed, job.document.id, fit_limits(limits, embedder), count_or_end)


def token_counter(embedder: IngestEmbedder) -> Callable[[str], int]:
    """A function that counts the tokens of a text, without special tokens."""
    special = embedder.count_tokens([""])[0]
    return lambda text: embedder.count_tokens([text])[0] - special


def fit_limits(limits: ChunkLimits, embedder: IngestEmbedder) -> ChunkLimits:
    """Limits such that a chunk with its headings fits the embedder's window."""
    room = max(16, embedder.max_tokens - embedder.count_tokens([""])[0] - _CONTEXT_TOKENS)
    return ChunkLimits(min(limits.target_tokens, room), limits.min_tokens, limits.chars_per_token)


def _embed(
    job: Job, parsed: ParsedDocument, chunks: Sequence[Chunk], embedder: IngestEmbedder, batch: int
) -> np.ndarray:
    """Vectors (len(chunks), dim) float32 of unit length."""
    report = job.reporter("embedding", "chunks")
    vectors = np.empty((len(chunks), embedder.dim), dtype=np.float32)
    job.set_progress("embedding", 0, len(chunks), "chunks")
    for start in range(0, len(chunks), batch):
        texts = [text_to_embed(parsed.title, chunk) for chunk in chunks[start : start + batch]]
        vectors[start : start + len(texts)] = embedder.embed_passages(texts)
        report(start + len(texts), len(chunks))
    return vectors

"""DocumentStore: the truth about documents, on SQLite. All SQL of the project stands in this module's family.

This page is the contract; the statements are in store_documents.py (collections, documents, versions), store_jobs.py
(leases), store_content.py (what becomes searchable), store_search.py (reading it), store_access.py (keys, settings).
What the indexes need of it is store_feed.py.
Files and FAISS are not its business: it names chunks by row id and says what changed since a generation.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from . import store_access as access
from . import store_content as content
from . import store_documents as documents
from . import store_jobs as jobs
from . import store_search as searching
from .clock import ForwardClock
from .database import Database, StorageBusy, StorageFull, StorageUnwritable, StoreUnusable
from .store_access import IdempotencyConflict
from .store_documents import CollectionExists, CollectionNotFound, DocumentNotFound, DocumentNotReady, DuplicateDocument
from .store_embedder import EmbedderMismatch
from .store_feed import IndexFeed
from .store_jobs import LeaseLost
from .store_search import Selection
from .types import (
    ApiKey,
    Chunk,
    Collection,
    Document,
    Filters,
    Hit,
    IndexChange,
    OnConflict,
    ParsedDocument,
    Role,
    Stage,
    StoredReply,
)

__all__ = [
    "CollectionExists",
    "CollectionNotFound",
    "DocumentNotFound",
    "DocumentNotReady",
    "DocumentStore",
    "DuplicateDocument",
    "EmbedderMismatch",
    "IdempotencyConflict",
    "LeaseLost",
    "Selection",
    "StorageBusy",
    "StorageFull",
    "StorageUnwritable",
    "StoreUnusable",
]


class DocumentStore(IndexFeed):
    """Thread safe; several processes may open one file. Every write is one transaction and safe to repeat.

    Methods that name a document or collection raise DocumentNotFound or CollectionNotFound when there is none.
    `clock` gives Unix seconds and never goes back. The collection `default` always exists.
    """

    def __init__(self, path: Path | str, max_attempts: int = 3, clock: Callable[[], float] | None = None) -> None:
        """Open or create. Raises StoreUnusable. `max_attempts` bounds how often one version is ingested."""
        self._db = Database(path)
        self._max_attempts = max_attempts
        self._clock = clock or ForwardClock()

    def close(self) -> None:
        self._db.close()

    def snapshot(self) -> AbstractContextManager[sqlite3.Connection]:
        """Within it, all reads of this thread see one state. No writes inside."""
        return self._db.read()

    def check(self) -> list[str]:
        """Say what is wrong with the database file; empty if nothing is. Reads all of it."""
        with self._db.read() as c:
            return content.check(c)

    # Collections

    def create_collection(self, name: str) -> Collection:
        """Raises CollectionExists; ValueError unless `name` is 1 to 64 of a-z A-Z 0-9 . _ - after a letter or digit."""
        with self._db.write() as c:
            return documents.create_collection(c, name, self._clock())

    def list_collections(self) -> list[Collection]:
        """All, oldest first: their canonical order."""
        with self._db.read() as c:
            return documents.list_collections(c)

    def get_collection(self, name: str) -> Collection:
        with self._db.read() as c:
            return documents.get_collection(c, name)

    def delete_collection(self, name: str) -> IndexChange:
        """Remove it with all its documents; `default` stays, empty."""
        with self._db.write() as c:
            return documents.delete_collection(c, name, self._clock())

    # Documents

    def create_document(
        self,
        collection: str,
        filename: str,
        media_type: str,
        nbytes: int,
        sha256: str,
        metadata: Mapping[str, object] | None = None,
        on_conflict: OnConflict = "skip",
    ) -> tuple[Document, bool]:
        """Queue an upload for ingestion; returns it and whether there is now something to ingest.

        If the collection has a document whose newest version is these same bytes: `skip` returns that one with
        `duplicate_of` set, `replace` queues a new version of it with this name and metadata, `error` raises
        DuplicateDocument.
        """
        upload = documents.Upload(filename, media_type, nbytes, sha256, dict(metadata or {}))
        with self._db.write() as c:
            return documents.create_document(c, collection, upload, on_conflict, self._clock())

    def replace_document(
        self,
        document_id: str,
        filename: str,
        media_type: str,
        nbytes: int,
        sha256: str,
        metadata: Mapping[str, object] | None = None,
    ) -> tuple[Document, bool]:
        """Queue new bytes for a document; the old version answers until the new one is ready. Returns as
        `create_document`. Same bytes, name and metadata as its newest version = nothing to do, unless that failed.
        `metadata` None keeps the old one. A version on its way is superseded. Raises DuplicateDocument if another has
        these bytes.
        """
        with self._db.write() as c:
            old = documents.get_document(c, document_id)
            upload = documents.Upload(
                filename, media_type, nbytes, sha256, dict(old.metadata if metadata is None else metadata)
            )
            return documents.replace_document(c, old, upload, self._clock())

    def get_document(self, document_id: str) -> Document:
        """Its newest version."""
        with self._db.read() as c:
            return documents.get_document(c, document_id)

    def list_documents(
        self,
        collections: Sequence[str] | None = None,
        status: str | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> list[Document]:
        """Newest versions, oldest document first, at most `limit`, those after the document id `after`.

        That one may be gone, for a day. Raises CollectionNotFound, DocumentNotFound.
        """
        with self._db.read() as c:
            return documents.list_documents(c, collections, status, limit, after)

    def collection_of(self, document_id: str) -> str:
        """Where a document is, or was before it was deleted in the last day. Raises DocumentNotFound."""
        with self._db.read() as c:
            return documents.find_place(c, document_id)[1]

    def ready_documents(
        self, collections: Sequence[str], document_ids: Sequence[str] | None = None, filters: Filters | None = None
    ) -> list[Document]:
        """The versions that answer now, in canonical order (age of the collection, ordinal).

        `filters` as in SearchParams; a list in the metadata matches by any of its members. Raises CollectionNotFound;
        unknown document ids match nothing.
        """
        with self._db.read() as c:
            return documents.ready_documents(c, collections, document_ids, filters)

    def hide_document(self, document_id: str) -> IndexChange:
        """First half of a deletion: content and search rows are gone at once, status is `deleting`.

        For callers with more to clean up before `delete_document`; after a crash they find it by that status.
        """
        with self._db.write() as c:
            return documents.hide_document(c, document_id, self._clock())

    def delete_document(self, document_id: str) -> IndexChange:
        """Remove it from everything, `to_forget` too; afterwards no read finds any of it."""
        with self._db.write() as c:
            return documents.delete_document(c, document_id, self._clock())

    def to_forget(self) -> list[str]:
        """Ids of documents whose content was replaced or deleted and that nobody has called `forgotten` yet."""
        with self._db.read() as c:
            return content.to_forget(c)

    def forgotten(self, document_ids: Sequence[str]) -> None:
        """All that was made of what these documents held has gone, wherever it was kept."""
        with self._db.write() as c:
            content.forgotten(c, document_ids)

    def file_in_use(self, sha256: str) -> bool:
        """Whether any version needs the original with this hash."""
        with self._db.read() as c:
            return documents.file_in_use(c, sha256)

    # Ingestion jobs

    def lease_next(self, worker_id: str, lease_s: float, max_bytes: int | None = None) -> Document | None:
        """Give the oldest version waiting to be ingested to this worker, or None; counts an attempt.

        Only one whose file has at most `max_bytes`; None: any. A version whose lease ran out waits again; after
        3 x `max_attempts` it is failed, code `too_many_attempts`.
        """
        with self._db.write() as c:
            return jobs.lease_next(c, worker_id, lease_s, max_bytes, self._max_attempts, self._clock())

    def end_leases(self) -> None:
        """Free at once what was leased or paused: for a process that has the data dir to itself, at its start."""
        with self._db.write() as c:
            jobs.end_leases(c)

    def renew_lease(self, document_id: str, worker_id: str, lease_s: float, *, version: int) -> None:
        """Raises LeaseLost when the version was superseded, deleted, or leased by another: stop working on it."""
        with self._db.write() as c:
            jobs.renew_lease(c, document_id, version, worker_id, lease_s, self._clock())

    def release_lease(self, document_id: str, worker_id: str, *, version: int) -> None:
        """Put the version back into the queue without counting the attempt: an orderly stop."""
        with self._db.write() as c:
            jobs.release_lease(c, document_id, version, worker_id, self._clock())

    def set_progress(
        self,
        document_id: str,
        stage: Stage,
        done: int = 0,
        total: int = 0,
        unit: str = "",
        *,
        version: int,
        worker_id: str | None = None,
    ) -> None:
        """Say how far ingestion is; `worker_id` None: without a lease. Raises LeaseLost, as all of this section."""
        with self._db.write() as c:
            jobs.set_progress(c, document_id, version, worker_id, stage, (done, total, unit), self._clock())

    def fail_document(
        self,
        document_id: str,
        code: str,
        message: str,
        retryable: bool,
        page: int | None = None,
        *,
        version: int,
        worker_id: str | None = None,
    ) -> Document:
        """Record an error: back to the queue after a pause if `retryable` and attempts are left, else `failed`.

        An older version that is ready goes on answering."""
        error = documents.DocumentError(code, message, retryable, page)
        with self._db.write() as c:
            return jobs.fail_document(c, document_id, version, worker_id, error, self._max_attempts, self._clock())

    def postpone_document(
        self, document_id: str, code: str, message: str, pause_s: float, *, version: int, worker_id: str
    ) -> None:
        """Record what keeps the service from ingesting: back to the queue for a while, without counting the attempt."""
        error = documents.DocumentError(code, message, True, None)
        with self._db.write() as c:
            jobs.postpone_document(c, document_id, version, worker_id, error, pause_s, self._clock())

    def retry_document(self, document_id: str) -> Document:
        """Queue a failed version again, with fresh attempts and, as it comes late, a new ordinal; others unchanged."""
        with self._db.write() as c:
            return jobs.retry_document(c, document_id, self._clock())

    # Content of the version that answers now

    def replace_chunks(
        self,
        document_id: str,
        parsed: ParsedDocument,
        chunks: Sequence[Chunk],
        vectors: np.ndarray,
        embedder_name: str,
        *,
        version: int,
        worker_id: str | None = None,
    ) -> IndexChange:
        """Make `version` ready with this content and drop what answered before, in one transaction.

        vectors (len(chunks), dim) float32 of unit length. The first call fixes embedder and dim for this database;
        another raises EmbedderMismatch. Raises LeaseLost; ValueError when a chunk is not its span of the text.
        """
        content.check_chunks(parsed, chunks, vectors)
        with self._db.write() as c:
            row = jobs.require_version(c, document_id, version, worker_id)
            return content.replace_content(c, row, parsed, chunks, vectors, embedder_name, self._clock())

    def get_content(self, document_id: str) -> ParsedDocument:
        """Text, pages, headings and title as parsed. Raises DocumentNotReady when no version is ready."""
        with self._db.read() as c:
            return searching.get_content(c, document_id)

    def get_text(self, document_id: str) -> str:
        return self.get_content(document_id).text

    def get_chunks(self, document_id: str) -> list[Chunk]:
        """In order. Raises DocumentNotReady."""
        with self._db.read() as c:
            return searching.get_chunks(c, document_id)

    def chunk_spans(self, document_id: str) -> list[tuple[int, int]]:
        """Where the chunks stand in the text, in order. Raises DocumentNotReady."""
        with self._db.read() as c:
            return searching.chunk_spans(c, document_id)

    def chunk_at(self, document_id: str, char_start: int, char_end: int) -> Chunk | None:
        """The chunk that shares most characters with the span, the first such; None if none does."""
        with self._db.read() as c:
            return searching.chunk_at(c, document_id, char_start, char_end)

    # Search

    def select_chunks(
        self, collections: Sequence[str], document_ids: Sequence[str] | None = None, filters: Filters | None = None
    ) -> Selection:
        """What a search may see; arguments as `ready_documents`."""
        with self._db.read() as c:
            return searching.select_chunks(c, collections, document_ids, filters)

    def load_hits(self, chunk_rows: Sequence[int]) -> dict[int, Hit]:
        """Row -> hit without scores, of those rows that still exist."""
        with self._db.read() as c:
            return searching.load_hits(c, chunk_rows)

    # Keys, replies, settings

    def add_key(self, name: str, role: Role, key_hash: str, collections: Sequence[str] | None = None) -> ApiKey:
        with self._db.write() as c:
            return access.add_key(c, name, role, key_hash, collections, self._clock())

    def find_key(self, key_hash: str) -> ApiKey | None:
        """None if unknown or revoked."""
        with self._db.read() as c:
            return access.find_key(c, key_hash)

    def is_in_force(self, key_id: str) -> bool:
        """Whether there is such a key, and it is not revoked."""
        with self._db.read() as c:
            return access.is_in_force(c, key_id)

    def list_keys(self) -> list[ApiKey]:
        """All, revoked ones too, oldest first."""
        with self._db.read() as c:
            return access.list_keys(c)

    def revoke_key(self, key_id: str) -> bool:
        """Whether there was such a key in force."""
        with self._db.write() as c:
            return access.revoke_key(c, key_id, self._clock())

    def find_reply(self, key: str, fingerprint: str) -> StoredReply | None:
        """The reply to an earlier request with this Idempotency-Key (made unique to the caller).

        Raises IdempotencyConflict when that request was another one, i.e. had another fingerprint.
        """
        with self._db.read() as c:
            return access.find_reply(c, key, fingerprint, self._clock())

    def save_reply(self, key: str, fingerprint: str, reply: StoredReply) -> None:
        """Keep it for a day; the first one kept stays."""
        with self._db.write() as c:
            access.save_reply(c, key, fingerprint, reply, self._clock())

    def get_setting(self, name: str) -> str | None:
        """A value this database remembers, such as the fence nonce."""
        with self._db.read() as c:
            return access.get_setting(c, name)

    def set_setting(self, name: str, value: str) -> None:
        with self._db.write() as c:
            access.set_setting(c, name, value)

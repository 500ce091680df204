"""DocumentStore: the source of truth about documents, in SQLite. All SQL of the project is in the store*.py modules.

This module is the interface; the statements are in store_documents.py (collections, documents, versions), store_jobs.py
(leases), store_content.py (searchable content), store_search.py (reading it), store_access.py (keys, settings). The
interface for indexes is in store_feed.py: chunks are identified by row id, changes by generation. Files and the indexes
themselves are elsewhere.
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

    Methods that take a document or collection raise DocumentNotFound or CollectionNotFound if it does not exist.
    `clock` returns Unix seconds and never goes back. The collection `default` always exists.
    """

    def __init__(self, path: Path | str, max_attempts: int = 3, clock: Callable[[], float] | None = None) -> None:
        """Open or create. Raises StoreUnusable. `max_attempts`: maximum attempts to ingest a version."""
        self._db = Database(path)
        self._max_attempts = max_attempts
        self._clock = clock or ForwardClock()

    def close(self) -> None:
        self._db.close()

    def snapshot(self) -> AbstractContextManager[sqlite3.Connection]:
        """Within it, all reads of this thread see one snapshot. No writes inside."""
        return self._db.read()

    def check(self) -> list[str]:
        """What is wrong with the database file; empty if nothing is. Reads all of it."""
        with self._db.read() as c:
            return content.check(c)

    # Collections

    def create_collection(self, name: str) -> Collection:
        """Raises CollectionExists; ValueError unless `name` is 1 to 64 of a-z A-Z 0-9 . _ - after a letter or digit."""
        with self._db.write() as c:
            return documents.create_collection(c, name, self._clock())

    def list_collections(self) -> list[Collection]:
        """All, oldest first, which is their canonical order."""
        with self._db.read() as c:
            return documents.list_collections(c)

    def get_collection(self, name: str) -> Collection:
        with self._db.read() as c:
            return documents.get_collection(c, name)

    def delete_collection(self, name: str) -> IndexChange:
        """Delete it with all its documents; `default` is only emptied."""
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
        """Queue an upload for ingestion; returns the document and whether there is something to ingest.

        If the newest version of a document in the collection has the same bytes: `skip` returns that document with
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
        """Queue a new version of a document, which replaces the old one when it is ready. Returns as `create_document`.

        With the same bytes, name and metadata as the newest version, there is nothing to do unless that failed.
        `metadata` None keeps the old one. A version still being ingested is superseded. Raises DuplicateDocument if
        another document has these bytes.
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

    def answering_version(self, document_id: str) -> Document:
        """The version that answers, or the newest as long as none is ready."""
        with self._db.read() as c:
            return documents.answering_version(c, document_id)

    def list_documents(
        self,
        collections: Sequence[str] | None = None,
        status: str | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> list[Document]:
        """Newest versions, oldest document first: at most `limit`, after the document id `after`.

        `after` may have been deleted within the last day. Raises CollectionNotFound, DocumentNotFound.
        """
        with self._db.read() as c:
            return documents.list_documents(c, collections, status, limit, after)

    def collection_of(self, document_id: str) -> str:
        """The collection of a document, also of one deleted within the last day. Raises DocumentNotFound."""
        with self._db.read() as c:
            return documents.find_place(c, document_id)[1]

    def ready_documents(
        self, collections: Sequence[str], document_ids: Sequence[str] | None = None, filters: Filters | None = None
    ) -> list[Document]:
        """The current ready versions, in canonical order (age of the collection, ordinal).

        `filters` as in SearchParams; a list in the metadata matches by any of its members. Raises CollectionNotFound;
        unknown document ids match nothing.
        """
        with self._db.read() as c:
            return documents.ready_documents(c, collections, document_ids, filters)

    def hide_document(self, document_id: str) -> IndexChange:
        """First half of a deletion: removes content and search rows, and sets the status `deleting`.

        For callers with more to clean up before `delete_document`; after a crash they find the document by its status.
        """
        with self._db.write() as c:
            return documents.hide_document(c, document_id, self._clock())

    def delete_document(self, document_id: str) -> IndexChange:
        """Delete it completely, including its entry in `to_forget`."""
        with self._db.write() as c:
            return documents.delete_document(c, document_id, self._clock())

    def to_forget(self) -> list[str]:
        """Ids of documents whose content was replaced or deleted, and for which `forgotten` has not been called yet."""
        with self._db.read() as c:
            return content.to_forget(c)

    def forgotten(self, document_ids: Sequence[str]) -> None:
        """Record that everything derived from the old content of these documents has been removed."""
        with self._db.write() as c:
            content.forgotten(c, document_ids)

    def file_in_use(self, sha256: str) -> bool:
        """Whether any version needs the original with this hash."""
        with self._db.read() as c:
            return documents.file_in_use(c, sha256)

    # Ingestion jobs

    def lease_next(self, worker_id: str, lease_s: float, max_bytes: int | None = None) -> Document | None:
        """Lease the oldest waiting version to this worker, counting an attempt; None if there is none.

        `max_bytes`: maximum file size; None: any. A version whose lease has expired is waiting again; after 3 x
        `max_attempts` it fails with code `too_many_attempts`.
        """
        with self._db.write() as c:
            return jobs.lease_next(c, worker_id, lease_s, max_bytes, self._max_attempts, self._clock())

    def end_leases(self) -> None:
        """End all leases and pauses, at the start of a process that holds the lock of the data directory."""
        with self._db.write() as c:
            jobs.end_leases(c)

    def renew_lease(self, document_id: str, worker_id: str, lease_s: float, *, version: int) -> None:
        """Raises LeaseLost if the version was superseded, deleted, or leased to another worker: stop working on it."""
        with self._db.write() as c:
            jobs.renew_lease(c, document_id, version, worker_id, lease_s, self._clock())

    def release_lease(self, document_id: str, worker_id: str, *, version: int) -> None:
        """Return the version to the queue without counting the attempt, for an orderly stop."""
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
        """Record progress; `worker_id` None: without a lease. Raises LeaseLost, like the other methods here."""
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

        An older ready version stays in use."""
        error = documents.DocumentError(code, message, retryable, page)
        with self._db.write() as c:
            return jobs.fail_document(c, document_id, version, worker_id, error, self._max_attempts, self._clock())

    def postpone_document(
        self, document_id: str, code: str, message: str, pause_s: float, *, version: int, worker_id: str
    ) -> None:
        """Record an error of the service itself: back to the queue after a pause, without counting the attempt."""
        error = documents.DocumentError(code, message, True, None)
        with self._db.write() as c:
            jobs.postpone_document(c, document_id, version, worker_id, error, pause_s, self._clock())

    def retry_document(self, document_id: str) -> Document:
        """Queue a failed version again, with its attempts reset and a new ordinal; other documents stay unchanged."""
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
        """Make `version` ready with this content and drop the previous version, in one transaction.

        vectors (len(chunks), dim) float32, unit length. The first call fixes embedder and dim of the database; others
        raise EmbedderMismatch. Raises LeaseLost; ValueError if a chunk is not its span of the text.
        """
        content.check_chunks(parsed, chunks, vectors)
        with self._db.write() as c:
            row = jobs.require_version(c, document_id, version, worker_id)
            return content.replace_content(c, row, parsed, chunks, vectors, embedder_name, self._clock())

    def get_content(self, document_id: str) -> ParsedDocument:
        """Text, pages, headings and title as parsed. Raises DocumentNotReady if no version is ready."""
        with self._db.read() as c:
            return searching.get_content(c, document_id)

    def get_text(self, document_id: str) -> str:
        return self.get_content(document_id).text

    def get_chunks(self, document_id: str) -> list[Chunk]:
        """In order. Raises DocumentNotReady."""
        with self._db.read() as c:
            return searching.get_chunks(c, document_id)

    def chunk_spans(self, document_id: str) -> list[tuple[int, int]]:
        """The (start, end) of each chunk in the text, in order. Raises DocumentNotReady."""
        with self._db.read() as c:
            return searching.chunk_spans(c, document_id)

    def chunk_at(self, document_id: str, char_start: int, char_end: int) -> Chunk | None:
        """The chunk that shares most characters with the span, the first of equals; None if none overlaps it."""
        with self._db.read() as c:
            return searching.chunk_at(c, document_id, char_start, char_end)

    # Search

    def select_chunks(
        self, collections: Sequence[str], document_ids: Sequence[str] | None = None, filters: Filters | None = None
    ) -> Selection:
        """The scope of a search; arguments as `ready_documents`."""
        with self._db.read() as c:
            return searching.select_chunks(c, collections, document_ids, filters)

    def load_hits(self, chunk_rows: Sequence[int]) -> dict[int, Hit]:
        """Row -> hit without scores, for the rows that still exist."""
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
        """Whether the key exists and is not revoked."""
        with self._db.read() as c:
            return access.is_in_force(c, key_id)

    def list_keys(self) -> list[ApiKey]:
        """All, including revoked ones, oldest first."""
        with self._db.read() as c:
            return access.list_keys(c)

    def revoke_key(self, key_id: str) -> bool:
        """Returns whether there was such a key, not yet revoked."""
        with self._db.write() as c:
            return access.revoke_key(c, key_id, self._clock())

    def find_reply(self, key: str, fingerprint: str) -> StoredReply | None:
        """The reply to an earlier request with this Idempotency-Key (made unique per caller).

        Raises IdempotencyConflict if that request had another fingerprint.
        """
        with self._db.read() as c:
            return access.find_reply(c, key, fingerprint, self._clock())

    def save_reply(self, key: str, fingerprint: str, reply: StoredReply) -> None:
        """Store it for a day; an existing one is not overwritten."""
        with self._db.write() as c:
            access.save_reply(c, key, fingerprint, reply, self._clock())

    def get_setting(self, name: str) -> str | None:
        """A stored value of this database, such as the fence nonce."""
        with self._db.read() as c:
            return access.get_setting(c, name)

    def set_setting(self, name: str, value: str) -> None:
        with self._db.write() as c:
            access.set_setting(c, name, value)

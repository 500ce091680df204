"""Workers that take uploads from the queue and ingest them. The queue is in the store, so a crash loses nothing.

A worker holds a lease on its document and renews it from a heartbeat thread; if the process dies, the lease expires and
another worker starts the document again. Start at `IngestWorker._work`.
"""

import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass, field

from ingest.files import FileStore
from ingest.parse import ParseError
from ingest.pipeline import Index, IngestEmbedder, IngestLimits, Job, ingest_document
from retrieval.store import DocumentStore, EmbedderMismatch, LeaseLost, StorageBusy, StorageFull, StorageUnwritable
from retrieval.types import Document

_SMALL_BYTES = 256 << 10
_STORAGE_SILENCE_S = 60.0
_NO_ROOM_PAUSE_S = 30.0
_STORAGE_FAULTS = StorageBusy | StorageFull | StorageUnwritable
_LOG = logging.getLogger(__name__)


class _Stopping(Exception):
    """The worker was asked to stop: hand the document back."""


@dataclass(eq=False, slots=True)
class _Lease:
    document: Document
    lost: threading.Event = field(default_factory=threading.Event)


class IngestWorker:
    """Ingests queued documents on `threads` threads until stopped.

    One more thread takes only files of at most `small_bytes`, so that they need not wait for large ones; 0: no such
    thread. `notify` wakes the threads for a new upload; they also poll every `poll_s` seconds, which finds delayed
    retries and jobs of a dead process.
    """

    def __init__(
        self,
        store: DocumentStore,
        index: Index,
        embedder: IngestEmbedder,
        files: FileStore,
        limits: IngestLimits | None = None,
        *,
        threads: int = 1,
        small_bytes: int = _SMALL_BYTES,
        lease_s: float = 60.0,
        poll_s: float = 1.0,
    ) -> None:
        self.worker_id = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._store = store
        self._index = index
        self._embedder = embedder
        self._files = files
        self._limits = limits or IngestLimits()
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._stopping = threading.Event()
        self._wake = threading.Condition()
        self._leases: set[_Lease] = set()
        self._silent_until = 0.0  # time until which `_complain` logs nothing about the disk
        limits_of_threads = [None] * threads + ([small_bytes] if threads and small_bytes else [])
        self._threads = [
            threading.Thread(target=self._work, args=(max_bytes,), name=f"ingest-{i}", daemon=True)
            for i, max_bytes in enumerate(limits_of_threads)
        ]
        self._heart = threading.Thread(target=self._beat, name="ingest-heartbeat", daemon=True)

    def start(self) -> None:
        for thread in (*self._threads, self._heart):
            thread.start()

    def notify(self) -> None:
        """Wake the threads: something was queued."""
        with self._wake:
            self._wake.notify_all()

    def stop(self, timeout_s: float = 30.0) -> bool:
        """Stop soon: a document in work goes back to the queue without losing an attempt, unless it is almost done.

        Returns whether all threads ended in time; only then may the store be closed. A document that a thread is still
        busy with goes back too; the thread's later writes are rejected (LeaseLost).
        """
        self._stopping.set()
        self.notify()
        deadline = time.monotonic() + timeout_s
        started = [thread for thread in (*self._threads, self._heart) if thread.ident is not None]
        for thread in started:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in started):
            return True
        for lease in self._leases.copy():
            lease.lost.set()
            self._settle(lease.document, None)
        return False

    def _work(self, max_bytes: int | None) -> None:
        while not self._stopping.is_set():
            try:
                document = self._store.lease_next(self.worker_id, self._lease_s, max_bytes)
            except Exception as error:
                self._complain("cannot read the queue of uploads; trying again", error)
                document = None
            if document is None:
                with self._wake:
                    if not self._stopping.is_set():
                        self._wake.wait(self._poll_s)
            else:
                self._run(_Lease(document))

    def _run(self, lease: _Lease) -> None:
        """Ingest one leased document; every outcome is recorded in the store, and no exception leaves this method."""
        document = lease.document
        self._leases.add(lease)
        try:
            job = Job(document, self._store, self.worker_id, check=lambda: self._check(lease))
            chunks = ingest_document(job, self._index, self._embedder, self._files, self._limits)
            _LOG.info("document %s version %d is ready: %d chunks", document.id, document.version, chunks)
        except LeaseLost as error:
            _LOG.info("dropped: %s", error)
        except _Stopping:
            self._settle(document, None)
        except Exception as error:
            self._settle(document, error)
        finally:
            self._leases.discard(lease)

    def _settle(self, document: Document, error: Exception | None) -> None:
        """Record the error on the document, or return it to the queue without one. If that fails, the lease expires."""
        try:
            if error is None:
                self._store.release_lease(document.id, self.worker_id, version=document.version)
                return
            code, message, retryable, page = _describe(error)
            if isinstance(error, _STORAGE_FAULTS):  # not the document's fault: it waits until storage works again
                self._store.postpone_document(
                    *(document.id, code, message, _NO_ROOM_PAUSE_S), version=document.version, worker_id=self.worker_id
                )
                _LOG.warning("document %s version %d waits: %s", document.id, document.version, message)
                return
            self._store.fail_document(
                *(document.id, code, message, retryable, page), version=document.version, worker_id=self.worker_id
            )
            _LOG.log(
                logging.ERROR if code == "internal_error" else logging.WARNING,
                *("document %s version %d failed: %s: %s", document.id, document.version, code, message),
                exc_info=error if code == "internal_error" else None,
            )
        except LeaseLost as lost:  # deleted or replaced meanwhile; or it was ready before the error
            gone = isinstance(error, ParseError)  # its file was deleted while a parser was reading it
            _LOG.info("dropped: %s", lost, exc_info=None if gone else error)
        except Exception as problem:
            self._complain(f"cannot write the end of document {document.id}; it is taken up after its lease", problem)

    def _check(self, lease: _Lease) -> None:
        if lease.lost.is_set():
            raise LeaseLost(f"the lease on document {lease.document.id} was lost")
        if self._stopping.is_set():
            raise _Stopping

    def _beat(self) -> None:
        while not self._stopping.wait(self._lease_s / 3):
            for lease in self._leases.copy():
                self._renew(lease)

    def _renew(self, lease: _Lease) -> None:
        document = lease.document
        try:
            self._store.renew_lease(document.id, self.worker_id, self._lease_s, version=document.version)
        except LeaseLost:
            lease.lost.set()  # also if it has just been finished, which does no harm
        except Exception as error:
            self._complain(f"cannot renew the lease on document {document.id}; trying again", error)

    def _complain(self, what: str, error: Exception) -> None:
        """Log what failed; unwritable storage, which fails again and again, only once a minute."""
        if not isinstance(error, _STORAGE_FAULTS):
            _LOG.error(what, exc_info=error)
        elif (now := time.monotonic()) >= self._silent_until:
            self._silent_until = now + _STORAGE_SILENCE_S
            _LOG.warning("%s: %s", what, error)


def _describe(error: Exception) -> tuple[str, str, bool, int | None]:
    """(code, message, whether to retry, page)"""
    match error:
        case ParseError():
            return error.code, str(error), error.retryable, error.page
        case StorageFull():
            return "storage_full", str(error), True, None
        case StorageBusy():
            return "storage_busy", str(error), True, None
        case StorageUnwritable():
            return "storage_not_writable", str(error), True, None
        case EmbedderMismatch():
            return "embedder_mismatch", str(error), False, None
        case _:
            return "internal_error", f"{type(error).__name__}: {str(error)[:500]}", True, None

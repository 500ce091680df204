"""A DocumentStore with callbacks for ingestion: duration of each stage, outcomes, replaced versions."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from retrieval.store import DocumentStore
from retrieval.types import Chunk, Document, IndexChange, ParsedDocument, Stage


class ObservedStore(DocumentStore):
    """Calls `on_replaced(document id, unused originals)` when a new version has replaced an old one, `on_stage(stage,
    seconds)` when a version leaves a stage (including `queued`), and `on_ingested(outcome)` when one is ready or has
    failed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.on_replaced: Callable[[str, Sequence[str]], None] = lambda document_id, originals: None
        self.on_stage: Callable[[str, float], None] = lambda stage, seconds: None
        self.on_ingested: Callable[[str], None] = lambda outcome: None
        self._working = threading.local()  # `stage`: (stage of this thread's document, start)

    def lease_next(self, worker_id: str, lease_s: float, max_bytes: int | None = None) -> Document | None:
        self._working.stage = None  # of a previous, abandoned document
        document = super().lease_next(worker_id, lease_s, max_bytes)
        if document is not None and document.attempts == document.version == 1:
            self.on_stage("queued", max(0.0, time.time() - document.created_at))
        return document

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
        super().set_progress(document_id, stage, done, total, unit, version=version, worker_id=worker_id)
        self._enter(stage)

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
        change = super().replace_chunks(
            document_id, parsed, chunks, vectors, embedder_name, version=version, worker_id=worker_id
        )
        self._enter(None)
        self.on_ingested("ready")
        if change.removed:
            self.on_replaced(document_id, change.originals)
        return change

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
        document = super().fail_document(
            document_id, code, message, retryable, page, version=version, worker_id=worker_id
        )
        self._enter(None)
        if document.status == "failed":
            self.on_ingested("failed")
        return document

    def _enter(self, stage: str | None) -> None:
        """Begin `stage` (None: none), and end the previous one, if any."""
        before, now = getattr(self._working, "stage", None), time.perf_counter()
        if before and before[0] == stage:
            return
        self._working.stage = stage and (stage, now)
        if before:
            self.on_stage(before[0], now - before[1])

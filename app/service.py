"""RagService: the operations of the service, independent of HTTP. Start at `submit_document` and `start_answer`.

It checks rights and calls ingest, retrieval and model. Blocking work runs in worker threads; the model has its own.
"""

import difflib
import logging
import threading
import unicodedata
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from app.advice import Advice
from app.auth import Principal
from app.conversation import Turn
from app.errors import InvalidRequest, QuestionTooLong
from app.evidence import EvidenceFinder, Query
from app.generation import RunningAnswer
from app.limits import CollectionFull, Meter
from app.metrics import Gauges, Metrics
from app.pace import Pace
from app.prefetch import Prefetch
from app.prompting import AnswerFormat
from app.schemas import AnswerRequest
from app.setting_groups import AnswerSettings
from app.tracing import Tracing
from ingest.files import MAX_FILENAME_CHARS, FileStore, clean_filename
from ingest.sniff import SNIFF_BYTES, sniff_media_type
from model.engine_thread import EngineThread
from model.engine_times import EngineTimes
from model.prefix_cache import PrefixCache
from retrieval.index import VectorIndex
from retrieval.store import CollectionNotFound, DocumentNotFound, DocumentStore
from retrieval.types import Collection, Document, Hit, OnConflict, SearchParams
from retrieval.words import WordIndex

log = logging.getLogger(__name__)

MAX_QUESTION_CHARS = 4_000_000  # earlier turns included
_MODEL_TOKENS_PER_TOKEN = 1.4  # tokens of the answering model per token of the embedder: its vocabulary is smaller
_TOKENS_PER_DOCUMENT = 40  # added in a prompt before and after each document


@dataclass(frozen=True)
class ReceivedFile:
    """An upload whose bytes are on disk."""

    filename: str
    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Scope:
    """What a request is about: visible collections, in canonical order, possibly limited to some documents."""

    collections: list[str]
    document_ids: list[str] | None


@dataclass
class RagService:
    """Built once by main.py; its components live as long as it does. `salt` is the secret that salts the cache keys of
    states; `checks` are the checks behind /readyz."""

    store: DocumentStore
    files: FileStore
    index: VectorIndex
    words: WordIndex
    finder: EvidenceFinder
    engine: EngineThread
    cache: PrefixCache
    engine_times: EngineTimes
    format: AnswerFormat
    metrics: Metrics
    tracing: Tracing
    meter: Meter
    settings: AnswerSettings
    advice: Advice
    model_name: str
    has_reranker: bool
    max_question_tokens: int  # 0: any
    salt: bytes
    wake_workers: Callable[[], None]
    checks: Mapping[str, Callable[[], str]]

    def __post_init__(self) -> None:
        self._files_lock = threading.Lock()  # held from deciding that nobody needs some bytes to deleting them
        self._running_lock = threading.Lock()
        self.replies_lock = threading.Lock()  # for requests with an Idempotency-Key, which may arrive twice at once
        self._running: weakref.WeakSet[RunningAnswer] = weakref.WeakSet()
        self._pace = Pace(self.settings.max_pending, self.settings.max_wait_s)
        self._whole: dict[str, tuple[int, bool]] = {}  # collection -> (store generation, `reads_whole`)
        self.metrics.answers_pending.set_function(lambda: self.answers_pending)
        self.prefetch = Prefetch(self)

    # Uploads

    def submit_document(
        self,
        received: ReceivedFile,
        collection: str,
        metadata: Mapping[str, object],
        on_conflict: OnConflict,
        max_documents: int = 0,
    ) -> tuple[Document, bool]:
        """Queue a stored upload for ingestion; returns the document and whether there is new work to do.

        From here on the document survives any crash. The caller holds its file. Blocks. Raises CollectionFull if the
        collection already has `max_documents` (0: no limit) and this is not one of them.
        """
        with self._files_lock:
            filename, media_type = self._inspect(received)
            if max_documents:
                self._check_room(collection, max_documents, received.sha256)
            return self.store.create_document(
                collection, filename, media_type, received.nbytes, received.sha256, metadata, on_conflict
            )

    def submit_version(
        self, document: Document, received: ReceivedFile, metadata: Mapping[str, object] | None
    ) -> tuple[Document, bool]:
        """Queue a new version of a document, like `submit_document`; the old one is used until the new one is ready."""
        with self._files_lock:
            filename, media_type = self._inspect(received)
            before = self.store.get_document(document.id).sha256
            submitted = self.store.replace_document(
                document.id, filename, media_type, received.nbytes, received.sha256, metadata
            )
        self._drop_unused([before])  # of a version that was still being ingested
        return submitted

    def _inspect(self, received: ReceivedFile) -> tuple[str, str]:
        """(displayed name, media type). Raises InvalidRequest, EmptyFile, UnsupportedMediaType."""
        filename = check_filename(received.filename)
        with self.files.open(received.sha256) as file:
            return filename, sniff_media_type(file.read(SNIFF_BYTES), filename)

    def _check_room(self, collection: str, max_documents: int, sha256: str) -> None:
        counts = self.store.get_collection(collection)
        if counts.documents + counts.pending + counts.failed < max_documents:
            return
        there = self.store.list_documents([collection], None, max_documents, None)
        if len(there) == max_documents and all(document.sha256 != sha256 for document in there):
            raise CollectionFull(
                f"collection {collection!r} holds {max_documents} documents, which is this key's limit; delete some"
            )

    def release_files(self, digests: Iterable[str]) -> None:
        """Stop holding received files; those that no document needs by now are deleted. Blocks."""
        digests = list(digests)
        for sha256 in digests:
            self.files.release(sha256)
        self._drop_unused(digests)

    def _drop_unused(self, digests: Iterable[str]) -> None:
        with self._files_lock:
            for sha256 in digests:
                if not self.store.file_in_use(sha256):
                    self.files.delete(sha256)

    # Documents

    def visible_document(self, document_id: str, principal: Principal) -> Document:
        """The newest version. Raises DocumentNotFound, also if the key may not see its collection. Blocks."""
        document = self.store.get_document(document_id)
        if not principal.may_see(document.collection):
            raise DocumentNotFound(f"there is no document {document_id[:80]!r}")
        return document

    def check_visible(self, document_id: str, principal: Principal) -> None:
        """Like `visible_document`, but also accepts a document deleted within the last day."""
        if not principal.may_see(self.store.collection_of(document_id)):
            raise DocumentNotFound(f"there is no document {document_id[:80]!r}")

    def visible_collection(self, name: str, principal: Principal) -> str:
        """`name`, if it exists and the key may see it; otherwise raises CollectionNotFound. Blocks."""
        with suppress(CollectionNotFound):
            if principal.may_see(name):
                return self.store.get_collection(name).name
        return self.visible_collections([name], principal)[0]

    def visible_collections(self, names: Sequence[str] | None, principal: Principal) -> list[str]:
        """The collections that a request names (None: all that the key may see), in canonical order. Blocks."""
        existing = principal.visible(collection.name for collection in self.store.list_collections())
        if names is None:
            return existing
        if missing := [name for name in names if name not in existing]:
            nearest = difflib.get_close_matches(missing[0][:80], existing, n=1)
            advice = f"the nearest is {nearest[0]!r}" if nearest else "GET /v1/collections lists them, POST makes one"
            raise CollectionNotFound(f"there is no collection {missing[0][:80]!r}; {advice}")
        return [name for name in existing if name in names]

    def delete_document(self, document: Document) -> None:
        """Delete a document and everything derived from it: afterwards no search, answer or cached state contains it.

        Blocks. After a crash in between, `recover` completes it.
        """
        self.store.hide_document(document.id)
        self._forget([document.id])
        self._drop_unused(self.store.delete_document(document.id).originals)

    def delete_collection(self, name: str) -> None:
        """Delete a collection and all its documents, each like `delete_document`. Blocks."""
        change = self.store.delete_collection(name)
        self._forget(change.documents)
        self._drop_unused(change.originals)

    def recover(self) -> None:
        """After a crash: complete interrupted deletes, free leased documents, remove unneeded originals. Blocks.

        Called once, before any worker starts: only this process uses the data directory, so all leases are stale.
        """
        self.store.end_leases()
        while deleting := self.store.list_documents(status="deleting"):
            for document in deleting:
                self.delete_document(document)
        if documents := self.store.to_forget():
            self._forget(documents)
        self._drop_unused(path.name for path in self.files.directory.iterdir() if len(path.name) == 64)

    def on_replaced(self, document_id: str, originals: Sequence[str]) -> None:
        """A new version has replaced the old one: delete everything derived from the old one. Blocks."""
        self._forget([document_id])
        self._drop_unused(originals)

    def _forget(self, document_ids: Sequence[str]) -> None:
        """Remove content that the store no longer has from the indexes, running answers and cached states."""
        gone = frozenset(document_ids)
        self.index.catch_up(self.store)
        with self._running_lock:
            for answer in self._running:
                answer.lose(gone)
        self.prefetch.forget(gone)
        self.finder.forget(gone)
        self.format.forget(gone)  # last: running answers repeat it for what they were just reading
        self.cache.invalidate(gone)
        self.store.forgotten(document_ids)

    # Questions

    def read_scope(
        self, collections: Sequence[str] | None, document_ids: Sequence[str] | None, principal: Principal
    ) -> Scope:
        """The collections and documents that a request is about, limited to what the key may see. Blocks.

        Without collections, those of the named documents are meant. Raises CollectionNotFound, DocumentNotFound.
        """
        if document_ids is None:
            return Scope(self.visible_collections(collections, principal), None)
        documents = [self.visible_document(document_id, principal) for document_id in document_ids]
        if collections is None:
            collections = sorted({document.collection for document in documents})
        return Scope(self.visible_collections(collections, principal), list(document_ids))

    def read_query(self, body: AnswerRequest, principal: Principal) -> Query:
        """The validated question of a request; checks rights and limits. Blocks.

        Raises InvalidRequest, QuestionTooLong, ContextTooLong, RateLimited, and what `read_scope` raises.
        """
        self.meter.admit_answer(principal)
        if (body.question is None) == (body.messages is None):
            raise InvalidRequest("send either question or messages")
        if body.messages is not None and body.messages[-1].role != "user":
            raise InvalidRequest("the last of messages must be the user's: it is the question")
        length = len(body.question or "") + sum(len(message.content) for message in body.messages or ())
        if length > MAX_QUESTION_CHARS:
            raise QuestionTooLong(
                f"the question has {length} characters, the limit is {MAX_QUESTION_CHARS}; shorten it"
            )
        scope = self.read_scope(body.collections, body.document_ids, principal)
        messages = [Turn(m.role, m.content) for m in body.messages or () if m.role != "system"]
        question = messages[-1].text if messages else body.question or ""
        if not any(map(str.isalnum, question)):
            raise InvalidRequest("the question has neither a word nor a number; say what is asked about")
        query = Query(
            question=question,
            collections=scope.collections,
            document_ids=scope.document_ids,
            filters=body.filters,
            mode=body.mode,
            max_evidence_tokens=body.max_evidence_tokens,
            max_output_tokens=body.max_output_tokens or self.settings.max_output_tokens,
            temperature=body.temperature,
            seed=body.seed,
            turns=messages[:-1],
            principal=principal,
        )
        self._check_length(query)
        return query

    def _check_length(self, query: Query) -> None:
        """Raises InvalidRequest if reading the question would take minutes, ContextTooLong if it does not fit."""
        limit = self.max_question_tokens
        tokens = self.format.count_prompt(query.question) - self.format.count_prompt("")
        if limit and tokens > limit:
            self.format.room_for_evidence(query.question, query.max_output_tokens, query.turns)
            raise InvalidRequest(
                f"the question has {tokens} tokens, the limit is {limit} (JAMBA_RAG_ANSWERS__MAX_QUESTION_TOKENS); "
                "shorten it, or upload the text as a document and ask about that"
            )

    def fits_context(self, collection: Collection) -> bool:
        """Whether the whole collection fits one prompt: a conservative estimate, as `tokens` are the embedder's."""
        estimate = _MODEL_TOKENS_PER_TOKEN * collection.tokens + _TOKENS_PER_DOCUMENT * collection.documents
        return estimate <= self.finder.whole_budget()

    def reads_whole(self, collection: Collection) -> bool:
        """Whether `auto` takes the whole collection for a short question with default settings. Blocks."""
        if collection.tokens > 2 * self.finder.whole_budget("auto"):
            return False
        generation = self.store.generation()
        if (known := self._whole.get(collection.name)) is None or known[0] != generation:
            try:
                whole = self.finder.read_whole(collection.name) is not None
            except CollectionNotFound:  # deleted meanwhile
                return False
            known = self._whole[collection.name] = generation, whole
        return known[1]

    def check_ready(self) -> dict[str, str]:
        """Each component that an answer needs -> "ok", possibly followed by details, or what is wrong. Blocks."""
        return {name: check() for name, check in self.checks.items()}

    def read_gauges(self) -> Gauges:
        """Current numbers for the metrics. Blocks."""
        cache, tiers = self.cache.stats()
        collections = self.store.list_collections()
        return Gauges(
            documents={
                "ready": sum(collection.documents for collection in collections),
                "pending": sum(collection.pending for collection in collections),
                "failed": sum(collection.failed for collection in collections),
            },
            chunks=self.index.count,
            chunks_without_words=self.words.missing,
            prefix_cache=asdict(cache),
            state_stores=tiers,
            draft_tokens=asdict(self.engine_times.drafts),
            engine_seconds=self.engine_times.seconds,
            engine_done=self.engine_times.done,
        )

    def search(self, query: str, collections: Sequence[str], params: SearchParams) -> list[Hit]:
        """The best chunks for a query. Blocks."""
        return self.finder.search(query, collections, params)

    async def start_answer(self, query: Query) -> RunningAnswer:
        """Admit a question, search and pack its evidence; whatever can be refused is refused here.

        Iterate `events` or await `collect` on the result; closing either stops the generation. Raises Overloaded, and
        what `EvidenceFinder.find` raises.
        """
        answer = RunningAnswer(self, query)
        with self._running_lock:
            answer.admitted = self._pace.admit(len(self._running))
            self._running.add(answer)
        try:
            found = await answer.prepare()
            await self.prefetch.give_way(found.evidence)
        except BaseException:
            self.end_answer(answer)
            raise
        return answer

    @property
    def answers_pending(self) -> int:
        """Number of running and waiting answers."""
        with self._running_lock:
            return len(self._running)

    def end_answers_to(self, key_id: str) -> None:
        """A key was revoked: its running answers end with an error."""
        with self._running_lock:
            for answer in self._running:
                answer.lose_key(key_id)

    def end_answer(self, answer: RunningAnswer) -> None:
        """Release the place of an answer that has finished or was abandoned."""
        with self._running_lock:
            if answer.completed and answer in self._running:
                self._pace.finish(answer.admitted, len(self._running))
            self._running.discard(answer)
        if answer.lost:
            self.format.forget(answer.lost)  # it may have tokenized some after the others forgot them


def check_filename(name: str) -> str:
    """The file name as stored and displayed. Raises InvalidRequest if it is too long or looks like a path."""
    if len(name) > MAX_FILENAME_CHARS:
        raise InvalidRequest(f"the file name has {len(name)} characters, the limit is {MAX_FILENAME_CHARS}; shorten it")
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise InvalidRequest(f"the file name {name!r} has control characters; rename the file")
    if ".." in name.replace("\\", "/").split("/"):
        raise InvalidRequest(f"the file name {name!r} leads out of its folder; send the bare name")
    return clean_filename(name)

"""The pipeline and its workers on a real store, index and embedder."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import docx
import numpy as np
import pytest
from clock_kit import Clock

from ingest import pipeline
from ingest.files import FileStore
from ingest.jobs import IngestWorker
from ingest.parse import ParseError
from ingest.pipeline import IngestLimits, Job, ingest_document
from ingest.sniff import DOCX, PDF
from retrieval.embedder import MiniLMEmbedder
from retrieval.index import FaissIndex, open_index
from retrieval.store import DocumentStore, LeaseLost, StorageFull
from retrieval.types import Document, Progress

T = TypeVar("T")

DATA = Path(__file__).parent / "data"
TEXT = "The tide turns at noon.\n\nThe harbour closes at six."


class GatedEmbedder(MiniLMEmbedder):
    """The real embedder, with a gate before each call: a test decides what happens while a document is in work."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.open = threading.Event()
        self.error: Exception | None = None
        self.holds: Callable[[Sequence[str]], bool] = lambda texts: True

    def embed_passages(self, texts: Sequence[str]) -> np.ndarray:
        if not self.holds(texts):
            return super().embed_passages(texts)
        self.entered.set()
        assert self.open.wait(30)
        if self.error is not None:
            raise self.error
        return super().embed_passages(texts)


@dataclass
class Place:
    store: DocumentStore
    index: FaissIndex
    files: FileStore
    clock: Clock

    def upload(self, content: bytes, media_type: str = "text/plain", name: str = "notes.txt") -> Document:
        sha256, nbytes = self.files.save_stream([content], 1 << 20)
        document, _ = self.store.create_document("default", name, media_type, nbytes, sha256)
        return document

    def wait(self, document_id: str, *statuses: str) -> Document:
        return wait_for(
            lambda: document if (document := self.store.get_document(document_id)).status in statuses else None
        )

    def texts(self, document_id: str) -> list[str]:
        return [chunk.text for chunk in self.store.get_chunks(document_id)]


def wait_for(look: Callable[[], T]) -> T:
    for _ in range(3000):
        if found := look():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen within 30 s")


@pytest.fixture(scope="module")
def embedder() -> MiniLMEmbedder:
    return MiniLMEmbedder()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    clock = Clock(1_700_000_000.0)
    store = DocumentStore(tmp_path / "rag.sqlite3", max_attempts=2, clock=clock)
    index = open_index(store, tmp_path / "faiss", MiniLMEmbedder.dim, MiniLMEmbedder.name)
    place = Place(store, index, FileStore(tmp_path / "files"), clock)
    yield place
    for opened in {store, place.store}:  # after the workers have stopped
        opened.close()


@pytest.fixture
def start(place: Place, embedder: MiniLMEmbedder) -> Iterator[Callable[..., IngestWorker]]:
    """Starts workers, and stops them in the end."""
    workers = []

    def start_worker(embedder: MiniLMEmbedder = embedder, **options: float) -> IngestWorker:
        options = {"poll_s": 0.02, "small_bytes": 0, **options}
        workers.append(IngestWorker(place.store, place.index, embedder, place.files, **options))
        workers[-1].start()
        return workers[-1]

    yield start_worker
    assert all(worker.stop() for worker in workers)


@pytest.fixture
def gated() -> Iterator[GatedEmbedder]:
    embedder = GatedEmbedder()
    yield embedder
    embedder.open.set()


def test_an_upload_becomes_chunks_that_are_found(place, embedder):
    document = place.upload(TEXT.encode())
    leased = place.store.lease_next("me", 60)
    assert ingest_document(Job(leased, place.store, "me"), place.index, embedder, place.files) == 1
    done = place.store.get_document(document.id)
    assert (done.status, done.chunks, done.pages) == ("ready", 1, None)
    assert place.texts(document.id) == [TEXT]
    rows, scores = place.index.search(embedder.embed_query("When does the harbour close?"), 5)
    assert scores[0] > 0.4
    assert place.store.load_hits(rows.tolist())[rows[0]].document_id == document.id


def test_a_full_disk_is_no_fault_of_the_documents_that_wait(place, start, monkeypatch):
    full, room = (type("Usage", (), {"total": 1 << 40, "free": free}) for free in (0, 1 << 39))
    document = place.upload(TEXT.encode())
    monkeypatch.setattr("ingest.files.shutil.disk_usage", lambda _: full)
    start()
    for _ in range(10):
        place.clock.now += 31
        wait_for(lambda: (d := place.store.get_document(document.id)).updated_at == place.clock.now and not d.attempts)
        assert place.wait(document.id, "queued").last_error.code == "storage_full"
    monkeypatch.setattr("ingest.files.shutil.disk_usage", lambda _: room)
    place.clock.now += 31
    assert place.wait(document.id, "ready", "failed").status == "ready"


def test_a_disk_without_any_room_does_not_fill_the_log(place, start, monkeypatch, caplog):
    asked = []

    def no_room(*_: object) -> None:
        asked.append(1)
        raise StorageFull("no room on the disk; free some and try again")

    monkeypatch.setattr(place.store, "lease_next", no_room)
    start()
    wait_for(lambda: len(asked) > 20)
    told = [record for record in caplog.records if record.name == "ingest.jobs"]
    assert [(record.levelname, record.exc_info) for record in told] == [("WARNING", None)]
    assert "free some" in told[0].getMessage()


def test_doing_it_again_changes_nothing(place, embedder):
    document = place.upload(TEXT.encode())
    limits = IngestLimits(embed_batch=1)
    first = None
    for _ in range(2):
        leased = place.store.lease_next("me", 60) or place.store.get_document(document.id)
        worker = "me" if first is None else None
        ingest_document(Job(leased, place.store, worker), place.index, embedder, place.files, limits)
        first = first or place.store.get_chunks(document.id)
    assert place.store.get_chunks(document.id) == first


def test_the_work_can_be_ended_while_a_long_text_is_cut(place, embedder):
    document = place.upload(b"A paragraph of its own.\n\n" * 30)
    seen: list[str] = []
    leased = place.store.lease_next("me", 60)
    job = Job(leased, place.store, "me", check=lambda: seen.append(place.store.get_document(document.id).status))
    ingest_document(job, place.index, embedder, place.files)
    assert seen.count("chunking") > 30  # asked at each paragraph


def test_says_how_much_of_a_long_text_is_cut(place, embedder, monkeypatch):
    monkeypatch.setattr(pipeline, "_PROGRESS_EVERY_S", 0.0)
    document = place.upload(b"A paragraph of its own.\n\n" * 30)
    seen: list[Progress] = []
    leased = place.store.lease_next("me", 60)
    job = Job(leased, place.store, "me", check=lambda: seen.append(place.store.get_document(document.id).progress))
    ingest_document(job, place.index, embedder, place.files)
    cut = [progress for progress in seen if progress.stage == "chunking"]
    assert {(one.total, one.unit) for one in cut} == {(750, "characters")}
    assert sorted(one.done for one in cut) == [one.done for one in cut] and 650 < cut[-1].done < 750


def test_a_worker_takes_what_is_queued_and_is_woken(place, start):
    early = place.upload(b"Queued before the start.")
    worker = start(poll_s=60.0)
    place.wait(early.id, "ready")
    late = place.upload(b"Queued afterwards.")
    worker.notify()
    assert place.wait(late.id, "ready").attempts == 1


def test_bad_files_fail_with_a_reason_and_the_rest_goes_on(place, start, tmp_path):
    docx.Document().save(str(tmp_path / "empty.docx"))
    bad = {
        "encrypted_pdf": place.upload((DATA / "encrypted.pdf").read_bytes(), PDF),
        "broken_docx": place.upload(b"PK\x03\x04 garbage", DOCX),
        "empty_document": place.upload((tmp_path / "empty.docx").read_bytes(), DOCX),
        "undecodable_text": place.upload(b"text \x00 and bytes"),
        "file_missing": place.upload(b"soon gone"),
    }
    place.files.delete(bad["file_missing"].sha256)
    good = place.upload(b"A good file.")
    start(threads=2)
    for code, document in bad.items():
        failed = place.wait(document.id, "failed")
        assert (failed.last_error.code, failed.last_error.retryable, failed.attempts) == (code, False, 1)
        assert failed.last_error.message
    assert place.wait(good.id, "ready").chunks == 1


def test_a_small_file_does_not_wait_for_large_ones(place, start, gated):
    gated.holds = lambda texts: "whale" in texts[0]
    whales = [place.upload(f"whale {number} ".encode() * 400) for number in range(2)]
    start(gated, small_bytes=1000)
    assert gated.entered.wait(30)
    assert place.wait(place.upload(TEXT.encode()).id, "ready").chunks == 1
    assert [place.store.get_document(whale.id).status for whale in whales] == ["embedding", "queued"]
    gated.open.set()
    for whale in whales:
        place.wait(whale.id, "ready")


def test_without_threads_nothing_is_ingested(place, start):
    document = place.upload(TEXT.encode())
    worker = start(threads=0, small_bytes=1000)
    assert worker._threads == [] and place.store.get_document(document.id).status == "queued"


def test_the_document_of_a_dead_worker_is_taken_over_when_its_lease_has_run_out(place, start):
    document = place.upload(TEXT.encode())
    assert place.store.lease_next("dead", 60).id == document.id
    place.store.set_progress(document.id, "embedding", 1, 2, "chunks", version=1, worker_id="dead")
    worker = start()
    next_one = place.upload(b"Another.")
    place.wait(next_one.id, "ready")  # the worker runs, and leaves the leased one alone
    assert place.store.get_document(document.id).status == "embedding"
    place.clock.now += 61
    worker.notify()
    assert place.wait(document.id, "ready").attempts == 2
    assert place.texts(document.id) == [TEXT]


def test_stop_hands_the_document_back_without_counting_the_attempt(place, start, gated):
    document = place.upload(TEXT.encode())
    worker = start(gated)
    assert gated.entered.wait(30)
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    assert place.store.get_document(document.id).status == "embedding"
    wait_for(lambda: worker._stopping.is_set())
    gated.open.set()
    stopping.join(30)
    stopped = place.store.get_document(document.id)
    assert (stopped.status, stopped.attempts) == ("queued", 0)
    start(gated)
    assert place.wait(document.id, "ready").attempts == 1


def test_a_replaced_upload_is_dropped_and_its_successor_ingested(place, start, gated):
    document = place.upload(b"Old words.")
    start(gated)
    assert gated.entered.wait(30)
    sha256, nbytes = place.files.save_stream([b"New words."], 100)
    place.store.replace_document(document.id, "notes.txt", "text/plain", nbytes, sha256)
    gated.open.set()
    done = place.wait(document.id, "ready")
    assert (done.version, place.texts(document.id)) == (2, ["New words."])


def test_a_deleted_document_stays_deleted(place, start, gated):
    document = place.upload(b"Soon gone.")
    start(gated)
    assert gated.entered.wait(30)
    place.store.delete_document(document.id)
    gated.open.set()
    other = place.upload(b"Stays.")
    place.wait(other.id, "ready")
    assert place.store.list_documents() == [place.store.get_document(other.id)]
    assert place.store.count_chunks() == 1


@pytest.mark.parametrize("error", [RuntimeError("wrong"), ParseError("parser_crashed", "its file is gone")])
def test_a_document_that_is_deleted_while_it_is_read_has_not_failed(place, start, gated, caplog, error):
    document = place.upload(b"Soon gone.")
    gated.error = error
    caplog.set_level("INFO")
    start(gated)
    assert gated.entered.wait(30)
    place.store.delete_document(document.id)
    gated.open.set()
    wait_for(lambda: "dropped" in caplog.text)
    assert ("Traceback" in caplog.text) == isinstance(error, RuntimeError)
    assert "failed" not in caplog.text


def test_an_error_after_the_document_is_ready_is_told(place, start, gated, caplog, monkeypatch):
    def fail(source):
        raise RuntimeError("the index is stuck")

    monkeypatch.setattr(place.index, "catch_up", fail)
    caplog.set_level("INFO")
    gated.open.set()
    start(gated)
    place.wait(place.upload(TEXT.encode()).id, "ready")
    wait_for(lambda: "the index is stuck" in caplog.text)


def test_errors_of_our_own_are_tried_again_a_bounded_number_of_times(place, start, gated):
    document = place.upload(TEXT.encode())
    gated.error = RuntimeError("out of luck")
    gated.open.set()
    start(gated)
    wait_for(lambda: place.store.get_document(document.id).last_error)
    place.clock.now += 100  # the pause before the second attempt
    failed = place.wait(document.id, "failed")
    assert (failed.attempts, failed.last_error.code) == (2, "internal_error")
    assert failed.last_error.message == "RuntimeError: out of luck"
    gated.error = None
    place.store.retry_document(document.id)
    assert place.wait(document.id, "ready").last_error is None


class BeatingStore(DocumentStore):
    """Counts renewals of leases."""

    renewed = 0

    def renew_lease(self, document_id: str, worker_id: str, lease_s: float, *, version: int) -> None:
        super().renew_lease(document_id, worker_id, lease_s, version=version)
        self.renewed += 1


def test_the_heartbeat_keeps_the_lease_of_a_long_job(place, start, gated, tmp_path):
    place.store = BeatingStore(tmp_path / "rag.sqlite3", clock=place.clock)
    document = place.upload(TEXT.encode())
    start(gated, lease_s=0.3)
    assert gated.entered.wait(30)
    for _ in range(3):
        place.clock.now += 0.29
        beats = place.store.renewed
        wait_for(lambda beats=beats: place.store.renewed > beats + 1)
        assert place.store.lease_next("thief", 60) is None
    gated.open.set()
    assert place.wait(document.id, "ready").attempts == 1


def test_a_lost_lease_ends_the_work_without_a_trace(place, gated):
    document = place.upload(TEXT.encode())
    leased = place.store.lease_next("slow", 60)
    place.clock.now += 61
    assert place.store.lease_next("fast", 60).id == document.id
    with pytest.raises(LeaseLost):
        ingest_document(Job(leased, place.store, "slow"), place.index, gated, place.files)
    assert place.store.get_document(document.id).status == "queued"


def test_what_does_not_stop_in_time_is_handed_back_and_comes_too_late(place, start, gated):
    document = place.upload(TEXT.encode())
    worker = start(gated)
    assert gated.entered.wait(30)
    assert not worker.stop(0.1)
    waiting = place.store.get_document(document.id)
    assert (waiting.status, waiting.attempts) == ("queued", 0)
    gated.open.set()
    assert worker.stop()
    assert place.store.get_document(document.id).status == "queued"
    start()
    done = place.wait(document.id, "ready")
    assert done.attempts == 1

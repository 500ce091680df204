"""Leases and crashes: what is accepted ends ready or failed, also when a worker dies at the worst moment."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args

import pytest
from clock_kit import Clock
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from retrieval_kit import HashEmbedder, add, ingest, queue, sha

from retrieval.clock import ForwardClock
from retrieval.index import open_index
from retrieval.search import Retriever
from retrieval.store import DocumentNotFound, DocumentStore, LeaseLost
from retrieval.types import SearchMode, SearchParams
from retrieval.words import open_words


@pytest.fixture
def clock():
    return Clock(1_000.0)


@pytest.fixture
def store(tmp_path, clock):
    store = DocumentStore(tmp_path / "rag.sqlite3", max_attempts=3, clock=clock)
    yield store
    store.close()


def test_oldest_first_and_each_once(store):
    first, second = queue(store, "first"), queue(store, "second")
    leased = store.lease_next("a", 60)
    assert (leased.id, leased.attempts, leased.status) == (first.id, 1, "queued")
    assert store.lease_next("b", 60).id == second.id
    assert store.lease_next("c", 60) is None


def test_progress_is_seen_and_ends_ready(store):
    document = queue(store, "one two")
    store.lease_next("a", 60)
    store.set_progress(document.id, "parsing", 3, 7, "pages", version=1, worker_id="a")
    seen = store.get_document(document.id)
    assert seen.status == seen.progress.stage == "parsing"
    assert (seen.progress.done, seen.progress.total, seen.progress.unit) == (3, 7, "pages")
    ingest(store, document, "one two", worker_id="a")
    assert store.get_document(document.id).status == "ready"
    assert store.lease_next("a", 60) is None


def test_expired_lease_goes_to_the_next_and_the_first_is_told(store, clock):
    document = queue(store, "text")
    store.lease_next("slow", 60)
    store.set_progress(document.id, "embedding", version=1, worker_id="slow")
    clock.now += 30
    store.renew_lease(document.id, "slow", 60, version=1)
    clock.now += 45
    assert store.lease_next("quick", 60) is None  # renewed in time
    clock.now += 15
    assert store.lease_next("quick", 60).attempts == 2
    for late in (
        lambda: store.renew_lease(document.id, "slow", 60, version=1),
        lambda: store.release_lease(document.id, "slow", version=1),
        lambda: store.set_progress(document.id, "indexing", version=1, worker_id="slow"),
        lambda: store.fail_document(document.id, "x", "y", False, version=1, worker_id="slow"),
        lambda: ingest(store, document, "text", worker_id="slow"),
        lambda: ingest(store, document, "text"),
    ):
        with pytest.raises(LeaseLost, match="not leased by"):
            late()
    ingest(store, document, "text", worker_id="quick")
    assert store.get_document(document.id).status == "ready"


def test_leases_of_a_dead_process_end_with_the_next_one_and_keep_their_attempt(store, clock):
    clock.now += 100_000
    document, paused = queue(store, "left behind"), queue(store, "paused")
    store.lease_next("dead", 3600)
    store.set_progress(document.id, "embedding", version=1, worker_id="dead")
    store.lease_next("dead", 3600)
    store.fail_document(paused.id, "timeout", "slow", True, version=1, worker_id="dead")
    clock.now -= 86_400  # and the clock was set back
    assert store.lease_next("new", 60) is None
    store.end_leases()
    assert [store.lease_next("new", 60).id for _ in range(2)] == [document.id, paused.id]
    assert store.get_document(document.id).attempts == 2
    with pytest.raises(LeaseLost, match="not leased by"):
        store.renew_lease(document.id, "dead", 60, version=1)


def test_a_version_that_always_kills_its_worker_stops(store, clock):
    document = queue(store, "poison")
    for attempt in range(1, 10):  # three for each of the attempts that errors get: kills are rarely its fault
        assert store.lease_next("w", 60).attempts == attempt
        store.set_progress(document.id, "parsing", version=1, worker_id="w")
        clock.now += 60
    assert store.lease_next("w", 60) is None
    failed = store.get_document(document.id)
    assert (failed.status, failed.last_error.code, failed.last_error.retryable) == ("failed", "too_many_attempts", True)
    assert "last while parsing" in failed.last_error.message


def test_retryable_errors_pause_then_run_out(store, clock):
    document = queue(store, "flaky")
    pauses = []
    for _ in range(2):
        store.lease_next("w", 60)
        back = store.fail_document(document.id, "timeout", "slow", True, page=3, version=1, worker_id="w")
        assert (back.status, back.last_error.page) == ("queued", 3)
        start = clock.now
        while store.lease_next("probe", 0) is None:
            clock.now += 1
        store.release_lease(document.id, "probe", version=1)
        pauses.append(clock.now - start)
    assert pauses == [2, 4]
    store.lease_next("w", 60)
    assert store.fail_document(document.id, "timeout", "slow", True, version=1, worker_id="w").status == "failed"


def test_a_second_attempt_does_not_wait_for_a_clock_that_was_set_back(tmp_path):
    wall, steady = Clock(1_000.0), Clock(1_000.0)
    store = DocumentStore(tmp_path / "rag.sqlite3", clock=ForwardClock(wall, steady))
    document = queue(store, "flaky")
    store.lease_next("w", 60)
    store.fail_document(document.id, "timeout", "slow", True, version=1, worker_id="w")
    wall.now -= 3600
    assert store.lease_next("w", 60) is None
    wall.now, steady.now = wall.now + 3, steady.now + 3
    leased = store.lease_next("w", 60)
    assert leased.id == document.id and leased.updated_at == 1_003
    wall.now += 7200  # set forward, it is followed
    store.renew_lease(document.id, "w", 60, version=1)
    assert store.get_document(document.id).updated_at == wall.now
    store.close()


def test_retry_starts_afresh_and_goes_last(store):
    document, other = queue(store, "broken"), queue(store, "other")
    store.lease_next("w", 60)
    store.fail_document(document.id, "parse_failed", "bad", False, version=1, worker_id="w")
    assert store.retry_document(other.id).ordinal == 2  # not failed: unchanged
    again = store.retry_document(document.id)
    assert (again.status, again.attempts, again.last_error, again.ordinal) == ("queued", 0, None, 3)
    assert store.lease_next("w", 60).id == document.id
    with pytest.raises(DocumentNotFound):
        store.retry_document("doc_unknown")


def test_orderly_stop_costs_no_attempt(store):
    document = queue(store, "text")
    store.lease_next("w", 60)
    store.release_lease(document.id, "w", version=1)
    assert store.lease_next("w", 60).attempts == 1


def test_replacement_takes_the_version_from_its_worker(store):
    document = queue(store, "first")
    store.lease_next("w", 60)
    store.replace_document(document.id, "b", "text/plain", 6, sha("second"))
    with pytest.raises(LeaseLost, match="superseded"):
        ingest(store, document, "first", worker_id="w")
    assert store.lease_next("w", 60).version == 2


def test_deletion_takes_the_document_from_its_worker(store):
    document = queue(store, "first")
    store.lease_next("w", 60)
    store.delete_document(document.id)
    with pytest.raises(LeaseLost, match="deleted"):
        ingest(store, document, "first", worker_id="w")
    assert store.count_chunks() == 0


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import retrieval_kit as kit
from retrieval.store import DocumentStore

class DeadlyList(list):
    "Kills the process in the middle of the transaction: chunks are iterated once to check, once to write."
    rounds = 0
    def __iter__(self):
        self.rounds += 1
        for i, chunk in enumerate(list.__iter__(self)):
            if self.rounds == 3 and i == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield chunk

store = DocumentStore({path!r}, clock=lambda: 1000.0)
chunk_paragraphs = kit.chunk_paragraphs
kit.chunk_paragraphs = lambda parsed, id: DeadlyList(chunk_paragraphs(parsed, id))
document = store.lease_next("doomed", 60)
store.set_progress(document.id, "indexing", version=document.version, worker_id="doomed")
kit.ingest(store, document, {text!r}, worker_id="doomed")
"""


def test_killed_while_writing_loses_nothing_and_writes_nothing_twice(store, clock, tmp_path):
    text = "\n\n".join(f"paragraph {i} of many" for i in range(5))
    old = add(store, "what answered before")
    new, _ = store.replace_document(old.id, "b.txt", "text/plain", len(text), sha(text))
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(tmp_path / "rag.sqlite3"), text=text)
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr

    assert store.get_text(old.id) == "what answered before"
    assert store.count_chunks() == 1
    assert store.get_document(old.id).status == "indexing"
    assert store.lease_next("w", 60) is None
    clock.now += 60
    assert store.lease_next("w", 60).attempts == 2
    ingest(store, new, text, worker_id="w")
    assert store.get_text(old.id) == text
    assert store.count_chunks() == 5
    assert store.check() == []


TEXTS = st.text("ab \n", max_size=12)


class StoreMachine(RuleBasedStateMachine):
    """Any order of uploads, replacements, failures, deletions, searches, restarts against a dictionary of what should
    answer."""

    documents = Bundle("documents")

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(os.environ["STORE_MACHINE_DIR"]) / f"{id(self)}-{os.urandom(4).hex()}.sqlite3"
        self.embedder = HashEmbedder()
        self.start()
        self.texts: list[str] = []  # that were ever sent
        self.answering: dict[str, str] = {}
        self.newest: dict[str, str] = {}
        self.failed: set[str] = set()
        self.waiting: set[str] = set()

    def start(self) -> None:
        self.store = DocumentStore(self.path)
        faiss = self.path.with_suffix(".faiss")
        self.index = open_index(self.store, faiss, self.embedder.dim, self.embedder.name)
        self.words = open_words(self.store, self.path.with_suffix(".words"))
        self.retriever = Retriever(self.store, self.index, self.embedder, words=self.words)

    @initialize(target=documents, texts=st.lists(TEXTS, min_size=2, max_size=4, unique=True))
    def begin(self, texts: list[str]) -> object:
        """With some that answer: from nothing few runs would come to search or restart with anything."""
        documents = [self.upload(text) for text in texts]
        while self.waiting:
            self.work(fails=False)
        return multiple(*documents)

    @rule(target=documents, text=TEXTS)
    def upload(self, text: str) -> str:
        self.texts.append(text)
        twins = [id for id, newest in self.newest.items() if newest == text]
        document, created = self.store.create_document("default", "a.txt", "text/plain", len(text), sha(text))
        assert created == (not twins)
        assert not twins or document.id in twins
        if created:
            self.waiting.add(document.id)
        self.newest[document.id] = text
        return document.id

    @rule(document_id=documents, text=TEXTS)
    def replace(self, document_id: str, text: str) -> None:
        if document_id not in self.newest or text in self.newest.values():
            return
        self.texts.append(text)
        self.store.replace_document(document_id, "a.txt", "text/plain", len(text), sha(text))
        self.newest[document_id] = text
        self.waiting.add(document_id)
        self.failed.discard(document_id)

    @precondition(lambda self: self.waiting)
    @rule(fails=st.sampled_from([False, False, False, True]))
    def work(self, fails: bool) -> None:
        document = self.store.lease_next("w", 60)
        assert document.id in self.waiting
        self.waiting.discard(document.id)
        if fails:
            self.store.fail_document(document.id, "x", "y", False, version=document.version, worker_id="w")
            self.failed.add(document.id)
        else:
            ingest(self.store, document, self.newest[document.id], worker_id="w")
            self.answering[document.id] = self.newest[document.id]

    @rule(document_id=documents)
    def retry(self, document_id: str) -> None:
        if document_id in self.newest:
            self.store.retry_document(document_id)
            if document_id in self.failed:
                self.waiting.add(document_id)
            self.failed.discard(document_id)

    @rule(document_id=consumes(documents), in_two_steps=st.booleans())
    def delete(self, document_id: str, in_two_steps: bool) -> None:
        if document_id not in self.newest:
            return
        if in_two_steps:
            self.store.hide_document(document_id)
        self.store.delete_document(document_id)
        del self.newest[document_id]
        self.answering.pop(document_id, None)
        self.failed.discard(document_id)
        self.waiting.discard(document_id)

    @rule(number=st.integers(0, 30))
    def search(self, number: int) -> None:
        """For a text that was sent, also one that is deleted, replaced or not yet in: who has it now is found."""
        text = self.texts[number % len(self.texts)]
        wanted = {id for id, answers in self.answering.items() if answers == text and text.strip()}
        vector = self.embedder.embed_query(text)
        for mode in get_args(SearchMode):
            hits = self.retriever.search(text, ["default"], SearchParams(max_num_results=1000, mode=mode))
            assert {hit.document_id for hit in hits if self.answering[hit.document_id] == text} == wanted
            for hit in hits:
                assert hit.chunk.text in self.answering[hit.document_id]
                dense = float(self.embedder.embed_query(hit.chunk.text) @ vector)
                assert hit.scores.get("dense", dense) == pytest.approx(dense, abs=1e-5)

    @rule(in_order=st.booleans(), number=st.integers(0, 30))
    def restart(self, in_order: bool, number: int) -> None:
        """In order, the vectors are saved as they are; killed, those that an earlier start or stop saved are there."""
        if in_order:
            self.index.save(self.path.with_suffix(".faiss"))
        self.store.close()
        del self.retriever, self.words, self.index
        self.start()
        self.search(number)

    @invariant()
    def store_and_index_hold_what_they_should(self) -> None:
        ready = self.store.ready_documents(["default"])
        assert {document.id: self.store.get_text(document.id) for document in ready} == self.answering
        assert {document.id for document in self.store.list_documents(limit=1000)} == set(self.newest)
        ordinals = [document.ordinal for document in ready]
        assert ordinals == sorted(set(ordinals))
        self.index.catch_up(self.store)
        rows, _ = self.index.search(HashEmbedder().embed_query("a"), 1000)
        hits = self.store.load_hits(rows.tolist())
        assert len(rows) == len(hits) == self.index.count == self.store.count_chunks()
        self.words.catch_up(self.store)
        assert sorted(row for row, _ in self.words.search(["txt"], 1000)) == sorted(rows.tolist())
        assert self.words.count == len(rows)
        assert {hit.document_id for hit in hits.values()} == {
            id for id, text in self.answering.items() if text.strip("\n")
        }

    def teardown(self) -> None:
        while self.waiting:
            self.work(fails=True)
        assert self.store.lease_next("w", 60) is None
        assert self.store.check() == []
        self.store.close()


def test_any_order_of_operations(tmp_path, monkeypatch):
    monkeypatch.setenv("STORE_MACHINE_DIR", str(tmp_path))
    phases = (Phase.generate, Phase.shrink)  # explaining a failure takes minutes
    run = settings(max_examples=20, stateful_step_count=25, deadline=None, phases=phases)
    run_state_machine_as_test(StoreMachine, settings=run)

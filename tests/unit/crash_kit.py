"""Kills an ingesting process at its n-th step towards the disk, for every n, and looks at what a restart makes of it.

Run as a program, it takes lines `DIR kill|full|time|fill [START STOP STEP]`. It imports all once and forks: one child
works until it meets its end, the next takes over what is left and checks it. `kill`: the child kills itself before its
n-th step: SQL that writes, a file opened for writing, a rename, a removal, before and behind the word index, which
writes its own files. `full`: no file of it can grow over n bytes.
`time`: the child uploads and deletes until it is killed, n milliseconds after it began. `fill`: n milliseconds after
it has opened two lost indexes, which are made anew behind it.
Prints a JSON line for each n and an empty one at the end, which comes early when a child came through.
"""

import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from retrieval_kit import HashEmbedder

import ingest.pipeline
import retrieval.index
import retrieval.words
from ingest.files import FileStore
from ingest.jobs import _describe
from ingest.parse import parse_file
from ingest.pipeline import Job, ingest_document
from retrieval.database import Database
from retrieval.index import FaissIndex, IndexDamaged, open_index
from retrieval.store import DocumentStore
from retrieval.words import WordIndex, open_words

OLD = "old tide words\n\nold harbour words"
NEW = "new tide words\n\nnew harbour words"
OTHER = "other mountain words\n\nother valley words"
GONE = "gone river words"
_READING = {"BEGIN", "SELECT", "ROLLBACK"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class CountingEmbedder(HashEmbedder):
    def count_tokens(self, texts):
        return [len(text.split()) + 2 for text in texts]


class Place:
    """A data directory, opened."""

    def __init__(self, folder: Path, now: float) -> None:
        self.store = DocumentStore(folder / "rag.sqlite3", clock=lambda: now)
        self.files = FileStore(folder / "files")
        self.embedder = CountingEmbedder()
        self.index = open_index(self.store, folder / "faiss", self.embedder.dim, self.embedder.name)
        self.words = open_words(self.store, folder / "words")
        self.folder = folder

    def save(self, text: str) -> tuple[int, str]:
        sha256, nbytes = self.files.save_stream([text.encode()], 1 << 20)
        return nbytes, sha256

    def create(self, text: str) -> str:
        return self.store.create_document("default", "a.txt", "text/plain", *self.save(text))[0].id

    def ingest_all(self) -> None:
        """As a worker does."""
        while document := self.store.lease_next("worker", 60):
            try:
                ingest_document(Job(document, self.store, "worker"), self.index, self.embedder, self.files)
            except Exception as error:
                code, message, retryable, page = _describe(error)
                self.store.fail_document(
                    *(document.id, code, message, retryable, page), version=document.version, worker_id="worker"
                )
        self.index.catch_up(self.store)
        self.index.save(self.folder / "faiss")
        self.words.catch_up(self.store)


class Steps:
    """Counts steps towards the disk and kills this process before the n-th."""

    def __init__(self, fatal: int) -> None:
        self._left = fatal
        connect, catch_up = Database._connection, WordIndex.catch_up

        def traced(database: Database):
            connection = connect(database)
            connection.set_trace_callback(self._trace)
            return connection

        def stepping(words: WordIndex, *args) -> bool:
            self._step()
            changed = catch_up(words, *args)
            self._step()
            return changed

        Database._connection, WordIndex.catch_up = traced, stepping
        sys.addaudithook(self._audit)

    def _trace(self, statement: str) -> None:
        if statement.split(None, 1)[0] not in _READING:  # killed there, the disk is as before the next that writes
            self._step()

    def _audit(self, event: str, values: tuple) -> None:
        if event in ("os.rename", "os.remove") or (event == "open" and values[2] & _WRITING):
            self._step()

    def _step(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def prepare(folder: Path) -> dict[str, str]:
    """What is there before: a document with an old version, and one that will be deleted."""
    place = Place(folder, 1e9)
    ids = {"replaced": place.create(OLD), "deleted": place.create(GONE)}
    place.ingest_all()
    place.store.close()
    return ids


def limit_files(nbytes: int) -> None:
    """As a full disk: writing beyond fails, and nothing else does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def work(folder: Path, ids: dict[str, str], say: Callable[[str], None]) -> None:
    """Upload, replace, delete, ingest, save; `say` tells what was promised to a client."""
    place = Place(folder, 1e9 + 1000)
    say(f"created {place.create(OTHER)}")
    place.store.replace_document(ids["replaced"], "a.txt", "text/plain", *place.save(NEW))
    say("replaced")
    place.ingest_all()
    place.store.hide_document(ids["deleted"])
    place.store.delete_document(ids["deleted"])
    say("deleted")
    place.index.catch_up(place.store)
    place.index.save(folder / "faiss")
    place.words.catch_up(place.store)


def kill_after(milliseconds: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, milliseconds / 1000)


def work_for_ever(place: Place) -> None:
    """Upload, ingest, and delete every second document; the word index follows at once."""
    number = 0
    while number := number + 1:
        document_id = place.create(f"words {number}\n\nmore words {number}")
        place.ingest_all()
        if number % 2:
            place.store.delete_document(document_id)
            place.words.catch_up(place.store)


def live(mode: str, fatal: int, folder: Path, ids: dict[str, str], say: Callable[[str], None]) -> None:
    """Do a mode's work until what `fatal` says."""
    match mode:
        case "kill":
            Steps(fatal)
            work(folder, ids, say)
        case "full":
            limit_files(fatal)
            work(folder, ids, say)
        case "time":
            kill_after(fatal)
            work_for_ever(Place(folder, 1e9 + 1000))
        case "fill":
            place = Place(folder, 1e9 + 1000)
            kill_after(fatal)
            work_for_ever(place)


def lose_indexes(folder: Path) -> None:
    """Many chunks and no index: making them is left to threads, in pieces so small that a kill comes in between."""
    place = Place(folder, 1e9 + 500)
    for number in range(60):
        place.create(f"words {number}\n\nmore words {number}")
    place.ingest_all()
    place.store.close()
    shutil.rmtree(folder / "words")
    shutil.rmtree(folder / "faiss")
    for module in (retrieval.words, retrieval.index):
        module._AT_ONCE, module._BREATH_S = 10, 0.03
    retrieval.words._PIECE, retrieval.words._COMMIT_CHUNKS = 2, 6
    DocumentStore.vectors.__defaults__ = DocumentStore.chunk_texts.__defaults__ = (4,)


def open_or_none(directory: Path) -> WordIndex | None:
    try:
        return WordIndex(directory)
    except IndexDamaged:
        return None  # which is noticed, and no harm: it is made anew


def check(folder: Path, ids: dict[str, str], said: list[str], say: Callable[[str], None]) -> None:
    """Restart, finish what is queued, and compare all of it with what was promised. Raises AssertionError."""
    left = open_or_none(folder / "words")
    retrieval.words._BREATH_S = retrieval.index._BREATH_S = 0.0
    place = Place(folder, 1e9 + 5000)  # leases have run out
    if left and left.generation != place.store.generation():
        say("words were behind")
    if left and left.missing:
        say("words were being filled")
    place.words.settle()
    place.index.settle()
    for document in place.store.list_documents(status="deleting"):
        place.store.delete_document(document.id)
    place.ingest_all()
    documents = {document.id: document for document in place.store.list_documents()}
    assert all(document.status == "ready" for document in documents.values()), documents
    texts = {name: place.store.get_text(name) for name in documents}
    if "replaced" in said:
        assert texts[ids["replaced"]] == NEW, texts
    assert texts[ids["replaced"]] in (OLD, NEW), texts
    assert ("deleted" not in said) or ids["deleted"] not in texts, texts
    for promise in said:
        if promise.startswith("created "):
            assert texts[promise.split()[1]] == OTHER, texts
    assert place.store.check() == []
    rows = [int(row) for found, _ in place.store.vectors(0, place.store.generation()) for row in found]
    stored = {row: hit.chunk.text for row, hit in place.store.load_hits(rows).items()}
    assert sorted("\n\n".join(stored[row] for row in sorted(stored)).split()) == sorted(
        " ".join(texts.values()).split()
    )
    assert len(rows) == len(set(rows)) == len(stored) == place.store.count_chunks()
    lexical = [row for row, _ in place.words.search(["words"], 99)]
    assert sorted(lexical) == sorted(rows), (lexical, rows)
    found, _ = place.index.search(place.embedder.embed_query("words"), 99)
    assert sorted(found.tolist()) == sorted(rows), (found, rows)
    assert WordIndex(folder / "words").generation == place.store.generation()
    loaded = FaissIndex.load(folder / "faiss", place.embedder.dim, place.embedder.name)
    assert (loaded.count, loaded.generation) == (len(rows), place.store.generation())
    assert not list((folder / "files").glob("upload-*"))
    place.store.close()


def in_child(job: Callable[[Callable[[str], None]], None]) -> tuple[int, list[str]]:
    """Exit status of a fork that does the job, negative for a signal, and the lines it said."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(reading)
        status = 1
        try:
            job(lambda line: os.write(writing, f"{line}\n".encode()))
            status = 0
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        os._exit(status)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def run(directory: str, mode: str, first: str = "1", last: str = "1000", step: str = "1") -> None:
    start = Path(directory) / "start"
    status, lines = in_child(lambda say: say(json.dumps(prepare(start))))
    assert status == 0, lines
    ids = json.loads(lines[0])
    if mode == "fill":
        lose_indexes(start)
    for fatal in range(int(first), int(last), int(step)):
        folder = Path(directory) / "now"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        status, said = in_child(lambda say, n=fatal, at=folder: live(mode, n, at, ids, say))
        checked, trouble = in_child(lambda say, at=folder, done=said: check(at, ids, done, say))
        row = {"step": fatal, "status": status, "said": said, "checked": checked, "trouble": trouble}
        print(json.dumps(row), flush=True)
        if status == 0:
            return


def main() -> None:
    ingest.pipeline.parse_in_child = lambda path, media_type, *rest: parse_file(path, media_type)  # a fork each is slow
    for line in iter(sys.stdin.readline, ""):
        status, said = in_child(lambda say, given=line: run(*given.split()))  # a fork, since `fill` changes modules
        assert status == 0, said
        print(flush=True)


if __name__ == "__main__":
    main()

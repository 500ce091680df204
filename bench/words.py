"""Search latency over a million chunks (or `--chunks`), and the costs of the word and the vector index.

Chunks are words drawn independently with the frequencies of the manuals of bench/retrieval_sets.py; questions are the
390 of that set. Vectors are generated as in bench/index.py.
    python -m bench.words [--chunks 1000000] [--directory DIR]
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.index import make_vectors
from bench.retrieval_sets import DATA, load_manuals
from bench.runs import BenchRun
from retrieval.embedder import MiniLMEmbedder
from retrieval.index import open_index
from retrieval.lexical import query_terms
from retrieval.rerank import MiniLMReranker
from retrieval.search import Retriever
from retrieval.store import DocumentStore
from retrieval.types import Chunk, ParsedDocument, SearchParams
from retrieval.words import WordIndex, open_words

CHUNKS_A_DOCUMENT = 100
LIMIT = 100  # candidates, as in `Retriever`
_BATCH = 10_000


class MadeTexts:
    """Chunks of 60 to 240 words, reproducible by seed; each iteration starts over."""

    def __init__(self) -> None:
        texts = [document.text for document in load_manuals().documents.values()]
        counts = Counter(word for text in texts for word in re.findall(r"\w+", text))
        self._words = list(counts)
        share = np.array(list(counts.values()), dtype=np.float64)
        self._upto = np.cumsum(share / share.sum())

    def draw(self, number: int) -> Iterator[str]:
        rng = np.random.default_rng(0)
        for start in range(0, number, _BATCH):
            lengths = rng.integers(60, 241, min(_BATCH, number - start))
            drawn = np.searchsorted(self._upto, rng.random(int(lengths.sum()))).clip(max=len(self._words) - 1)
            for picked in np.split(drawn, np.cumsum(lengths)[:-1]):
                yield " ".join([self._words[i] for i in picked.tolist()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, help="folder for the data; default: a temporary one")
    arguments = parser.parse_args()
    run = BenchRun("words", argv=sys.argv)
    questions = [json.loads(row)["question"] for row in (DATA / "questions.jsonl").read_text().splitlines()]
    texts, embedder = MadeTexts(), MiniLMEmbedder()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        store = DocumentStore(directory / "rag.sqlite3")
        fill_store(run, store, texts.draw(arguments.chunks), arguments.chunks, embedder)
        words = bench_words(run, store, directory / "words")
        bench_queries(run, "words alone", lambda question: words.search(query_terms(question), LIMIT), questions)
        index = open_index(store, directory / "faiss", embedder.dim, embedder.name)
        index.settle()
        retriever = Retriever(store, index, embedder, words=words)
        for mode in ("dense", "lexical", "hybrid"):
            search_mode(run, retriever, questions, f"search {mode}", SearchParams(mode=mode))
        reranking = Retriever(store, index, embedder, reranker=MiniLMReranker(), words=words)
        search_mode(run, reranking, questions, "search hybrid, reranked", SearchParams(mode="hybrid", rerank=True))
        every = [document.id for document in store.ready_documents(["default"])]
        rng = np.random.default_rng(1)
        for number in (10, len(every) // 10, len(every) // 2):
            ids = [str(one) for one in rng.choice(every, number, replace=False)]
            params = SearchParams(mode="lexical", document_ids=ids)
            search_mode(run, retriever, questions, f"search lexical within {number} of {len(every)} documents", params)
        bench_change(run, store, words, embedder)
        store.close()
    run.finish()


def fill_store(
    run: BenchRun, store: DocumentStore, texts: Iterator[str], number: int, embedder: MiniLMEmbedder
) -> None:
    vectors, _ = make_vectors(number, 1)
    began = time.perf_counter()
    for start in range(0, number, CHUNKS_A_DOCUMENT):
        part = vectors[start : start + CHUNKS_A_DOCUMENT]
        store_document(store, f"document-{start}.txt", [next(texts) for _ in part], part, embedder.name)
    run.add(what="store", chunks=number, seconds=time.perf_counter() - began)


def store_document(store: DocumentStore, name: str, texts: list[str], vectors: np.ndarray, embedder_name: str) -> str:
    """Make a document of these chunks; returns its id."""
    text = "\n\n".join(texts)
    document, _ = store.create_document("default", name, "text/plain", len(text), name)
    chunks, start = [], 0
    for i, piece in enumerate(texts):
        chunks.append(Chunk(f"{document.id}:{i}", document.id, i, start, start + len(piece), piece))
        start += len(piece) + 2
    store.replace_chunks(document.id, ParsedDocument(text), chunks, vectors, embedder_name, version=1)
    return document.id


def bench_words(run: BenchRun, store: DocumentStore, directory: Path) -> WordIndex:
    began = time.perf_counter()
    words = open_words(store, directory)
    words.search(["index"], LIMIT)
    run.add(what="word index lost: first search", seconds=time.perf_counter() - began, chunks=words.count)
    words.settle()
    assert words.count == store.count_chunks()
    nbytes = sum(path.stat().st_size for path in directory.iterdir())
    run.add(what="word index: made from the database", seconds=time.perf_counter() - began, mb=nbytes / 1e6)
    words.close(store)
    began = time.perf_counter()
    words = open_words(store, directory)
    words.search(["index"], LIMIT)
    run.add(what="word index: opened, first search", seconds=time.perf_counter() - began)
    return words


def bench_queries(
    run: BenchRun, what: str, search: Callable[[str], object], questions: Sequence[str], **more: object
) -> None:
    search(questions[0])
    times_s, cpu_s = [], []  # wall time, and CPU time of all cores, which depends less on other load
    for question in questions:
        began, began_cpu = time.perf_counter(), time.process_time()
        search(question)
        times_s.append(time.perf_counter() - began)
        cpu_s.append(time.process_time() - began_cpu)
    (p50, p95), (cpu_p50, cpu_p95) = (np.percentile(seconds, [50, 95]) * 1e3 for seconds in (times_s, cpu_s))
    worst = max(times_s) * 1e3
    run.add(
        what=what,
        repeats=len(times_s),
        p50_ms=p50,
        p95_ms=p95,
        worst_ms=worst,
        cpu_p50_ms=cpu_p50,
        cpu_p95_ms=cpu_p95,
        **more,
    )


def search_mode(run: BenchRun, retriever: Retriever, questions: Sequence[str], what: str, params: SearchParams) -> None:
    bench_queries(run, what, lambda question: retriever.search(question, ["default"], params), questions)


def bench_change(run: BenchRun, store: DocumentStore, words: WordIndex, embedder: MiniLMEmbedder) -> None:
    """Add and remove a document of 100 chunks; time until searches reflect it."""
    vectors, _ = make_vectors(CHUNKS_A_DOCUMENT, 1)
    times_s: dict[str, list[float]] = {"added": [], "removed": []}
    for number in range(15):
        added = store_document(
            store, f"new-{number}.txt", [f"new words {number}"] * len(vectors), vectors, embedder.name
        )
        times_s["added"].append(_seconds(lambda: words.catch_up(store)))
        store.delete_document(added)
        times_s["removed"].append(_seconds(lambda: words.catch_up(store)))
    for what, seconds in times_s.items():
        p50, worst = float(np.median(seconds)) * 1e3, max(seconds) * 1e3
        run.add(what=f"word index: 100 chunks {what}", repeats=len(seconds), p50_ms=p50, worst_ms=worst)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()

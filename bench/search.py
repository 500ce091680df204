"""How long does a search take over 20,000 chunks, and how fast are passages embedded?

Chunks are made words with the frequencies of a natural text (Zipf); their vectors are random, because a search takes
as long for any vector. Queries are 8 words of one chunk, and are embedded by MiniLM as a user's are.
    python -m bench.search [--chunks 20000] [--queries 100]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.runs import BenchRun
from retrieval.embedder import MiniLMEmbedder
from retrieval.index import FaissIndex, open_index
from retrieval.search import Retriever
from retrieval.store import DocumentStore
from retrieval.types import Chunk, ParsedDocument, SearchParams

VOCABULARY = 30_000
WORDS_A_CHUNK = 120
CHUNKS_A_DOCUMENT = 100
EMBED_CHUNKS = 32
# MiniLM: 6 layers of 12 d^2 weights over 256 tokens, and 4 d t^2 of attention, d = 384; 2 FLOP a weight and token
FLOP_A_CHUNK = 6 * (2 * 12 * 384**2 * 256 + 4 * 384 * 256**2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=100)
    arguments = parser.parse_args()
    run = BenchRun("search", argv=sys.argv)
    rng = np.random.default_rng(0)
    embedder = MiniLMEmbedder()
    bench_embedding(run, embedder, rng)
    with tempfile.TemporaryDirectory() as directory:
        store = DocumentStore(Path(directory) / "rag.sqlite3")
        queries = bench_store(run, store, embedder, rng, arguments.chunks, arguments.queries)
        index = bench_index(run, store, Path(directory) / "faiss", embedder)
        bench_queries(run, Retriever(store, index, embedder), queries, store.count_chunks())
        store.close()
    run.finish()


def bench_embedding(run: BenchRun, embedder: MiniLMEmbedder, rng: np.random.Generator) -> None:
    """Passages of 256 tokens, beside what a plain matrix product of the same type reaches on this machine."""
    passages = [" ".join(_words(rng, 256)) for _ in range(EMBED_CHUNKS)]
    assert min(embedder.count_tokens(passages)) >= embedder.max_tokens
    vectors = embedder.embed_passages(passages)
    assert np.allclose(vectors[0], embedder.embed_query(passages[0]), atol=0.02)
    times_s = _time(lambda: embedder.embed_passages(passages), 7)
    left = torch.randn(4096, 384).to(embedder.dtype)
    right = torch.randn(384, 1536).to(embedder.dtype)
    product_s = float(np.median(_time(lambda: left @ right, 50)))
    _add(
        *(run, f"embed {EMBED_CHUNKS} passages of 256 tokens", times_s),
        chunks_per_s=EMBED_CHUNKS / float(np.median(times_s)),
        gflop_per_s=EMBED_CHUNKS * FLOP_A_CHUNK / float(np.median(times_s)) / 1e9,
        ceiling_gflop_per_s=2 * 4096 * 384 * 1536 / product_s / 1e9,
        dtype=str(embedder.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def bench_store(
    run: BenchRun,
    store: DocumentStore,
    embedder: MiniLMEmbedder,
    rng: np.random.Generator,
    num_chunks: int,
    num_queries: int,
) -> list[str]:
    """Write the chunks, a transaction per 100; returns the queries."""
    queries, times_s = [], []
    for start in range(0, num_chunks, CHUNKS_A_DOCUMENT):
        texts = [" ".join(_words(rng, WORDS_A_CHUNK)) for _ in range(min(CHUNKS_A_DOCUMENT, num_chunks - start))]
        queries += [" ".join(rng.choice(text.split(), 8)) for text in texts]
        vectors = rng.standard_normal((len(texts), embedder.dim)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        began = time.perf_counter()
        store_document(store, f"document-{start}.txt", texts, vectors, embedder.name)
        times_s.append(time.perf_counter() - began)
    _add(run, f"store {CHUNKS_A_DOCUMENT} chunks", times_s, chunks_per_s=num_chunks / sum(times_s))
    return [str(query) for query in rng.choice(queries, num_queries)]


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


def bench_index(run: BenchRun, store: DocumentStore, directory: Path, embedder: MiniLMEmbedder) -> FaissIndex:
    def rebuild() -> None:
        FaissIndex(embedder.dim, embedder.name).catch_up(store)

    index = open_index(store, directory, embedder.dim, embedder.name)
    assert index.count == store.count_chunks()
    _add(run, "index: rebuild from the database", _time(rebuild, 7))
    _add(run, "index: save", _time(lambda: index.save(directory), 7))
    _add(run, "index: open", _time(lambda: open_index(store, directory, embedder.dim, embedder.name), 7))
    return index


def bench_queries(run: BenchRun, retriever: Retriever, queries: list[str], num_chunks: int) -> None:
    """Each query once a mode, after one pass that checks the modes against each other."""
    for query in queries[:5]:
        lexical = retriever.search(query, ["default"], SearchParams(mode="lexical"))
        assert set(query.split()) & set(lexical[0].chunk.text.split())
        assert {hit.chunk.id for hit in retriever.search(query, ["default"], SearchParams(50))} & {lexical[0].chunk.id}
    for mode in ("dense", "lexical", "hybrid"):
        times_s = []
        for query in queries:
            began = time.perf_counter()
            retriever.search(query, ["default"], SearchParams(mode=mode))
            times_s.append(time.perf_counter() - began)
        _add(run, f"search {mode}", times_s, chunks=num_chunks)


def _words(rng: np.random.Generator, number: int) -> list[str]:
    ranks = np.minimum(rng.zipf(1.3, number), VOCABULARY)
    return [_word(int(rank)) for rank in ranks]


def _word(rank: int) -> str:
    """A pronounceable word for a number, the same for the same."""
    syllables = []
    while rank:
        rank, rest = divmod(rank, 75)
        syllables.append("bcdfghjklmnprst"[rest // 5] + "aeiou"[rest % 5])
    return "".join(syllables)


def _time(work: Callable[[], object], repeats: int) -> list[float]:
    work()
    times_s = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - began)
    return times_s


def _add(run: BenchRun, what: str, times_s: list[float], **more: object) -> None:
    median, late = np.percentile(times_s, [50, 95])
    run.add(
        what=what, repeats=len(times_s), p50_ms=median * 1e3, p95_ms=late * 1e3, worst_ms=max(times_s) * 1e3, **more
    )


if __name__ == "__main__":
    main()

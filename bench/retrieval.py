"""Retrieval quality of lexical, dense and fused search, by chunk size.

    python -m bench.retrieval_sets                       # fetch the manuals, once
    python -m bench.retrieval [--chunks 128 256 384 512] [--plot docs/images/retrieval.png]
    python -m bench.retrieval --beir FOLDER [--split test]
    python -m bench.retrieval --reranker DIRECTORY       # of a cross-encoder, instead of the one that ships

Documents are parsed, chunked, embedded and stored by the service's own code; vectors are cached in
data/retrieval-bench/. A chunk is relevant if it has at least half of the words of the answer. Confidence intervals
(95%) are bootstrapped over questions. The fusion weights are also cross-validated in five folds.
"""

import argparse
import dataclasses
import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.retrieval_sets import FOLDER, Question, QuestionSet, load_beir, load_manuals
from bench.runs import BenchRun
from ingest.chunk import ChunkLimits, chunk_document
from ingest.pipeline import fit_limits, text_to_embed, token_counter
from retrieval.embedder import MiniLMEmbedder
from retrieval.index import FaissIndex
from retrieval.lexical import query_terms
from retrieval.rerank import CrossEncoderReranker, MiniLMReranker
from retrieval.search import FusionWeights, Retriever, fuse_scores
from retrieval.store import DocumentStore
from retrieval.types import Chunk, SearchParams
from retrieval.words import WordIndex

LONG_WINDOW = 512  # positions of MiniLM; its default window is 256
DEPTH = 100  # candidates per half
FOLDS = 5
SAMPLES = 2000
GRID = [
    FusionWeights(dense, 1 - dense, trust_from=low, trust_all=high)
    for dense in (0.1, 0.2, 0.3, 0.4, 0.5)
    for low, high in ((0.4, 0.9), (0.5, 0.8), (0.5, 0.9), (0.6, 0.9))
]
UNTRUSTING = {"trust_from": 0.0, "trust_all": 1e-9}  # the lexical weight always counts in full


class WindowEmbedder(MiniLMEmbedder):
    """MiniLM with a configurable window."""

    max_tokens = 0

    def __init__(self, window: int) -> None:
        super().__init__()
        self.max_tokens = window


@dataclass(frozen=True, slots=True)
class Found:
    """Candidates of both halves for one question, row -> score, as collected by `Retriever`."""

    dense: dict[int, float]
    lexical: dict[int, float]
    expected: float

    def fuse(self, weights: FusionWeights) -> list[int]:
        trust = weights.trust(max(self.lexical.values(), default=0.0), self.expected)
        return rank(fuse_scores(self.dense, self.lexical, weights, trust))


@dataclass(frozen=True, slots=True)
class Corpus:
    """The stored set: row -> chunk, and for each question the rows that answer it with their grades.

    With `by_document`, rows of one document count as one, and its first chunk stands for it.
    """

    questions: Sequence[Question]
    chunks: dict[int, Chunk]
    gold: list[dict[int, int]]
    first: dict[int, int] | None

    def unite(self, rows: Sequence[int]) -> list[int]:
        return list(rows) if self.first is None else list(dict.fromkeys(self.first[row] for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 384, 512])
    parser.add_argument("--beir", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--reranker", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    questions = load_beir(arguments.beir, arguments.split) if arguments.beir else load_manuals()
    run = BenchRun("retrieval", argv=sys.argv)
    for size in arguments.chunks:
        bench_size(run, questions, size, arguments.reranker)
    path = run.finish()
    if arguments.plot:
        from bench.retrieval_plot import plot_rows

        plot_rows(run.rows, arguments.plot, path.name)


def bench_size(run: BenchRun, questions: QuestionSet, size: int, reranker_dir: Path | None) -> None:
    """Rows of one chunk size. The embedder's window covers whole chunks, and is extended for long ones."""
    embedder = MiniLMEmbedder() if size <= MiniLMEmbedder().max_tokens else WindowEmbedder(LONG_WINDOW)
    with tempfile.TemporaryDirectory() as directory:
        store = DocumentStore(Path(directory) / "rag.sqlite3")
        corpus = fill_store(store, questions, size, embedder)
        index = FaissIndex(embedder.dim, embedder.name)
        index.catch_up(store)
        words = WordIndex()
        words.catch_up(store)
        words.settle()
        index.settle()
        found = [search_halves(words, index, embedder, question.text) for question in questions.questions]
        weights = FusionWeights(candidates=DEPTH)
        check_retriever(Retriever(store, index, embedder, weights, words=words), corpus, found, weights)
        rankings = {
            "dense": [rank({row: one.dense[row] for row in list(one.dense)[:DEPTH]}) for one in found],
            "lexical": [rank(one.lexical) for one in found],
            "minmax, halves equal": fuse_all(found, FusionWeights(0.5, 0.5, **UNTRUSTING)),
            "rrf, halves equal": fuse_all(found, FusionWeights(0.5, 0.5, "rrf", **UNTRUSTING)),
            "rrf": fuse_all(found, dataclasses.replace(weights, fusion="rrf")),
            "minmax": fuse_all(found, weights),
        }
        reranker = CrossEncoderReranker(reranker_dir) if reranker_dir else MiniLMReranker()
        retriever = Retriever(store, index, embedder, weights, reranker, words=words)
        rankings["minmax, reranked"] = [search_rows(retriever, corpus, q.text, 50) for q in questions.questions]
        window = embedder.max_tokens
        store.close()
    add_rows(run, questions, corpus, rankings, found, {"chunk_tokens": size, "window_tokens": window})


def fill_store(store: DocumentStore, questions: QuestionSet, size: int, embedder: MiniLMEmbedder) -> Corpus:
    """Ingest the set like the service, embedding only what is not cached from earlier runs."""
    limits, count = fit_limits(ChunkLimits(size), embedder), token_counter(embedder)
    pieces = {name: chunk_document(parsed, name, limits, count) for name, parsed in questions.documents.items()}
    texts = [text_to_embed(questions.documents[name].title, c) for name, cut in pieces.items() for c in cut]
    vectors = embed_cached(texts, embedder)
    chunks: dict[int, Chunk] = {}
    first: dict[int, int] = {}
    start = 0
    for name, cut in pieces.items():
        digest = hashlib.sha256(name.encode()).hexdigest()
        document, _ = store.create_document("default", Path(name).name, "text/plain", 1, digest)
        part = vectors[start : start + len(cut)]
        change = store.replace_chunks(document.id, questions.documents[name], cut, part, embedder.name, version=1)
        chunks |= dict(zip(change.added, cut, strict=True))
        first |= dict.fromkeys(change.added, change.added[0] if change.added else 0)
        start += len(cut)
    gold = find_gold(questions, chunks, first if questions.by_document else None)
    return Corpus(questions.questions, chunks, gold, first if questions.by_document else None)


def find_gold(questions: QuestionSet, chunks: dict[int, Chunk], first: dict[int, int] | None) -> list[dict[int, int]]:
    """Relevance of rows for each question (row -> grade); `chunks` have the set's document names."""
    by_document: dict[str, list[int]] = {}
    for row, chunk in chunks.items():
        by_document.setdefault(chunk.document_id, []).append(row)
    gold = []
    for question in questions.questions:
        rows: dict[int, int] = {}
        for span, grade in question.gold:
            for row in by_document.get(span.document, []):
                chunk = chunks[row]
                if span.is_in(chunk.document_id, chunk.char_start, chunk.char_end):
                    rows[row if first is None else first[row]] = grade
        gold.append(rows)
    return gold


def embed_cached(texts: Sequence[str], embedder: MiniLMEmbedder) -> np.ndarray:
    """(len(texts), dim) float32; cached by model, window and texts."""
    digest = hashlib.blake2b(f"{embedder.name} {embedder.max_tokens} {embedder.dtype}".encode(), digest_size=16)
    for text in texts:
        digest.update(text.encode("utf-8", "replace") + b"\0")
    path = FOLDER / "vectors" / f"{digest.hexdigest()}.npy"
    if path.is_file():
        return np.load(path)
    vectors = embedder.embed_passages(texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, vectors)
    return vectors


def search_halves(words: WordIndex, index: FaissIndex, embedder: MiniLMEmbedder, question: str) -> Found:
    """The candidates of both halves, best first, with cosines also for those that only lexical search found."""
    lexical = dict(words.search(query_terms(question), DEPTH))
    vector = embedder.embed_query(question)
    rows, scores = index.search(vector, DEPTH)
    dense = dict(zip(rows.tolist(), scores.tolist(), strict=True))
    if missing := sorted(lexical.keys() - dense.keys()):
        rows, scores = index.search(vector, len(missing), np.array(missing, dtype=np.int64))
        dense |= dict(zip(rows.tolist(), scores.tolist(), strict=True))
    return Found(dense, lexical, words.expected_score(query_terms(question)))


def check_retriever(retriever: Retriever, corpus: Corpus, found: Sequence[Found], weights: FusionWeights) -> None:
    """Check that this measurement and the service's retriever return the same ten hits."""
    for question, one in zip(corpus.questions[:20], found[:20], strict=True):
        assert search_rows(retriever, corpus, question.text, 10) == one.fuse(weights)[:10], question


def search_rows(retriever: Retriever, corpus: Corpus, question: str, number: int) -> list[int]:
    rows = {chunk.id: row for row, chunk in corpus.chunks.items()}
    return [rows[hit.chunk.id] for hit in retriever.search(question, ["default"], SearchParams(number))]


def rank(scores: dict[int, float]) -> list[int]:
    return sorted(scores, key=lambda row: (-scores[row], row))


def fuse_all(found: Sequence[Found], weights: FusionWeights) -> list[list[int]]:
    return [one.fuse(weights) for one in found]


def ndcg(ranking: Sequence[int], gold: dict[int, int], depth: int = 10) -> float:
    """Source: Järvelin, Kekäläinen 2002, with the gain itself in the numerator, as trec_eval's ndcg_cut."""
    gains = [gold.get(row, 0) for row in ranking[:depth]]
    ideal = sorted(gold.values(), reverse=True)[:depth]
    discounts = 1 / np.log2(np.arange(2, depth + 2))
    return float(np.dot(gains, discounts[: len(gains)]) / np.dot(ideal, discounts[: len(ideal)]))


def recall(ranking: Sequence[int], gold: dict[int, int], depth: int) -> float:
    return len(gold.keys() & set(ranking[:depth])) / len(gold)


def reciprocal_rank(ranking: Sequence[int], gold: dict[int, int]) -> float:
    return next((1 / place for place, row in enumerate(ranking, 1) if row in gold), 0.0)


def answered_within(ranking: Sequence[int], gold: dict[int, int], chunks: dict[int, Chunk], budget: int) -> float:
    """Whether a relevant chunk is among the best hits that fit into `budget` tokens."""
    spent = 0
    for row in ranking:
        spent += chunks[row].tokens
        if spent > budget:
            return 0.0
        if row in gold:
            return 1.0
    return 0.0


def add_rows(
    run: BenchRun,
    questions: QuestionSet,
    corpus: Corpus,
    rankings: dict[str, list[list[int]]],
    found: Sequence[Found],
    columns: dict[str, int],
) -> None:
    columns |= {"chunks": len(corpus.chunks), "questions": len(corpus.questions)}
    united = {name: [corpus.unite(one) for one in ranking] for name, ranking in rankings.items()}
    gains = {name: score(ranking, corpus.gold, ndcg) for name, ranking in united.items()}
    gains["minmax, cross-validated"] = cross_validate(corpus, found)
    halves = max(gains["dense"], gains["lexical"], key=np.mean)
    kinds = np.array([question.kind for question in corpus.questions])
    for name, values in gains.items():
        row = {"set": questions.name, **columns, "ranking": name, "ndcg_10": float(values.mean())}
        row["ndcg_10_low"], row["ndcg_10_high"] = bootstrap(
            lambda pick, values=values: values[pick].mean(), len(values)
        )
        if name in united:
            row |= measure(united[name], corpus)
        if name not in ("dense", "lexical"):
            row["over_better_half"] = float(values.mean() / halves.mean() - 1)
            row["over_low"], row["over_high"] = bootstrap(
                lambda pick, values=values: values[pick].mean() / halves[pick].mean() - 1, len(values)
            )
        row |= {f"ndcg_10_{kind}": float(values[kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())}
        run.add(**row)


def measure(ranking: Sequence[Sequence[int]], corpus: Corpus) -> dict[str, float]:
    pairs = list(zip(ranking, corpus.gold, strict=True))
    columns = {f"recall_{depth}": float(np.mean([recall(*pair, depth) for pair in pairs])) for depth in (5, 20, 50)}
    columns["mrr"] = float(np.mean([reciprocal_rank(*pair) for pair in pairs]))
    for budget in (300, 600, 1000, 2000):
        within = [answered_within(*pair, corpus.chunks, budget) for pair in pairs]
        columns[f"within_{budget}_tokens"] = float(np.mean(within))
    return columns


def score(
    rankings: Sequence[Sequence[int]],
    gold: Sequence[dict[int, int]],
    metric: Callable[[Sequence[int], dict[int, int]], float],
) -> np.ndarray:
    return np.array([metric(ranking, one) for ranking, one in zip(rankings, gold, strict=True)])


def cross_validate(corpus: Corpus, found: Sequence[Found]) -> np.ndarray:
    """nDCG@10 of each question under the weights of `GRID` that are best for the questions of the other folds."""
    tried = np.stack(
        [score([corpus.unite(one) for one in fuse_all(found, weights)], corpus.gold, ndcg) for weights in GRID]
    )
    fold = np.random.default_rng(0).permutation(len(found)) % FOLDS
    best = [int(tried[:, fold != number].mean(axis=1).argmax()) for number in range(FOLDS)]
    return tried[np.array(best)[fold], np.arange(len(found))]


def bootstrap(statistic: Callable[[np.ndarray], float], number: int) -> tuple[float, float]:
    """The 95% bootstrap interval of a statistic over questions."""
    rng = np.random.default_rng(0)
    values = [statistic(rng.integers(0, number, number)) for _ in range(SAMPLES)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    main()

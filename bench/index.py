"""Speed, size and recall of the vector index at scale.

Vectors are synthetic: mixtures around centres, similar to texts grouped by topic; queries are drawn from the same
distribution. Exact search in numpy gives the ten nearest. `--manuals` uses the vectors stored by bench/retrieval.py and
the questions of its set instead: fewer, but real.
    python -m bench.index [--vectors 1000000] [--questions 200]
    python -m bench.index --manuals
    python -m bench.index --filtered --questions 60 [--plot docs/images/filters.png]   # within a share of the vectors
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.retrieval_sets import DATA, FOLDER
from bench.runs import BenchRun
from retrieval.embedder import MiniLMEmbedder
from retrieval.index import FaissIndex

DIM = 384
BATCH = 8192
SHARES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # share of the vectors that pass the filter
SPREAD = 0.7  # distance of vectors from their centre, relative to its length


def make_vectors(number: int, questions: int) -> tuple[np.ndarray, np.ndarray]:
    """(number, 384) and (questions, 384) float32 of unit length."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(16, number // 500), DIM)).astype(np.float32)
    made = np.empty((number + questions, DIM), dtype=np.float32)
    for start in range(0, len(made), BATCH):
        part = made[start : start + BATCH]
        part[:] = centres[rng.integers(0, len(centres), len(part))]
        part += SPREAD * rng.standard_normal(part.shape).astype(np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return made[:number], made[number:]


def read_manuals() -> tuple[np.ndarray, np.ndarray]:
    """The vectors of all chunk sizes, and those of the questions."""
    paths = sorted((FOLDER / "vectors").glob("*.npy"))
    if not paths:
        raise SystemExit("there are no vectors yet: run python -m bench.retrieval first")
    rows = (DATA / "questions.jsonl").read_text().splitlines()
    questions = MiniLMEmbedder().embed_passages([json.loads(row)["question"] for row in rows])
    return np.concatenate([np.load(path) for path in paths]), questions


class ArraySource:
    """A vector source with one generation."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.all = vectors

    def generation(self) -> int:
        return 1

    def knows_generation(self, generation: int) -> bool:
        return generation in (0, 1)

    def removed_chunks(self, after: int, upto: int) -> np.ndarray:
        return np.empty(0, dtype=np.int64)

    def vectors(self, after: int, upto: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(self.all) if after == 0 else 0, BATCH):
            part = self.all[start : start + BATCH]
            yield np.arange(start + 1, start + 1 + len(part), dtype=np.int64), part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--manuals", action="store_true")
    parser.add_argument("--filtered", action="store_true")
    parser.add_argument("--plot", type=Path, help="picture of --filtered")
    arguments = parser.parse_args()
    run = BenchRun("index", argv=sys.argv)
    read = read_manuals() if arguments.manuals else make_vectors(arguments.vectors, arguments.questions)
    source, questions = ArraySource(read[0]), read[1]
    if arguments.filtered:
        bench_filtered(run, source, questions)
        path = run.finish()
        if arguments.plot:
            plot_filtered(run.rows, arguments.plot, path.name)
        return
    nearest = [np.argpartition(-(source.all @ question), 10)[:10] + 1 for question in questions]
    for flat_max in (len(source.all), len(source.all) // 2):  # exact, then an inverted file
        bench_index(run, source, questions, nearest, flat_max)
    run.finish()


def bench_index(
    run: BenchRun, source: ArraySource, questions: np.ndarray, nearest: list[np.ndarray], flat_max: int
) -> None:
    index = FaissIndex(DIM, "made", flat_max)
    began = time.perf_counter()
    index.catch_up(source)
    while index.is_filling:
        time.sleep(0.01)
    filled = time.perf_counter()
    index.settle()
    trained = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        index.save(Path(directory))
        saved = time.perf_counter()
        nbytes = sum(path.stat().st_size for path in Path(directory).iterdir())
        index = FaissIndex.load(Path(directory), DIM, "made")
        index.search(questions[0], 10)
        first_search_s = time.perf_counter() - saved
    times_s, shares = [], []
    for question, wanted in zip(questions, nearest, strict=True):
        began_search = time.perf_counter()
        rows, _ = index.search(question, 10)
        times_s.append(time.perf_counter() - began_search)
        shares.append(len(set(rows.tolist()) & set(wanted.tolist())) / 10)
    run.add(
        kind="exact" if index.is_exact else "inverted file",
        vectors=len(source.all),
        p50_ms=1e3 * float(np.median(times_s)),
        p95_ms=1e3 * float(np.percentile(times_s, 95)),
        recall_10=float(np.mean(shares)),
        fill_s=filled - began,
        train_s=trained - filled,
        save_s=saved - trained,
        load_and_search_s=first_search_s,
        bytes_over_raw=nbytes / source.all.nbytes,
    )


def bench_filtered(run: BenchRun, source: ArraySource, questions: np.ndarray) -> None:
    """Filtered search, with random rows, which occur in all lists, and with rows nearest to one vector."""
    index = FaissIndex(DIM, "made", len(source.all) // 2)
    index.catch_up(source)
    index.settle()
    every = [source.all @ question for question in questions]
    rng = np.random.default_rng(1)
    for share in SHARES:
        drawn = rng.choice(len(source.all), int(share * len(source.all)), replace=False)
        together = np.argsort(-(source.all @ source.all[drawn[0]]))[: len(drawn)]
        for which, rows in (("at random", drawn), ("together", together)):
            add_filtered(run, index, np.sort(rows).astype(np.int64) + 1, which, questions, every)


def add_filtered(
    run: BenchRun,
    index: FaissIndex,
    allowed: np.ndarray,
    which: str,
    questions: np.ndarray,
    every: list[np.ndarray],
) -> None:
    times_s, cpu_s, shares = [], [], []
    for question, scores in zip(questions, every, strict=True):
        began, began_cpu = time.perf_counter(), time.thread_time()
        rows, _ = index.search(question, 10, allowed)
        times_s.append(time.perf_counter() - began)
        cpu_s.append(time.thread_time() - began_cpu)
        wanted = allowed[np.argpartition(-scores[allowed - 1], 10)[:10]]
        shares.append(len(set(rows.tolist()) & set(wanted.tolist())) / 10)
    run.add(
        kind="exact" if index.is_exact else "inverted file",
        vectors=index.count,
        allowed=len(allowed),
        rows=which,
        first_ms=1e3 * times_s[0],
        p50_ms=1e3 * float(np.median(times_s)),
        p95_ms=1e3 * float(np.percentile(times_s, 95)),
        cpu_p50_ms=1e3 * float(np.median(cpu_s)),
        recall_10=float(np.mean(shares)),
    )


def plot_filtered(rows: Sequence[Mapping[str, Any]], path: Path, source: str) -> None:
    """Plot time and recall by number of allowed rows."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for which, colour in (("at random", "#1f4e9c"), ("together", "#d98c5f")):
        own = [row for row in rows if row["rows"] == which]
        allowed = [row["allowed"] for row in own]
        left.plot(allowed, [row["cpu_p50_ms"] for row in own], "o-", color=colour, label=which)
        right.plot(allowed, [row["recall_10"] for row in own], "o-", color=colour)
    left.axhline(5, color="#b0b0b0", linestyle=":")
    right.axhline(0.97, color="#b0b0b0", linestyle=":")
    left.set(ylabel="p50, ms of a core", ylim=(0, None))
    right.set(ylabel="recall@10", ylim=(0.9, 1.005))
    for axis in (left, right):
        axis.set(xscale="log", xlabel="rows that the filter leaves")
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(title="rows", frameon=False)
    figure.suptitle(f"Search within a filter, {rows[0]['vectors']:,} vectors; dotted: the goals", fontsize=11)
    figure.savefig(path, dpi=150, metadata={"Description": source})


if __name__ == "__main__":
    main()

"""How fast do documents become searchable, beside the embedder alone on the same chunks, all of them together?

Every `--every`-th of the manuals of bench/retrieval_sets.py (HTML, PDF, text) goes through workers as the service's,
for each of `--workers` in turn.
    python -m bench.ingest [--workers 1 2 3] [--every 50] [--suffix .pdf]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.retrieval_sets import manual_paths
from bench.runs import BenchRun, time_interleaved
from ingest.files import FileStore
from ingest.jobs import IngestWorker
from ingest.pipeline import text_to_embed
from ingest.sniff import SNIFF_BYTES, sniff_media_type
from retrieval.embedder import MiniLMEmbedder
from retrieval.index import FaissIndex
from retrieval.store import DocumentStore


def queue_documents(folder: Path, paths: Sequence[Path]) -> tuple[DocumentStore, FileStore]:
    """A data directory in which they wait."""
    store, files = DocumentStore(folder / "rag.sqlite3"), FileStore(folder / "files")
    for path in paths:
        with path.open("rb") as file:
            media_type = sniff_media_type(file.read(SNIFF_BYTES), path.name)
            file.seek(0)
            sha256, nbytes = files.save_stream([file.read()], 1 << 30)
        store.create_document("default", path.name, media_type, nbytes, sha256)
    return store, files


def ingest(paths: Sequence[Path], embedder: MiniLMEmbedder, threads: int) -> dict[str, Any]:
    """Seconds until all are ready or have failed, and what they became."""
    with tempfile.TemporaryDirectory() as directory:
        store, files = queue_documents(Path(directory), paths)
        index = FaissIndex(embedder.dim, embedder.name)
        worker = IngestWorker(store, index, embedder, files, threads=threads, small_bytes=0, poll_s=0.01)
        start, cpu = time.perf_counter(), cpu_seconds()
        worker.start()
        while (queue := store.get_collection("default")).pending:
            time.sleep(0.05)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        worker.stop()
        documents = store.list_documents(limit=len(paths))
        texts = [
            text_to_embed(document.title, chunk)
            for document in documents
            if document.status == "ready"
            for chunk in store.get_chunks(document.id)
        ]
        store.close()
    return {
        "documents": queue.documents,
        "pages": sum(document.pages or 0 for document in documents),
        "texts": texts,
        "s": seconds,
        "cpu_s": cpu,
    }


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure_speed(run: BenchRun, paths: Sequence[Path], workers: Sequence[int], repeats: int) -> None:
    embedder = MiniLMEmbedder()
    first = ingest(paths, embedder, 1)  # loads the model, too
    texts, cpu_s = first["texts"], {}

    def embed() -> None:
        before = cpu_seconds()
        embedder.embed_passages(texts)
        cpu_s["embedder alone"] = cpu_seconds() - before

    def work(name: str, threads: int) -> None:
        cpu_s[name] = ingest(paths, embedder, threads)["cpu_s"]

    cases = {"embedder alone": embed}
    cases |= {f"{n} at once": lambda n=n: work(f"{n} at once", n) for n in workers}
    times_s = time_interleaved(cases, warmup=0, repeats=repeats)
    alone = median(times_s["embedder alone"])
    for name, seconds in times_s.items():
        run.add(
            what=name,
            documents=first["documents"],
            pdf_pages=first["pages"],
            chunks=len(texts),
            median_s=median(seconds),
            worst_s=max(seconds),
            chunks_per_s=len(texts) / median(seconds),
            of_the_embedder=alone / median(seconds),
            cpu_s=cpu_s[name],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--every", type=int, default=50, help="manuals, to one taken")
    parser.add_argument("--suffix", default="", help="of the manuals to take, such as .pdf")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    paths = [path for _, path in manual_paths() if path.name.endswith(args.suffix)][:: args.every]
    measure_speed(run := BenchRun("ingest", sys.argv), paths, args.workers, args.repeats)
    run.finish()


if __name__ == "__main__":
    main()

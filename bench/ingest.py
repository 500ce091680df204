"""Throughput and memory of ingestion.

Default: every `--every`-th of the manuals of bench/retrieval_sets.py (HTML, PDF, text), ingested by workers like the
service's, for each number in `--workers`; compared with the embedder alone on all these chunks.
`--upload`: a text of this many bytes is sent to a service over HTTP, which ingests it or reports why it cannot.
`--small`: this many small documents parsed one after the other, each in its own process, to measure that overhead.
`--parse`: PDF pages parsed per second, in one process and in two, and as in the service, with each document in a
sandboxed process. The PDFs are the sample, the manuals if they were fetched, and those with several pages (also .gz) in
the given folders.
`--bulk`: this many chunks with placeholder vectors, with the worker stopped and restarted on the way.
    python -m bench.ingest [--workers 1 2 3] [--every 50] [--suffix .pdf]
    python -m bench.ingest --upload 1_000_000_000
    python -m bench.ingest --bulk 100_000 [--stops 5]
    python -m bench.ingest --small 100
    python -m bench.ingest --parse [/usr/share/doc ...]
"""

from __future__ import annotations

import argparse
import gzip
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np

from bench.load import Served, serving
from bench.retrieval_sets import manual_paths
from bench.runs import BenchRun, time_interleaved
from ingest.files import FileStore
from ingest.jobs import IngestWorker
from ingest.parse import ParseError, parse_file
from ingest.parse.cage import parse_in_child
from ingest.sniff import SNIFF_BYTES, sniff_media_type
from retrieval.embedder import MiniLMEmbedder, text_to_embed
from retrieval.index import FaissIndex
from retrieval.store import DocumentStore

BLOCK_BYTES = 1 << 20
PDF = "application/pdf"
PARSED_PAGES = 1000  # minimum per measurement
ROOT = Path(__file__).parent.parent
BULK_WORDS = 200_000  # per bulk document: about 1,000 chunks


def queue_documents(folder: Path, paths: Sequence[Path]) -> tuple[DocumentStore, FileStore]:
    """A data directory with these documents in the queue."""
    store, files = DocumentStore(folder / "rag.sqlite3"), FileStore(folder / "files")
    for path in paths:
        with path.open("rb") as file:
            media_type = sniff_media_type(file.read(SNIFF_BYTES), path.name)
            file.seek(0)
            sha256, nbytes = files.save_stream([file.read()], 1 << 30)
        store.create_document("default", path.name, media_type, nbytes, sha256)
    return store, files


def ingest(paths: Sequence[Path], embedder: MiniLMEmbedder, threads: int) -> dict[str, Any]:
    """Seconds until all documents are ready or failed, and the documents."""
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
    """CPU seconds of this process and its terminated children."""
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


def measure_upload(run: BenchRun, nbytes: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_text(folder / "big.txt", nbytes)
        with serving(folder / "data", INGEST__WORKERS="0") as service, open_service(service) as client:
            with peak_of(service) as memory:
                start = time.perf_counter()
                with (folder / "big.txt").open("rb") as file:
                    client.post("/v1/documents", files={"file": ("big.txt", file)}).raise_for_status()
                seconds = time.perf_counter() - start
            run.add(what="upload", mb=nbytes / 1e6, s=seconds, mb_per_s=nbytes / seconds / 1e6, **memory)
        with serving(folder / "data") as service, open_service(service) as client:
            with peak_of(service) as memory:
                start = time.perf_counter()
                while True:
                    (document,) = client.get("/v1/documents").json()["data"]
                    if document["status"] in ("ready", "failed"):
                        break
                    time.sleep(0.05)
            error = document["last_error"] or {}
            what = f"read: {document['status']}"
            run.add(what=what, mb=nbytes / 1e6, s=time.perf_counter() - start, code=error.get("code"), **memory)


def open_service(service: Served) -> httpx.Client:
    return httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {service.key}"}, timeout=3600)


@contextmanager
def peak_of(service: Served) -> Iterator[dict[str, float]]:
    """Resident memory of a service at the start of the block, and its peak within."""
    process = Path(f"/proc/{service.process.pid}")
    (process / "clear_refs").write_text("5")  # reset the peak
    memory = {"before_mb": read_status(process, "VmRSS")}
    yield memory
    memory["peak_mb"] = read_status(process, "VmHWM")


def read_status(process: Path, name: str) -> float:
    """A field of /proc/<pid>/status in megabytes."""
    lines = (process / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(name))


def write_text(path: Path, nbytes: int) -> None:
    """Write synthetic prose without repeated blocks."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        while (left := nbytes - file.tell()) > 0:
            file.write(make_text(rng, BLOCK_BYTES // 8).encode()[:left])


def make_text(rng: np.random.Generator, number: int) -> str:
    """This many random words, in paragraphs of 100."""
    words = np.array(["tide", "pier", "rope", "lamp", "storm", "harbour", "keeper", "noon", "light", "anchor"])
    chosen = words[rng.integers(0, len(words), number)]
    return "\n\n".join(" ".join(chosen[i : i + 100]) + "." for i in range(0, number, 100)) + "\n\n"


class StandIn(MiniLMEmbedder):
    """A stand-in embedder that counts tokens like the real one and returns placeholder vectors."""

    def embed_passages(self, texts: Sequence[str]) -> np.ndarray:
        made = np.random.default_rng(len(texts)).standard_normal((len(texts), self.dim)).astype(np.float32)
        return made / np.linalg.norm(made, axis=1, keepdims=True)


def measure_bulk(run: BenchRun, chunks: int, stops: int) -> None:
    rng, embedder = np.random.default_rng(0), StandIn()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for number in range(-(-chunks // 1000)):
            (folder / f"{number}.txt").write_text(make_text(rng, BULK_WORDS))
        paths = sorted(folder.glob("*.txt"))
        store, files = queue_documents(folder / "data", paths)
        index = FaissIndex(embedder.dim, embedder.name)
        start, stopping_s = time.perf_counter(), []
        for stop in range(1, stops + 2):
            worker = IngestWorker(store, index, embedder, files, threads=2)
            worker.start()
            while (state := store.get_collection("default")).documents < len(paths) * stop / (stops + 1):
                time.sleep(0.1)
            asked = time.perf_counter()
            worker.stop(600)
            stopping_s.append(time.perf_counter() - asked)
        documents = store.list_documents(limit=len(paths))
        rows = [int(row) for part, _ in store.vectors(0, store.generation()) for row in part]
        run.add(
            what=f"bulk, stopped {stops} times",
            documents=state.documents,
            chunks=state.chunks,
            s=time.perf_counter() - start,
            longest_stop_s=max(stopping_s),
            most_attempts=max(document.attempts for document in documents),
            unready=sum(document.status != "ready" for document in documents),
            chunks_twice=len(rows) - len(set(rows)),
            index_minus_store=index.count - store.count_chunks(),
            peak_mb=read_status(Path("/proc/self"), "VmHWM"),
        )
        store.close()


SMALL = {
    "text/plain": "Words about the lamp.\n\n" * 40,
    "text/markdown": "# Lamp\n\nWords about the lamp.\n\n" * 40,
    "text/html": "<h1>Lamp</h1><p>Words about the lamp.</p>" * 40,
}


def measure_small(run: BenchRun, number: int) -> None:
    """Measures CPU time, which competes with the embedder for the cores; wall time depends on the load."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "small"
        for media_type, text in SMALL.items():
            path.write_text(text)
            parse_in_child(path, media_type)
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            for _ in range(number):
                parse_in_child(path, media_type)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            run.add(
                media_type=media_type,
                documents=number,
                child_cpu_ms=1e3 * cpu_s / number,
                documents_per_s=number / (time.perf_counter() - began),
            )


def find_pdfs(folders: Sequence[Path], unpacked: Path) -> dict[Path, int]:
    """Readable PDFs with several pages, and their page counts; compressed ones are unpacked into `unpacked`."""
    paths = [path for folder in (ROOT / "samples", *folders) for path in sorted(folder.rglob("*.pdf"))]
    with suppress(ValueError):  # not fetched
        paths += [path for _, path in manual_paths() if path.suffix == ".pdf"]
    for number, packed in enumerate(path for folder in folders for path in sorted(folder.rglob("*.pdf.gz"))):
        paths.append(unpacked / f"{number}.pdf")
        paths[-1].write_bytes(gzip.decompress(packed.read_bytes()))
    found = {}
    for path in paths:
        with suppress(ParseError):
            if (pages := parse_pages(path)[0]) > 1:
                found[path] = pages
    return found


def parse_pages(path: Path) -> tuple[int, float]:
    """Number of pages, and CPU seconds to parse them."""
    before = time.process_time()
    pages = len(parse_file(path, PDF).pages)
    return pages, time.process_time() - before


def parse_pages_caged(path: Path) -> tuple[int, float]:
    """Like `parse_pages`, in the service's sandboxed process."""
    return len(parse_in_child(path, PDF).pages), 0.0


def measure_parsing(run: BenchRun, folders: Sequence[Path], repeats: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        time_parsing(run, find_pdfs(folders, Path(directory)), repeats)


def time_parsing(run: BenchRun, pdfs: dict[Path, int], repeats: int) -> None:
    """Parse each document several times, long ones first, so that two processes stay busy until the end."""
    rounds = -(-PARSED_PAGES // sum(pdfs.values()))
    tasks, pages = sorted(pdfs, key=lambda path: -pdfs[path]) * rounds, sum(pdfs.values()) * rounds
    cases, cpu_s = {}, defaultdict(list)
    with ExitStack() as stack:
        for number in (1, 2):
            bare = stack.enter_context(ProcessPoolExecutor(number, get_context("spawn")))
            caged = stack.enter_context(ThreadPoolExecutor(number))
            for name, pool, work in (("bare", bare, parse_pages), ("as a service", caged, parse_pages_caged)):

                def parse(name: str = f"{name}, {number} at once", pool: Executor = pool, work: Any = work) -> None:
                    before = cpu_seconds()
                    told_s = sum(seconds for _, seconds in pool.map(work, tasks))
                    cpu_s[name].append(told_s + cpu_seconds() - before)

                cases[f"{name}, {number} at once"] = parse
        times_s = time_interleaved(cases, repeats=repeats)
    for name, seconds in times_s.items():
        run.add(
            what=name,
            documents=len(pdfs),
            of_pages=sum(pdfs.values()),
            times=rounds,
            median_s=median(seconds),
            worst_s=max(seconds),
            pages_per_s=pages / median(seconds),
            pages_per_cpu_s=pages / median(cpu_s[name][1:]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--every", type=int, default=50, help="use every n-th manual")
    parser.add_argument("--suffix", default="", help="use only manuals with this suffix, such as .pdf")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--upload", type=int, metavar="BYTES")
    parser.add_argument("--bulk", type=int, metavar="CHUNKS")
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--parse", type=Path, nargs="*", metavar="FOLDER")
    parser.add_argument("--small", type=int, metavar="DOCUMENTS")
    args = parser.parse_args()
    if args.upload:
        measure_upload(run := BenchRun("ingest-upload", sys.argv), args.upload)
    elif args.bulk:
        measure_bulk(run := BenchRun("ingest-bulk", sys.argv), args.bulk, args.stops)
    elif args.small:
        measure_small(run := BenchRun("ingest-small", sys.argv), args.small)
    elif args.parse is not None:
        measure_parsing(run := BenchRun("ingest-parse", sys.argv), args.parse, args.repeats)
    else:
        paths = [path for _, path in manual_paths() if path.name.endswith(args.suffix)][:: args.every]
        measure_speed(run := BenchRun("ingest", sys.argv), paths, args.workers, args.repeats)
    run.finish()


if __name__ == "__main__":
    main()

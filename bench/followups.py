"""Retrieval recall for follow-up questions, with and without rewriting, on hand-written conversations.

The documents are samples/documents, the conversations bench/data/followups.json: `turns` alternate between user and
assistant; `gold` occurs literally in the passage that answers the question. `kind`: what the question depends on (a
pronoun, an ellipsis, the previous answer, an earlier question), or `change` for a new topic that must not be affected.
Run: `python -m bench.followups`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from app.client import connect
from app.conversation import Turn, standalone_query
from app.ingesting import expand_paths, ingest_files
from app.settings import load_settings
from bench.runs import BenchRun
from ingest.files import FileStore
from ingest.jobs import IngestWorker
from ingest.sniff import sniff_media_type
from retrieval.embedder import MiniLMEmbedder
from retrieval.index import open_index
from retrieval.search import FusionWeights, Retriever
from retrieval.store import DocumentStore
from retrieval.types import SearchParams

ROOT = Path(__file__).parent.parent
CONVERSATIONS = ROOT / "bench" / "data" / "followups.json"
Rewrite = Callable[[str, Sequence[Turn]], str]


def join_last(question: str, turns: Sequence[Turn]) -> str:
    """The previous question followed by this one."""
    return " ".join([*[turn.text for turn in turns if turn.role == "user"][-1:], question])


RULES: dict[str, Rewrite] = {
    "as asked": lambda question, turns: question,
    "question before": join_last,
    "all turns": lambda question, turns: " ".join([*(turn.text for turn in turns), question]),
    "standalone_query": standalone_query,
}


def index_samples(directory: Path) -> Retriever:
    """A retriever over the sample documents, chunked and embedded like in the service."""
    store, files, embedder = DocumentStore(directory / "db"), FileStore(directory / "files"), MiniLMEmbedder()
    index = open_index(store, directory / "faiss", embedder.dim, embedder.name)
    for path in sorted((ROOT / "samples" / "documents").iterdir()):
        content = path.read_bytes()
        sha256, nbytes = files.save_stream(iter([content]), len(content))
        store.create_document("default", path.name, sniff_media_type(content[:8192], path.name), nbytes, sha256)
    worker = IngestWorker(store, index, embedder, files)
    worker.start()
    while store.get_collection("default").pending:
        worker.notify()
    worker.stop()
    return Retriever(store, index, embedder, FusionWeights(0.5, 0.5))


def find_rank(retriever: Retriever, query: str, gold: str) -> int | None:
    """The rank, from 1, of the first hit with the gold words; None if not among the first ten."""
    hits = retriever.search(query, ["default"], SearchParams(10))
    return next((rank for rank, hit in enumerate(hits, 1) if gold in " ".join(hit.chunk.text.split())), None)


def add_answers(conversations: Sequence[dict], run: BenchRun) -> None:
    """Rows of how often the shipped model quotes the gold words (or part of them), by what it is asked."""
    with tempfile.TemporaryDirectory() as directory:
        settings = load_settings(None, data_dir=Path(directory), url=None)
        with connect(settings) as service:
            ingest_files(service, expand_paths([str(ROOT / "samples" / "documents")]), {"collection": "default"})
            for name, rewrite in RULES.items():
                right = refused = 0
                for one in conversations:
                    question = rewrite(one["question"], turns_of(one))
                    answer = service.request("POST", "/v1/answers", json=ask_with(question, one, name == "as asked"))
                    quotes = [citation["cited_text"] for citation in answer["citations"]]
                    right += any(one["gold"] in quote or quote in one["gold"] for quote in quotes)
                    refused += answer["grounding"] == "not_found"
                run.add(asked=name, questions=len(conversations), quoted_gold=right, not_found=refused)


def ask_with(question: str, one: dict, with_turns: bool) -> dict:
    """A request with the conversation as messages, from which the service makes its query, or of one question."""
    if not with_turns:
        return {"question": question}
    earlier = [{"role": turn.role, "content": turn.text} for turn in turns_of(one)]
    return {"messages": [*earlier, {"role": "user", "content": question}]}


def turns_of(one: dict) -> list[Turn]:
    return [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(one["turns"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--show", action="store_true", help="print the search queries that failed")
    parser.add_argument("--answers", action="store_true", help="also ask the shipped model")
    arguments = parser.parse_args()
    conversations = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))
    run = BenchRun("followups", sys.argv)
    with tempfile.TemporaryDirectory() as directory:
        retriever = index_samples(Path(directory))
        for name, rewrite in RULES.items():
            ranks: dict[str, list[int | None]] = {}
            for one in conversations:
                query = rewrite(one["question"], turns_of(one))
                rank = find_rank(retriever, query, one["gold"])
                ranks.setdefault(one["kind"], []).append(rank)
                if arguments.show and name == "standalone_query" and rank != 1:
                    print(rank, one["kind"], "|", query)
            for kind, found in [*ranks.items(), ("all", [rank for some in ranks.values() for rank in some])]:
                first = sum(rank == 1 for rank in found) / len(found)
                third = sum(rank is not None and rank <= 3 for rank in found) / len(found)
                run.add(rule=name, kind=kind, questions=len(found), recall_1=first, recall_3=third)
    if arguments.answers:
        add_answers(conversations, run)
    run.finish()


if __name__ == "__main__":
    main()

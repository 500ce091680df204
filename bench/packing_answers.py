"""Does the order in which evidence is packed change what the shipped model answers?

Questions about some of the manuals of bench/retrieval_sets.py, found by words alone, asked one after another as the
`zipf` trace of bench/packing.py has them; orders as there. The model must quote. `right`: its first quote has words of
a sentence that answers, and stands there; `F1`: the quote's words against those of that sentence; `held`: the sentence
is in the evidence. Differences to score order are paired, with their standard error, in points.
    python -m bench.retrieval_sets && python -m bench.packing_answers [--budget 300] [--questions 100]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.answering import AnswerWriter
from app.likeliest import generate_likeliest
from bench.answers import SHIPPED, Reader, token_f1
from bench.packing import HITS, ORDERS, by_score, zipf_trace
from bench.retrieval_sets import Question, QuestionSet, load_manuals
from bench.runs import BenchRun
from ingest.chunk import ChunkLimits, chunk_document
from model.engine import EngineRequest
from model.sampling import SamplingParams
from retrieval.index import FaissIndex
from retrieval.packing import RecentEvidence, pack_evidence
from retrieval.search import Retriever
from retrieval.store import DocumentStore
from retrieval.types import Evidence, Passage, SearchParams

PACKAGES = ("crawl-common", "debian-history", "freedombox-doc-en")


class NoEmbedder:
    """Stands in where nothing is searched by meaning."""

    name, dim, max_tokens = "none", 8, 256

    def embed_passages(self, texts: list[str]) -> np.ndarray:
        return np.full((len(texts), self.dim), self.dim**-0.5, dtype=np.float32)

    def embed_query(self, text: str) -> np.ndarray:
        return self.embed_passages([text])[0]


@dataclass(frozen=True, slots=True)
class Judged:
    right: float
    f1: float
    held: float
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=300, help="tokens of evidence; recent may take twice as many")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--packages", nargs="+", default=PACKAGES)
    parser.add_argument("--beginnings", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run, manuals = BenchRun("packing-answers", argv=sys.argv), load_manuals(packages=arguments.packages)
    trace = list(islice(zipf_trace(manuals.questions, 0), arguments.questions))
    reader = Reader(SHIPPED, torch.bfloat16, "int8", max_quotes=1, beginnings=arguments.beginnings)
    with tempfile.TemporaryDirectory() as directory:
        store = DocumentStore(Path(directory) / "rag.sqlite3")
        names = fill_store(store, manuals)
        embedder = NoEmbedder()
        retriever = Retriever(store, FaissIndex(embedder.dim, embedder.name), embedder)
        hits = {q.id: retriever.search(q.text, ["default"], SearchParams(HITS, "lexical")) for q in trace}
        print(f"{len(names)} documents, {len(trace)} questions", flush=True)
        judged: dict[str, list[Judged]] = {}
        asked: dict[tuple[str, tuple[Passage, ...]], Judged] = {}
        for order in ORDERS:
            recent = RecentEvidence() if order == "recent" else None
            judged[order] = []
            for question in trace:
                evidence = pack_evidence(
                    store, ["default"], hits[question.id], arguments.budget, reader.format.count_tokens, "rag",
                    recent=recent, recent_tokens=2 * arguments.budget,
                )  # fmt: skip
                if order == "score":
                    evidence = by_score(evidence)
                if recent is not None:
                    recent.remember(evidence)
                if (key := (question.id, evidence.passages)) not in asked:
                    asked[key] = judge(ask(reader, question.text, evidence), question, evidence, manuals, names)
                judged[order].append(asked[key])
            print(order, len(judged[order]), np.mean([one.right for one in judged[order]]), flush=True)
        store.close()
    asyncio.run(reader.engine.close())
    for order in ORDERS:
        run.add(budget=arguments.budget, order=order, questions=len(trace), **compare(judged[order], judged["score"]))
    run.finish()


def fill_store(store: DocumentStore, manuals: QuestionSet) -> dict[str, str]:
    """Document id -> name in the set."""
    names, embedder = {}, NoEmbedder()
    for number, (name, parsed) in enumerate(manuals.documents.items()):
        chunks = chunk_document(parsed, name, ChunkLimits(256), lambda text: len(text) // 4)
        document, _ = store.create_document("default", Path(name).name, "text/plain", 1, f"{number:064x}")
        vectors = embedder.embed_passages([chunk.text for chunk in chunks])
        store.replace_chunks(document.id, parsed, chunks, vectors, embedder.name, version=1)
        names[document.id] = name
    return names


def ask(reader: Reader, question: str, evidence: Evidence) -> AnswerWriter:
    prompt = reader.format.build_prompt(question, evidence)
    request = EngineRequest(
        prompt.token_ids,
        prompt.boundaries,
        SamplingParams(max_new_tokens=256, stop_token_ids=reader.format.stop_ids),
        constraint=reader.format.constrain(evidence, reader.limits),
    )
    writer = AnswerWriter(reader.tokenizer, reader.format.answer_tokens(evidence), evidence.passages)

    async def read() -> None:
        async for output in generate_likeliest(
            reader.engine, request, reader.format.decision_ids[0], reader.beginnings
        ):
            if output.token_id is not None:
                list(writer.push(output.token_id))

    asyncio.run(read())
    list(writer.finish())
    return writer


def judge(
    writer: AnswerWriter, question: Question, evidence: Evidence, manuals: QuestionSet, names: dict[str, str]
) -> Judged:
    golds = [(span.document, span.start, span.end) for span, _ in question.gold]
    texts = [manuals.documents[name].text[start:end] for name, start, end in golds]
    held = any(text in passage.text for text in texts for passage in evidence.passages)
    if not writer.quoted:
        return Judged(0.0, 0.0, float(held), evidence.tokens)
    quote = writer.quoted[0].quote
    name = names[quote.passage.document_id]
    right = any(name == gold and quote.char_start < end and start < quote.char_end for gold, start, end in golds)
    return Judged(float(right), max(token_f1(quote.text, text) for text in texts), float(held), evidence.tokens)


def compare(own: list[Judged], score: list[Judged]) -> dict[str, Any]:
    row: dict[str, Any] = {"evidence_tokens": float(np.mean([one.tokens for one in own]))}
    for name in ("held", "right", "f1"):
        values = np.array([getattr(one, name) for one in own])
        differences = 100 * (values - np.array([getattr(one, name) for one in score]))
        row |= {
            name: 100 * float(values.mean()),
            f"{name} to score": float(differences.mean()),
            f"{name} s.e.": float(differences.std(ddof=1) / len(differences) ** 0.5),
        }
    return row


if __name__ == "__main__":
    main()

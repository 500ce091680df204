"""Share of evidence tokens that come from the prefix cache for different questions, by selection and order of evidence.

The manuals of bench/retrieval_sets.py, searched and packed by the service's own code; every question is asked once, so
that nothing is shared by repetition. Traces: `zipf`, topics (the answering document) drawn from a Zipf distribution;
`sessions`, interleaved runs of questions on one topic. Orders: `score`, documents by their best hit; `canonical`, the
collection's order; `recent`, the beginning of earlier evidence followed by what it lacks, up to twice as much in total
(retrieval/packing.py). The cached prefix of a prompt is what it shares with an earlier one, up to the end of a
document. Nothing is evicted, no model runs.

`recall`: share of the questions, in %, whose answer is in the evidence.
    python -m bench.retrieval_sets                       # fetch the manuals, once
    python -m bench.packing [--budgets 4096 16384] [--plot docs/images/packing.png]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np

from app.prompting import QuoteFormat
from app.quotes import TokenBytes
from bench.hf_parity import SHIPPED
from bench.retrieval import fill_store
from bench.retrieval_sets import Question, QuestionSet, load_manuals
from bench.runs import BenchRun
from model.tokenizer import Tokenizer
from retrieval.embedder import MiniLMEmbedder
from retrieval.index import FaissIndex
from retrieval.packing import RecentEvidence, pack_evidence
from retrieval.search import Retriever
from retrieval.store import DocumentStore
from retrieval.types import Evidence, Hit, Passage, SearchParams

HITS = 24  # as in the service
ORDERS = ("score", "canonical", "recent")


class Prefixes:
    """Prefixes of evidence that have been read, each ending after a document."""

    def __init__(self) -> None:
        self._read: set[tuple[object, ...]] = set()

    def read(self, groups: Sequence[tuple[object, ...]]) -> int:
        """How many leading groups are a known prefix; afterwards all are known."""
        beginnings = [tuple(groups[:end]) for end in range(1, len(groups) + 1)]
        known = sum(beginning in self._read for beginning in beginnings)
        self._read.update(beginnings)
        return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[4096], help="tokens of evidence")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    run, manuals, embedder = BenchRun("packing", argv=sys.argv), load_manuals(), MiniLMEmbedder()
    prompt_format = QuoteFormat(Tokenizer.load(SHIPPED), TokenBytes.read(SHIPPED), 1 << 18)
    with tempfile.TemporaryDirectory() as directory:
        store = DocumentStore(Path(directory) / "rag.sqlite3")
        fill_store(store, manuals, 256, embedder)
        index = FaissIndex(embedder.dim, embedder.name)
        index.catch_up(store)
        retriever = Retriever(store, index, embedder)
        hits = {q.id: retriever.search(q.text, ["default"], SearchParams(HITS)) for q in manuals.questions}
        texts = gold_texts(manuals)
        for budget in arguments.budgets:
            for name, trace in (("zipf", zipf_trace), ("sessions", session_trace)):
                for order in ORDERS:
                    rows = [
                        replay(order, trace(manuals.questions, seed), hits, texts, store, prompt_format, budget)
                        for seed in arguments.seeds
                    ]
                    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
                    run.add(trace=name, budget=budget, order=order, **means)
                    print(run.rows[-1], flush=True)
        store.close()
    path = run.finish()
    if arguments.plot:
        plot_rows(run.rows, arguments.plot, path.name)


def gold_texts(manuals: QuestionSet) -> dict[str, list[str]]:
    """The answers of each question, as written in the manuals."""
    return {
        q.id: sorted({manuals.documents[span.document].text[span.start : span.end] for span, _ in q.gold})
        for q in manuals.questions
    }


def topic_of(question: Question) -> str:
    """The first document that answers the question."""
    return question.gold[0][0].document


def zipf_trace(questions: Sequence[Question], seed: int) -> Iterator[Question]:
    """Each question once, with topics drawn from a Zipf distribution while they have questions left."""
    rng = np.random.default_rng(seed)
    left = _shuffled_by_topic(questions, rng)
    weights = dict(zip(rng.permutation(sorted(left)), 1 / np.arange(1, len(left) + 1), strict=True))
    while left:
        topics = sorted(left)
        share = np.array([weights[topic] for topic in topics])
        topic = topics[rng.choice(len(topics), p=share / share.sum())]
        yield left[topic].pop()
        if not left[topic]:
            del left[topic]


def session_trace(questions: Sequence[Question], seed: int, open_sessions: int = 8) -> Iterator[Question]:
    """Each question once, in interleaved runs of questions on one topic."""
    rng = np.random.default_rng(seed)
    left = _shuffled_by_topic(questions, rng)
    waiting = list(rng.permutation(sorted(left)))
    running: list[str] = []
    while waiting or running:
        while waiting and len(running) < open_sessions:
            running.append(waiting.pop())
        topic = running[rng.integers(len(running))]
        yield left[topic].pop()
        if not left[topic]:
            running.remove(topic)


def _shuffled_by_topic(questions: Sequence[Question], rng: np.random.Generator) -> dict[str, list[Question]]:
    topics = defaultdict(list)
    for i in rng.permutation(len(questions)):
        topics[topic_of(questions[i])].append(questions[i])
    return dict(topics)


def replay(
    order: str,
    trace: Iterator[Question],
    hits: dict[str, list[Hit]],
    texts: dict[str, list[str]],
    store: DocumentStore,
    prompt_format: QuoteFormat,
    budget: int,
) -> dict[str, float]:
    recent = RecentEvidence() if order == "recent" else None
    prefixes, tokens, cached, found, asked = Prefixes(), 0, 0, 0, 0
    for question in trace:
        own = hits[question.id]
        count = prompt_format.count_tokens
        evidence = pack_evidence(store, ["default"], own, budget, count, recent=recent, recent_tokens=2 * budget)
        if order == "score":
            evidence = by_score(evidence)
        if recent is not None:
            recent.remember(evidence)
        groups = [list(group) for _, group in groupby(evidence.passages, key=lambda passage: passage.document_id)]
        counts = [prompt_format.count_tokens(group) for group in groups]
        assert sum(counts) <= (budget if recent is None else 2 * budget)
        known = prefixes.read([tuple(map(_place, group)) for group in groups])
        tokens, cached, asked = tokens + sum(counts), cached + sum(counts[:known]), asked + 1
        found += any(text in passage.text for text in texts[question.id] for passage in evidence.passages)
    return {
        "questions": asked,
        "tokens_a_question": tokens / asked,
        "cached_tokens_a_question": cached / asked,
        "new_tokens_a_question": (tokens - cached) / asked,
        "percent_cached": 100 * cached / tokens,
        "recall": 100 * found / asked,
    }


def by_score(evidence: Evidence) -> Evidence:
    """The same passages, with documents ordered by their best hit."""
    place = {document_id: i for i, document_id in enumerate(evidence.relevance)}
    return replace(evidence, passages=tuple(sorted(evidence.passages, key=lambda p: place[p.document_id])))


def _place(passage: Passage) -> tuple[object, ...]:
    return passage.document_id, passage.char_start, passage.char_end


def plot_rows(rows: Sequence[dict[str, object]], path: Path, source: str) -> None:
    """Plot new tokens per question for each trace and budget, one bar per order."""
    import matplotlib.pyplot as plt

    traces = list(dict.fromkeys(row["trace"] for row in rows))
    figure, axes = plt.subplots(1, len(traces), figsize=(9, 3.6), sharey=True, layout="constrained")
    shown: dict[str, str] = {"score": "#b0b0b0", "canonical": "#6fa8dc", "recent": "#1f4e9c"}
    for axis, trace in zip(np.atleast_1d(axes), traces, strict=True):
        budgets = list(dict.fromkeys(row["budget"] for row in rows))
        for i, (order, colour) in enumerate(shown.items()):
            own = [row for row in rows if (row["trace"], row["order"]) == (trace, order)]
            places = np.arange(len(own)) + 0.27 * (i - 1)
            bars = axis.bar(places, [row["percent_cached"] for row in own], 0.25, color=colour, label=order)
            axis.bar_label(bars, [f"{row['percent_cached']:.0f}" for row in own], fontsize=8)
        axis.set(title=trace, xlabel="tokens of evidence at most", xticks=range(len(budgets)))
        axis.set_xticklabels([f"{budget:,}" for budget in budgets])
        axis.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[0].set(ylabel="evidence from the cache, %", ylim=(0, 100))
    np.atleast_1d(axes)[-1].legend(title="order", frameon=False)
    figure.suptitle("Every question is another one; how much of its evidence was read before", fontsize=11)
    figure.savefig(path, dpi=150, metadata={"Description": source})


if __name__ == "__main__":
    main()

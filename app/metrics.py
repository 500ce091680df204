"""Prometheus metrics. One registry per service instead of the global one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from app.schemas import Answer

_SECONDS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


@dataclass(frozen=True)
class Gauges:
    """Values that are read when metrics are rendered, instead of being counted as events happen.

    `documents` by status; `prefix_cache`, `draft_tokens` (by outcome) and the engine's counts since the start;
    `state_stores` by tier, as `StateStore.stats`.
    """

    documents: Mapping[str, int]
    chunks: int
    chunks_without_words: int
    prefix_cache: Mapping[str, int]
    state_stores: Mapping[str, Mapping[str, int]]
    draft_tokens: Mapping[str, int]
    engine_seconds: Mapping[str, float]
    engine_done: Mapping[str, int]


class _Watch:
    """A collector of prometheus_client."""

    def __init__(self, read: Callable[[], Gauges]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        return []  # or registering it would collect it

    def collect(self) -> Iterator[Metric]:
        gauges = self._read()
        documents = GaugeMetricFamily("jamba_rag_documents", "Documents by status.", labels=["status"])
        for status, count in gauges.documents.items():
            documents.add_metric([status], count)
        yield documents
        yield GaugeMetricFamily("jamba_rag_chunks", "Chunks that search finds.", gauges.chunks)
        yield GaugeMetricFamily(
            "jamba_rag_chunks_without_words",
            "Chunks that the word index being made does not hold yet.",
            gauges.chunks_without_words,
        )
        for name, text, label, values in (
            (
                "prefix_cache_events",
                "What the prefix cache did: lookups, hits, tokens asked for and found, damaged values, states saved.",
                "event",
                gauges.prefix_cache,
            ),
            (
                "draft_tokens",
                "Tokens of answers that were guessed, by what became of them.",
                "outcome",
                gauges.draft_tokens,
            ),
            (
                "engine_seconds",
                "Time of the engine's thread by what it did: its shares say what an overloaded engine waits for.",
                "part",
                gauges.engine_seconds,
            ),
            (
                "engine_done",
                "Decode steps and the tokens of them, tokens of prompts read.",
                "what",
                gauges.engine_done,
            ),
        ):
            family = CounterMetricFamily(f"jamba_rag_{name}", text, labels=[label])
            for key, value in values.items():
                family.add_metric([key], value)
            yield family
        stores = GaugeMetricFamily(
            "jamba_rag_state_store", "Sizes and counters of each tier of prefix states.", labels=["tier", "what"]
        )
        for tier, stats in gauges.state_stores.items():
            for what, value in stats.items():
                stores.add_metric([tier, what], value)
        yield stores


class Metrics:
    """Counters and histograms of one service; names begin with `jamba_rag_`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        histogram = partial(Histogram, buckets=_SECONDS, registry=registry)
        self.requests = Counter(
            "jamba_rag_http_requests_total", "HTTP requests.", ["method", "route", "status"], registry=registry
        )
        self.request_seconds = histogram(
            "jamba_rag_http_request_seconds", "Time to the last byte of a response.", ["route"]
        )
        self.requests_in_flight = Gauge("jamba_rag_http_requests_in_flight", "Open HTTP requests.", registry=registry)
        self.answers = Counter("jamba_rag_answers_total", "Finished answers.", ["grounding", "mode"], registry=registry)
        self.answers_pending = Gauge("jamba_rag_answers_pending", "Answers running or waiting.", registry=registry)
        self.answer_stage_seconds = histogram(
            "jamba_rag_answer_stage_seconds",
            "Time of an answer by stage, and by the tier its prefix came from.",
            ["stage", "tier"],
        )
        self.tokens = Counter(
            "jamba_rag_tokens_total", "Tokens by kind: input, cached_input, output.", ["kind"], registry=registry
        )
        self.cache_hits = Counter(
            "jamba_rag_prefix_cache_answers_total",
            "Answers by the tier their prefix came from.",
            ["tier"],
            registry=registry,
        )
        self.state_seconds = histogram(
            "jamba_rag_state_seconds",
            "Time to bring prefix states into a tier (save) or out of it (load).",
            ["what", "tier"],
        )
        self.prefetches = Counter(
            "jamba_rag_prefetches_total",
            "Collections read ahead of a question: read, found in the cache, interrupted by a question, failed.",
            ["outcome"],
            registry=registry,
        )
        self.citations = Counter("jamba_rag_citations_total", "Quotes found in the evidence.", registry=registry)
        self.citations_rejected = Counter(
            "jamba_rag_citations_rejected_total",
            "Quotes that the evidence does not hold.",
            registry=registry,
        )
        self.uploads = Counter("jamba_rag_uploads_total", "Files received.", ["outcome"], registry=registry)
        self.upload_bytes = Counter("jamba_rag_upload_bytes_total", "Bytes of files stored.", registry=registry)
        self.ingest_stage_seconds = histogram(
            "jamba_rag_ingest_stage_seconds",
            "Time of a document by stage of its ingestion; `queued` is the wait before.",
            ["stage"],
        )
        self.ingested = Counter(
            "jamba_rag_ingested_total", "Documents that became ready or failed.", ["outcome"], registry=registry
        )
        ProcessCollector(registry=registry)

    def watch(self, read: Callable[[], Gauges]) -> None:
        """Call `read` for gauges whenever the metrics are rendered. Call once."""
        self.registry.register(_Watch(read))

    def observe_ingest(self, stage: str, seconds: float) -> None:
        self.ingest_stage_seconds.labels(stage).observe(seconds)

    def observe_states(self, what: str, tier: str, seconds: float) -> None:
        """`what`: save or load."""
        self.state_seconds.labels(what, tier).observe(seconds)

    def count_ingested(self, outcome: str) -> None:
        self.ingested.labels(outcome).inc()

    def record_answer(self, answer: Answer, mode: str, rejected: int, queue_ms: float) -> None:
        """Count a finished answer; `queue_ms` is how long it waited for the engine."""
        self.answers.labels(answer.grounding, mode).inc()
        self.citations.inc(len(answer.citations))
        self.citations_rejected.inc(rejected)
        self.cache_hits.labels(answer.cache.tier).inc()
        for kind in ("input", "cached_input", "output"):
            self.tokens.labels(kind).inc(getattr(answer.usage, f"{kind}_tokens"))
        for stage, value_ms in {**answer.timings.model_dump(), "queue_ms": queue_ms}.items():
            self.answer_stage_seconds.labels(stage.removesuffix("_ms"), answer.cache.tier).observe(value_ms / 1000)

    def count_uploads(self, accepted: int, refused: int) -> None:
        self.uploads.labels("accepted").inc(accepted)
        self.uploads.labels("refused").inc(refused)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)

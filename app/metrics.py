"""What Prometheus sees: why is it slow, and what was refused. One registry per service, none global."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from app.schemas import Answer

_SECONDS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters and histograms of one service; names begin with `jamba_rag_`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "jamba_rag_http_requests_total", "HTTP requests.", ["method", "route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "jamba_rag_http_request_seconds",
            "Time to the last byte of a response.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.answers = Counter("jamba_rag_answers_total", "Finished answers.", ["grounding", "mode"], registry=registry)
        self.answers_pending = Gauge("jamba_rag_answers_pending", "Answers running or waiting.", registry=registry)
        self.answer_stage_seconds = Histogram(
            "jamba_rag_answer_stage_seconds",
            "Time of an answer by stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
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
        self.citations = Counter("jamba_rag_citations_total", "Quotes found in the evidence.", registry=registry)
        self.citations_rejected = Counter(
            "jamba_rag_citations_rejected_total",
            "Quotes that the evidence does not hold.",
            registry=registry,
        )
        self.uploads = Counter("jamba_rag_uploads_total", "Files received.", ["outcome"], registry=registry)
        self.upload_bytes = Counter("jamba_rag_upload_bytes_total", "Bytes of files stored.", registry=registry)

    def record_answer(self, answer: Answer, mode: str, rejected: int) -> None:
        """Count a finished answer."""
        self.answers.labels(answer.grounding, mode).inc()
        self.citations.inc(len(answer.citations))
        self.citations_rejected.inc(rejected)
        self.cache_hits.labels(answer.cache.tier).inc()
        for kind in ("input", "cached_input", "output"):
            self.tokens.labels(kind).inc(getattr(answer.usage, f"{kind}_tokens"))
        for stage, value_ms in answer.timings.model_dump().items():
            self.answer_stage_seconds.labels(stage.removesuffix("_ms")).observe(value_ms / 1000)

    def count_uploads(self, accepted: int, refused: int) -> None:
        self.uploads.labels("accepted").inc(accepted)
        self.uploads.labels("refused").inc(refused)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)

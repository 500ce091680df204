"""The settings of a deployment, by group, with types, limits and descriptions. settings.py reads them."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

from app.field_checks import from_home

Folder = Annotated[Path, AfterValidator(from_home)]
MIN_EVIDENCE_TOKENS = 64  # a passage does not fit into less
SHIPPED_CHECKPOINT = Path(__file__).resolve().parent.parent / "model" / "checkpoints" / "jamba-small"


def setting(default: Any, description: str, unit: str = "", **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"unit": unit}, **limits)


class Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ServerSettings(Group):
    host: str = setting("127.0.0.1", "Address to listen on.", min_length=1)
    port: int = setting(8000, "Port to listen on.", ge=0, le=65535)
    max_requests_in_flight: int = setting(512, "Open HTTP requests after which new ones get 429.", "requests", ge=1)
    keepalive_s: float = setting(15.0, "Pause after which an idle event stream sends a comment.", "seconds", gt=0)
    stall_s: int = setting(
        60,
        "Time after which a client is cut off that sends no (complete) request or, on Linux, reads nothing.",
        "seconds",
        ge=1,
    )
    shutdown_s: int = setting(10, "Longest wait for open requests when the service stops.", "seconds", ge=0)


class AuthSettings(Group):
    enabled: bool = setting(True, "Require an API key. May be false only on a loopback host.")


class ModelSettings(Group):
    path: Folder = setting(SHIPPED_CHECKPOINT, "Checkpoint directory in Hugging Face layout.")
    device: str = setting(
        "auto",
        "`auto`, `cpu`, `cuda` or `cuda:<n>`; `auto` takes a GPU when there is one.",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "Type of activations; `auto` fits the device.")
    quantize: Literal["auto", "none", "int8", "w8a8"] = setting(
        "auto",
        "`none`: linear weights as stored; `int8`: quantized to int8 per row; `w8a8`: activations in int8 too, on a "
        "CPU with VNNI in all products (halves an answer's time; int4 weights stay int4), on an H100 in prefills (a "
        "third less time). `auto`: `w8a8` on such a CPU, else `int8`.",
    )
    threads: int = setting(0, "CPU threads of the model; 0 takes all cores.", "threads", ge=0, le=1024)
    max_context_tokens: int = setting(
        0, "Longest prompt plus answer; 0 takes the checkpoint's `max_position_embeddings`.", "tokens", ge=0
    )
    segment_tokens: int = setting(
        0, "Longest piece of a prefill between two decode steps; 0 takes 512 on a CPU, 16384 on a GPU.", "tokens", ge=0
    )
    max_batch: int = setting(0, "Sequences decoded together; 0 takes 8 on a CPU, 64 on a GPU.", "sequences", ge=0)
    draft_tokens: int = setting(
        3,
        "Speculative decoding by prompt lookup, on a CPU: most tokens drafted per step; faster, and changes no "
        "answer; 0: none.",
        "tokens",
        ge=0,
        le=7,
    )
    state_max_bytes: int = setting(
        0,
        "Memory for the states of running answers; others wait. 0: on a GPU what prefix states leave, on a CPU no "
        "limit.",
        "bytes",
        ge=0,
    )


class CacheSettings(Group):
    gpu_max_bytes: int | None = setting(
        None,
        "GPU memory for prefix states; unset: what answers of the longest context leave free, half at most; 0: none.",
        "bytes",
        ge=0,
    )
    host_max_bytes: int | None = setting(
        None,
        "Main memory for prefix states; unset: 1 GiB, with a GPU a quarter of the machine's memory; 0: none.",
        "bytes",
        ge=0,
    )
    block_tokens: int = setting(256, "Tokens in one stored block of KV cache.", "tokens", ge=1)
    snapshot_tokens: int | None = setting(
        None,
        "Least distance between snapshots at document ends (beyond 32K tokens: a sixteenth of the position); unset: "
        "512 on a CPU, 2048 on a GPU.",
        "tokens",
        ge=0,
    )
    sparse_snapshots: int | None = setting(
        None,
        "Prefill segments between snapshots where no document ends; unset: 16 on a CPU, 2 on a GPU; 0: none.",
        "segments",
        ge=0,
    )
    snapshot_dtype: Literal["float32", "int8"] = setting(
        "float32", "Form of snapshots; int8 is a third of the size and changes answers by less than int8 weights do."
    )


class RedisSettings(Group):
    url: SecretStr | None = setting(None, "Redis or Valkey that keeps prefix states across restarts; unset: none.")
    key_prefix: str = setting("jamba-rag:", "First part of every key written to Redis.")
    timeout_s: float = setting(
        0.08, "Longest wait for each reply of Redis; after that Redis is bypassed for 5 s.", "seconds", gt=0
    )
    ttl_s: int = setting(7 * 86_400, "Time after which a prefix state expires in Redis.", "seconds", ge=1)


class IngestSettings(Group):
    max_file_bytes: int = setting(1 << 30, "Largest file accepted.", "bytes", ge=1)
    max_files_per_request: int = setting(1000, "Most files in one upload request.", "files", ge=1)
    chunk_tokens: int = setting(256, "Largest length of a chunk.", "tokens of the embedder", ge=16)
    workers: int = setting(
        2,
        "Documents ingested at once; one more thread takes only small files. 0: this process ingests nothing.",
        "threads",
        ge=0,
    )
    lease_s: float = setting(30.0, "Time after which a job of a dead worker is taken over.", "seconds", gt=0)
    parse_timeout_s: float = setting(300.0, "Longest time to parse one file.", "seconds", gt=0)
    parse_max_bytes: int = setting(2 << 30, "Memory limit of the process that parses one file.", "bytes", ge=1 << 28)


class RetrievalSettings(Group):
    dense_weight: float = setting(0.3, "Weight of the embedding score in hybrid search.", ge=0)
    lexical_weight: float = setting(0.7, "Weight of the BM25 score in hybrid search.", ge=0)
    embedder_path: Folder | None = setting(
        None,
        "Embedder (a BERT as sentence-transformers stores it); unset: the one that ships. See `jamba-rag reembed`.",
    )
    embedder_device: str = setting(
        "cpu",
        "`cpu`, `cuda` or `cuda:<n>`: where passages and questions become vectors.",
        pattern=r"^(cpu|cuda(:\d+)?)$",
    )
    rerank: bool = setting(True, "Reorder the best hits with a reranker (cross-encoder).")
    reranker_path: Folder | None = setting(
        None, "Another reranker (Hugging Face layout), which then reads the 50 best hits; unset: the one that ships."
    )
    evidence_hits: int = setting(24, "Hits that `rag` answers pack evidence from.", "hits", ge=1, le=200)


class AnswerSettings(Group):
    max_evidence_tokens: int = setting(
        0, "Most evidence in a prompt; a request can ask for less; 0: what the context leaves.", "tokens", ge=0
    )
    auto_evidence_tokens: int | None = setting(
        None,
        "Up to this size `auto` takes whole documents; also the size it widens `rag` to; unset: as the checkpoint "
        "advises, else no limit.",
        "tokens",
        ge=MIN_EVIDENCE_TOKENS,
    )
    rag_evidence_tokens: int | None = setting(
        None,
        "Evidence that `rag` packs at first, at least one passage; unset: as the checkpoint advises, else 4096.",
        "tokens",
        ge=MIN_EVIDENCE_TOKENS,
    )
    recent_evidence_tokens: int | None = setting(
        None,
        "Most `rag` evidence when it begins with recently read evidence; unset: as advised, else twice what is packed.",
        "tokens",
        ge=MIN_EVIDENCE_TOKENS,
    )
    max_question_tokens: int | None = setting(
        None,
        "Longest question; it is never cached. Unset: 8192 on a CPU (20 s on two cores; 60,000 take minutes), no "
        "limit on a GPU.",
        "tokens",
        ge=1,
    )
    max_output_tokens: int = setting(
        256, "Most tokens of an answer, unless the request sets its own limit.", "tokens", ge=1
    )
    max_quote_tokens: int = setting(96, "Longest quote the model may make.", "tokens", ge=1)
    max_quotes: int = setting(4, "Most quotes in an answer.", "quotes", ge=1)
    none_margin: float | None = setting(
        None,
        "Answer `not_found` when log P(none) - log P(quote), plus log n (n <= 3) for the best of n passages, exceeds "
        "this; unset: as the checkpoint advises, else 0.",
        "nats",
        ge=-50,
        le=50,
    )
    missing_words_nats: float | None = setting(
        None,
        "Added to that margin in proportion to the question's words that the passage lacks; unset: as advised, else 0.",
        "nats",
        ge=0,
        le=50,
    )
    quote_beginnings: int | None = setting(
        None,
        "Candidate quotes, one per likely first token, of which the likeliest is taken; 1: greedy; unset: as advised.",
        "quotes",
        ge=1,
        le=32,
    )
    read_apart: bool | None = setting(
        None,
        "Read each passage of `rag` evidence in a prompt of its own and answer from the one that most likely holds the "
        "answer; unset: as advised, else all in one prompt. Not for checkpoints that write freely.",
    )
    ask_back: float | None = setting(
        None,
        "Weight of log P(question given quote) beside log P(quote given question) when choosing a quote; 0: not "
        "computed; unset: as advised.",
        ge=0,
        le=10,
    )
    verdict: float | None = setting(
        None,
        "Weight of the model's verdict whether a quote answers the question, when choosing a quote and when refusing; "
        "0: not computed; unset: as advised.",
        ge=0,
        le=10,
    )
    prefetch_after_s: float = setting(
        2.0,
        "Prefetch: a collection that `auto` takes whole is prefilled when it has not changed for this long and nobody "
        "is being answered; 0: never.",
        "seconds",
        ge=0,
    )
    max_wait_s: float = setting(
        30.0,
        "A question gets 429 if it would wait longer than this, estimated from recent answers; 0: no limit.",
        "seconds",
        ge=0,
    )
    max_pending: int = setting(
        128, "Most answers running or waiting; more get 429, whatever the estimated wait.", "answers", ge=1
    )


class LimitSettings(Group):
    requests_per_minute: int = setting(
        0, "Requests per minute and key, unless the key has its own limit; 0: no limit.", "requests", ge=0
    )
    tokens_per_minute: int = setting(
        0, "Tokens computed per minute and key: uncached prompt tokens and answers; 0: no limit.", "tokens", ge=0
    )
    upload_bytes_per_day: int = setting(0, "Bytes a key may upload per day (UTC); 0: no limit.", "bytes", ge=0)
    documents_per_collection: int = setting(
        0, "Most documents in a collection: a key then adds no more; 0: no limit.", "documents", ge=0
    )


class LogSettings(Group):
    level: Literal["debug", "info", "warning", "error"] = setting("info", "Least severe message written.")
    format: Literal["text", "json"] = setting("text", "Log lines for people or for machines.")
    audit_max_bytes: int = setting(10 << 20, "Size after which the audit log begins a new file.", "bytes", ge=4096)
    audit_files: int = setting(10, "Files of the audit log that are kept.", "files", ge=1)


class TelemetrySettings(Group):
    otlp_endpoint: str | None = setting(
        None,
        "Base URL of the OpenTelemetry collector (OTLP over HTTP) to send traces to; unset: none.",
        pattern="^https?://.",
    )

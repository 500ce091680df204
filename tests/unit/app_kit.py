"""What tests of the service need: a random checkpoint that speaks the shipped prompt format, and a service on it."""

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from app import embedding, main
from app.main import create_app
from app.serving import SteadyServer
from app.settings import Settings, load_settings
from model.train.tokenizer_cut import SPECIAL_TOKENS

VOCABULARY = 512
CONTEXT_TOKENS = 2048
LIGHTHOUSE = (
    "# The lighthouse\n\nThe lighthouse of Skerryvore was built in 1844 by Alan Stevenson. It is 48 metres high.\n\n"
    "# The keeper\n\nThe keeper of the lighthouse is Moira Campbell. She has lived there since 1972.\n"
)
GARDEN = "# The garden\n\nThe garden holds 120 kinds of roses. Visitors come in June and pay four euros.\n"

# the models that search are loaded once a process, not once a service: no service changes them
main.open_embedder, embedding.MiniLMReranker = cache(main.open_embedder), cache(embedding.MiniLMReranker)


def train_tiny_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of VOCABULARY tokens with the special tokens of the shipped one, at the same ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([LIGHTHOUSE, GARDEN] * 20, trainer)
    return tokenizer


def write_checkpoint(path: Path, write_jamba: Callable[..., Any]) -> Path:
    """A random Jamba with that tokenizer; answers are noise, but in the right form."""
    tokenizer = train_tiny_tokenizer()
    write_jamba(path, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT_TOKENS)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return path


def make_settings(checkpoint: Path, data_dir: Path, **groups: Any) -> Settings:
    """Settings of a small service; `groups` as `load_settings` takes them."""
    defaults: dict[str, Any] = {
        "data_dir": data_dir,
        "model": {"path": checkpoint, "threads": 1, "device": "cpu"},
        "answers": {
            "max_output_tokens": 48,
            "max_quote_tokens": 12,
            "max_quotes": 2,
            "none_margin": 50,
            "prefetch_after_s": 0,
        },
        "cache": {"host_max_bytes": 64 << 20, "block_tokens": 32, "snapshot_tokens": 64},
    }
    for name, group in groups.items():
        defaults[name] = {**defaults.get(name, {}), **group}
    return load_settings(env_file=None, **defaults)


class ServiceClient(httpx.AsyncClient):
    """A client of a service in this process, signed in as its admin."""

    def __init__(self, app: FastAPI, data_dir: Path, key: str | None = None) -> None:
        key = key or (data_dir / "admin.key").read_text().strip()
        super().__init__(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://service",
            headers={"Authorization": f"Bearer {key}"},
            timeout=60,
        )
        self.app = app

    async def upload(self, name: str, content: str | bytes, **fields: str) -> dict[str, Any]:
        """Upload one file and wait until it is ready or failed; returns the document."""
        data = content.encode() if isinstance(content, str) else content
        reply = await self.post("/v1/documents", files={"file": (name, io.BytesIO(data))}, data=fields)
        assert reply.status_code in (200, 202), reply.text
        return await self.settle(reply.json()["data"][0]["id"])

    async def settle(self, document_id: str) -> dict[str, Any]:
        while True:
            document = (await self.get(f"/v1/documents/{document_id}")).json()
            if document["status"] in ("ready", "failed"):
                return document
            await asyncio.sleep(0.02)

    async def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        reply = await self.post("/v1/answers", json={"question": question, **fields})
        assert reply.status_code == 200, reply.text
        return reply.json()


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """A whole service behind a real socket, in a thread; gives its URL."""
    with listening(create_app(settings), settings.server.stall_s) as (url, _):
        yield url


@contextmanager
def listening(app: ASGIApp, stall_s: float) -> Iterator[tuple[str, socket.socket]]:
    """An application behind a real socket, in a thread; gives its URL and the socket that listens."""
    server = SteadyServer(uvicorn.Config(app, port=0, log_config=None, access_log=False), stall_s)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        listener = server.servers[0].sockets[0]
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", listener
    finally:
        server.should_exit = True
        thread.join()


@asynccontextmanager
async def running_service(settings: Settings, key: str | None = None) -> AsyncIterator[ServiceClient]:
    """A whole service in this process, its lifespan included."""
    app = create_app(settings)
    async with app.router.lifespan_context(app), ServiceClient(app, settings.data_dir, key) as client:
        yield client


def read_events(body: str) -> list[tuple[str, dict[str, Any]]]:
    """(type, data) of each Server-Sent Event; comments are left out."""
    events = []
    for block in body.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            events.append((fields["event"], json.loads(fields["data"])))
    return events

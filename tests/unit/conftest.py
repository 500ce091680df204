"""Fixtures of the service's tests; a module that wants other settings makes its own service with `running_service`.

The service is imported where it is used: the model's tests also run on machines that have only what the model needs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from engine_kit import SMALL, TOKENIZER

from model import Jamba, load_model
from model.engine import JambaEngine
from model.prefix_cache import PrefixCache
from model.prefix_plan import PlanSettings

if TYPE_CHECKING:
    from app_kit import ServiceClient

    from retrieval.store import DocumentStore


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tiny_jamba_dir: Path) -> Jamba:
    return load_model(tiny_jamba_dir)


@pytest.fixture
def make_engine(model: Jamba) -> Iterator[Callable[..., JambaEngine]]:
    """make_engine(*stores, plan=SMALL, **settings) -> an engine of that model, which speaks single bytes."""
    engines = []

    def make(*stores: object, fingerprint: bytes = b"model", plan: PlanSettings = SMALL, **settings) -> JambaEngine:
        cache = PrefixCache(stores, fingerprint, plan)
        engines.append(JambaEngine(model, TOKENIZER, cache, **{"max_context_tokens": 2000} | settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
        engine.prefix_cache.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DocumentStore]:
    from retrieval.store import DocumentStore

    store = DocumentStore(tmp_path / "rag.sqlite3")
    yield store
    store.close()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, write_jamba) -> Path:
    """A random Jamba that speaks the shipped prompt format; do not write into it."""
    from app_kit import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), write_jamba)


@pytest.fixture(scope="module")
async def client(anyio_backend, tiny_checkpoint, tmp_path_factory) -> AsyncIterator[ServiceClient]:
    """An admin's client of a service that all tests of a module share, and whose model always quotes."""
    from app_kit import make_settings, running_service

    async with running_service(make_settings(tiny_checkpoint, tmp_path_factory.mktemp("data"))) as client:
        yield client

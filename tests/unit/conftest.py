"""Fixtures of the service's tests; a module that wants other settings makes its own service with `running_service`.

The service is imported where it is used: the model's tests also run on machines that have only what the model needs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from app_kit import ServiceClient


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


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

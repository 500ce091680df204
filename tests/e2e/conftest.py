"""One service for all tests of a run that only need some service, and a browser on its page."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from tests.conftest import WriteJamba
from tests.e2e.browser import Page, run_chromium
from tests.e2e.service import RunningService, run_command, write_checkpoint

HANDBOOK = """# Lighthouse handbook

## Lamps
The lamp is trimmed twice a night, at ten and at two. 🌊 After a storm the keeper checks the wick.

## Boats
The supply boat comes on the first Monday of the month.
"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_jamba: WriteJamba) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, write_jamba)
    return path


@pytest.fixture(scope="session")
def service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A random model would refuse or quote by chance; with this margin it always quotes."""
    data = tmp_path_factory.mktemp("data")
    with run_command(checkpoint, data, ANSWERS__NONE_MARGIN="50", ANSWERS__MAX_QUOTE_TOKENS="24") as running:
        yield running


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with run_chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(driver: Chrome, service: RunningService) -> Page:
    """Signed in, in an empty collection of its own."""
    page = Page(driver, service)
    driver.get(service.url)
    driver.execute_script("sessionStorage.clear()")
    page.sign_in(service.key)
    page.wait(lambda: page.find_all("#workspace"))
    page.make_collection(f"c-{secrets.token_hex(4)}")
    return page


@pytest.fixture
def handbook(tmp_path: Path) -> Path:
    path = tmp_path / "handbook.md"
    path.write_text(HANDBOOK)
    return path

"""One service for all tests of a run that only need some service."""

from collections.abc import Iterator

import pytest

from tests.conftest import WriteJamba
from tests.e2e.service import RunningService, run_service, write_checkpoint


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, write_jamba: WriteJamba) -> Iterator[RunningService]:
    """A random model would refuse or quote by chance; with this margin it always quotes."""
    checkpoint, data = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("data")
    write_checkpoint(checkpoint, write_jamba)
    with run_service(checkpoint, data, ANSWERS__NONE_MARGIN="50", ANSWERS__MAX_QUOTE_TOKENS="24") as running:
        yield running

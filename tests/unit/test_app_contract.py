"""Requests made up from the OpenAPI description, valid and not: each reply is one that the description announces."""

from collections.abc import Iterator
from contextlib import suppress

import pytest
import schemathesis
from app_kit import make_settings, serving
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

EXAMPLES = 12  # of each call, valid and not
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def service(tiny_checkpoint, tmp_path_factory) -> Iterator[tuple[str, str]]:
    data = tmp_path_factory.mktemp("data")
    with serving(make_settings(tiny_checkpoint, data)) as url:
        yield url, (data / "admin.key").read_text().strip()


@pytest.mark.parametrize("mode", GenerationMode)
def test_replies_are_those_described(service, subtests, mode):
    url, key = service
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    nothing_to_get_wrong = (Unsatisfiable,) if mode is GenerationMode.NEGATIVE else ()  # a call without arguments
    for operation in (result.ok() for result in schema.get_all_operations()):
        with subtests.test(operation.label):

            @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case):
                case.call_and_validate(headers={"Authorization": f"Bearer {key}"}, checks=CHECKS)

            with suppress(*nothing_to_get_wrong):
                check()

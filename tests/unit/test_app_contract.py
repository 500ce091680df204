"""Requests made up from the OpenAPI description, valid and not: each reply is one that the description announces.

Every second call that names a document names one that is there.
"""

from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
import schemathesis
from app_kit import GARDEN, make_settings, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation
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


def upload(url: str, key: str) -> str:
    headers = {"Authorization": f"Bearer {key}"}
    reply = httpx.post(f"{url}/v1/documents", headers=headers, files={"file": ("garden.md", GARDEN.encode())})
    return reply.raise_for_status().json()["data"][0]["id"]


@pytest.mark.parametrize("mode", GenerationMode)
def test_replies_are_those_described(service, subtests, mode):
    url, key = service
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    nothing_to_get_wrong = (Unsatisfiable,) if mode is GenerationMode.NEGATIVE else ()  # a call without arguments
    for operation in (result.ok() for result in schema.get_all_operations()):
        with subtests.test(operation.label), suppress(*nothing_to_get_wrong):
            check_replies(operation, mode, key, upload(url, key) if "{document_id}" in operation.path else "")


def check_replies(operation: APIOperation, mode: GenerationMode, key: str, document_id: str) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), is_there=st.booleans())
    def check(case, is_there):
        if is_there and "document_id" in case.path_parameters:
            case.path_parameters["document_id"] = document_id
        case.call_and_validate(headers={"Authorization": f"Bearer {key}"}, checks=CHECKS)

    check()


def test_every_reply_with_a_body_says_of_what_kind_it_is(service):
    """Clients made from the description take one without for empty."""
    paths = httpx.get(f"{service[0]}/openapi.json").json()["paths"]
    replies = {
        f"{method} {path} {status}": reply
        for path, methods in paths.items()
        for method, operation in methods.items()
        for status, reply in operation["responses"].items()
    }
    assert not [name for name, reply in replies.items() if not reply.get("content") and name[-3:] not in ("204", "304")]

"""The table of errors: every exception a room may raise at a request has its status and code."""

import asyncio
import errno
import json

import pytest
from app_kit import make_settings, running_service

from app.errors import ERRORS, describe_error, kind_of
from app.middleware import RequestFrame
from ingest.files import FileTooLarge
from retrieval.store import StorageFull, StorageUnwritable

CONTRACT = {
    *((401, "unauthorized"), (404, "document_not_found"), (409, "duplicate"), (413, "file_too_large")),
    *((413, "context_too_long"), (415, "unsupported_media_type"), (422, "invalid_request"), (429, "overloaded")),
    (507, "storage_full"),
}


def test_the_codes_of_the_contract_are_there():
    assert {(kind.status, kind.code) for kind in ERRORS.values()} >= CONTRACT


@pytest.mark.parametrize("error", [StorageFull("x"), OSError(errno.ENOSPC, "x")])
def test_a_full_disk_is_507_wherever_it_is_noticed(error):
    assert kind_of(error).status == 507


@pytest.mark.parametrize("error", [StorageUnwritable("x"), OSError(errno.EROFS, "x")])
def test_a_disk_that_takes_no_writes_is_503_wherever_it_is_noticed(error):
    assert (kind_of(error).status, kind_of(error).code) == (503, "storage_not_writable")


def test_a_kind_of_a_listed_error_is_that_error():
    class VeryLarge(FileTooLarge):
        pass

    assert kind_of(VeryLarge("x")).code == "file_too_large"


def test_what_is_our_fault_is_logged_and_not_shown(caplog):
    body = describe_error(KeyError("secret"))
    assert (body["status"], body["code"]) == (500, "internal_error")
    assert "secret" not in str(body) and "secret" in caplog.text


@pytest.mark.anyio
async def test_what_the_server_breaks_off_when_it_stops_is_told_so(tiny_checkpoint, tmp_path):
    async def wait(*_):
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data")) as client:
        sent = []
        frame = RequestFrame(wait, owner=client.app, max_in_flight=1, stall_s=60)
        request = asyncio.create_task(frame({"type": "http", "method": "GET", "path": "/", "headers": []}, wait, send))
        await asyncio.sleep(0)
        request.cancel()
        await request
    problem = json.loads(sent[1]["body"])
    assert (sent[0]["status"], problem["code"], problem["status"]) == (503, "unavailable", 503)
    assert {b"retry-after", b"x-request-id"} <= dict(sent[0]["headers"]).keys()

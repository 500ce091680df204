"""Limits and quotas of keys, by the clock and over HTTP; and the audit log of what keys changed."""

import hashlib
import json
import secrets
import stat

import httpx
import pytest
from app_kit import GARDEN, LIGHTHOUSE, make_settings, running_service, serving
from clock_kit import Clock

from app.audit import AuditLog
from app.auth import LOCAL_ADMIN, Authenticator, Principal, Unauthorized, is_well_formed, new_key
from app.errors import Overloaded, error_headers
from app.http_client import CommandFailed, Service, open_service, sign_in
from app.limits import KeyLimits, Meter, RateLimited
from app.pace import Pace

pytestmark = pytest.mark.anyio

ME, OTHER = Principal("key_me", "writer"), Principal("key_other", "writer")
NOON = 86_400 * 20_000 + 43_200.0


def meter(store, clock=None, **limits: int) -> Meter:
    return Meter(store, KeyLimits(**limits), clock or Clock(NOON))


def refused_for(call, *arguments) -> int:
    with pytest.raises(RateLimited) as caught:
        call(*arguments)
    return caught.value.retry_after_s


def test_a_minutes_requests_come_back_evenly_and_each_key_has_its_own(store):
    clock = Clock(NOON)
    limited = meter(store, clock, requests_per_minute=6)
    for _ in range(6):
        limited.admit_request(ME)
    assert refused_for(limited.admit_request, ME) == 10
    limited.admit_request(OTHER)
    clock.now += 10
    limited.admit_request(ME)
    assert refused_for(limited.admit_request, ME) == 10
    clock.now += 3600
    for _ in range(6):
        limited.admit_request(ME)
    refused_for(limited.admit_request, ME)


def test_an_answer_over_the_limit_is_paid_back_before_the_next(store):
    clock = Clock(NOON)
    limited = meter(store, clock, tokens_per_minute=600)
    limited.admit_answer(ME)
    limited.charge_tokens(ME, 1199)
    assert refused_for(limited.admit_answer, ME) == 60
    clock.now += 60
    limited.admit_answer(ME)


def test_as_many_answers_are_taken_on_as_are_finished_in_time():
    clock = Clock(NOON)
    pace = Pace(max_pending=64, max_wait_s=30, clock=clock)

    def places() -> int:
        for pending in range(65):
            try:
                pace.admit(pending)
            except Overloaded:
                return pending
        raise AssertionError("no limit")

    def answer(seconds: float, beside: float = 0) -> None:
        admitted = pace.admit(0) - beside
        clock.now += seconds
        pace.finish(admitted, pending=1)

    assert places() == 31  # nothing is known yet
    for _ in range(64):
        answer(0.1)
    assert places() == 64
    answer(120)  # one question about a whole library: the mean is 2 s
    assert places() == 14
    for _ in range(64):
        clock.now += 1000  # nobody asks
        answer(20)
    assert places() == 2
    with pytest.raises(Overloaded, match="takes about 80 s; the limit is 30 s; try again in 50 s") as caught:
        pace.admit(4)
    assert error_headers(caught.value, 429) == {"Retry-After": "50"}
    for _ in range(64):
        answer(2, beside=100)  # of many at once, each had waited long, and one came after the other
    assert places() == 16
    clock.now += 1e7  # nobody asks, and nothing better is known
    assert places() == 16
    answer(0.1)
    assert places() == 64
    assert Pace(max_pending=99, max_wait_s=0).admit(98)


def test_answers_that_finish_side_by_side_say_more_than_those_that_took_long_alone():
    clock = Clock(NOON)
    pace = Pace(max_pending=64, max_wait_s=30, clock=clock)
    for _ in range(4):  # a service begins with questions that are prefilled whole
        admitted = pace.admit(0)
        clock.now += 6
        pace.finish(admitted, pending=1)
    with pytest.raises(Overloaded):
        pace.admit(6)
    admitted = [pace.admit(i) for i in range(5)]
    for i, one in enumerate(admitted):
        clock.now += 0.2
        pace.finish(one, pending=5 - i)
    assert pace.admit(20)


def test_a_days_bytes_survive_a_restart_and_end_at_midnight(store):
    clock = Clock(NOON)
    first = meter(store, clock, upload_bytes_per_day=100)
    first.charge_bytes(ME, 70)
    first.save(ME)
    again = meter(store, clock, upload_bytes_per_day=100)
    assert refused_for(again.charge_bytes, ME, 31) == 43_200
    again.charge_bytes(ME, 30)
    assert refused_for(again.charge_bytes, ME, 0) == 43_200
    clock.now += 43_200
    again.charge_bytes(ME, 100)


def test_a_keys_own_limits_stand_before_the_deployments_and_survive_a_restart(store):
    limited = meter(store, requests_per_minute=1, tokens_per_minute=5)
    limited.set_own_limits("key_me", {"requests_per_minute": 0, "tokens_per_minute": None})
    for again in (limited, meter(store, requests_per_minute=1, tokens_per_minute=5)):
        assert again.limits_of("key_me") == KeyLimits(tokens_per_minute=5)
        for _ in range(5):
            again.admit_request(ME)
    limited.admit_request(OTHER)
    refused_for(limited.admit_request, OTHER)


def test_without_keys_nobody_is_limited(store):
    limited = meter(store, requests_per_minute=1, upload_bytes_per_day=1)
    for _ in range(3):
        limited.admit_request(LOCAL_ADMIN)
        limited.charge_bytes(LOCAL_ADMIN, 10)


def test_a_key_of_another_database_is_refused_by_its_check(store):
    assert is_well_formed(new_key(b"salt"), b"salt")
    assert not is_well_formed(new_key(b"salt"), b"pepper")
    assert not is_well_formed("", b"salt") and not is_well_formed("jrk_", b"salt")


def test_keys_of_the_first_release_stay_valid_until_they_are_revoked(store, tmp_path):
    old = "jrk_" + secrets.token_urlsafe(32)
    row = store.add_key("admin", "admin", hashlib.sha256(old.encode()).hexdigest())
    authenticator = Authenticator(store, True)
    authenticator.ensure_admin_key(tmp_path)
    assert not (tmp_path / "admin.key").exists() and len(store.list_keys()) == 1
    assert authenticator.authenticate(f"Bearer {old}").role == "admin"
    store.revoke_key(row.id)
    with pytest.raises(Unauthorized):
        authenticator.authenticate(f"Bearer {old}")


async def new_client(client, **body):
    made = (await client.post("/v1/keys", json={"name": "k", "role": "writer", **body})).json()
    return made, {"Authorization": f"Bearer {made['key']}"}


async def test_requests_over_the_limit_are_429_with_the_time_to_wait(client):
    _, headers = await new_client(client, limits={"requests_per_minute": 2})
    replies = [await client.get("/v1/collections", headers=headers) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[2].json()["code"] == "rate_limited" and 0 < int(replies[2].headers["retry-after"]) <= 30
    assert (await client.get("/v1/collections")).status_code == 200


async def test_tokens_over_the_limit_are_429_for_answers_alone(client):
    await client.upload("a.md", LIGHTHOUSE)
    _, headers = await new_client(client, limits={"tokens_per_minute": 1})
    asked = {"question": "Who is the keeper?"}
    assert (await client.post("/v1/answers", json=asked, headers=headers)).status_code == 200
    for path, body in (
        ("/v1/answers", asked),
        ("/v1/chat/completions", {"model": "jamba-rag/default", "messages": [{"role": "user", "content": "Who?"}]}),
    ):
        refused = await client.post(path, json=body, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert int(refused.headers["retry-after"]) > 60
    assert (await client.post("/v1/search", json={"query": "keeper"}, headers=headers)).status_code == 200


async def test_bytes_over_the_quota_are_429_and_nothing_of_the_upload_is_kept(client):
    before = {path.name for path in client.app.state.service.files.directory.iterdir()}
    _, headers = await new_client(client, limits={"upload_bytes_per_day": 1000})
    files = [("file", (f"{number}.txt", bytes([97 + number]) * 400)) for number in range(3)]
    refused = await client.post("/v1/documents", files=files, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert int(refused.headers["retry-after"]) > 0
    assert {path.name for path in client.app.state.service.files.directory.iterdir()} == before
    small = {"file": ("small.txt", b"small")}
    assert (await client.post("/v1/documents", files=small, headers=headers)).status_code == 202


async def test_documents_over_the_quota_are_507_and_those_there_stay_duplicates(client):
    await client.post("/v1/collections", json={"name": "small"})
    _, headers = await new_client(client, limits={"documents_per_collection": 1})
    fields = {"collection": "small"}
    both = [("file", ("a.md", LIGHTHOUSE.encode())), ("file", ("b.md", GARDEN.encode()))]
    reply = await client.post("/v1/documents", files=both, data=fields, headers=headers)
    assert reply.status_code == 202 and len(reply.json()["data"]) == 1
    assert [error["code"] for error in reply.json()["errors"]] == ["collection_full"]
    again = await client.post("/v1/documents", files=both[:1], data=fields, headers=headers)
    assert again.status_code == 200 and again.json()["data"][0]["duplicate_of"]
    full = await client.post("/v1/documents", files=both[1:], data=fields, headers=headers)
    assert (full.status_code, full.json()["code"]) == (507, "collection_full")
    assert (await client.post("/v1/documents", files=both[1:], data=fields)).status_code == 202


async def test_keys_show_the_limits_that_hold_for_them(tiny_checkpoint, tmp_path):
    settings = make_settings(tiny_checkpoint, tmp_path / "data", limits={"requests_per_minute": 90})
    async with running_service(settings) as client:
        made, _ = await new_client(client, limits={"tokens_per_minute": 7})
        listed = (await client.get("/v1/keys")).json()["data"]
    assert made["limits"] == listed[1]["limits"]
    assert (made["limits"]["requests_per_minute"], made["limits"]["tokens_per_minute"]) == (90, 7)
    assert "key" not in listed[1]


async def test_writes_are_audited_with_who_what_and_how_it_ended(tiny_checkpoint, tmp_path):
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data")) as client:
        document = await client.upload("secret-name.md", LIGHTHOUSE)
        made, headers = await new_client(client, role="reader")
        deleted = f"/v1/documents/{document['id']}"
        refused = await client.delete(deleted, headers=headers | {"X-Request-ID": "refused-1"})
        await client.delete(deleted)
        await client.delete(deleted, headers={"Authorization": "Bearer wrong"})
        await client.post("/v1/collections", json={"name": "new"})
        await client.post("/v1/search", json={"query": "who?"})
        (admin,) = [key["id"] for key in (await client.get("/v1/keys")).json()["data"] if key["name"] == "admin"]
        key = client.headers["Authorization"].removeprefix("Bearer ")
    assert refused.status_code == 403
    path = tmp_path / "data" / "audit" / "audit.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = [(line["key"], line["method"], line["path"], line["status"], line["written"]) for line in lines]
    assert found == [
        (admin, "POST", "/v1/documents", 202, [document["id"]]),
        (admin, "POST", "/v1/keys", 201, [made["id"]]),
        (made["id"], "DELETE", deleted, 403, []),
        (admin, "DELETE", deleted, 204, []),
        (None, "DELETE", deleted, 401, []),
        (admin, "POST", "/v1/collections", 201, ["new"]),
    ]
    assert lines[2]["request_id"] == "refused-1" and lines[2]["role"] == "reader" and lines[2]["ts"]
    assert not any(secret in path.read_text() for secret in (key, made["key"], "secret-name", "lighthouse"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_audit_log_is_rotated_by_size_and_the_oldest_file_goes(tmp_path):
    audit = AuditLog(tmp_path / "audit", max_bytes=200, files=3)
    for number in range(20):
        audit.write(number=number)
    files = [tmp_path / "audit" / name for name in ("audit.jsonl.2", "audit.jsonl.1", "audit.jsonl")]
    assert sorted(files) == sorted((tmp_path / "audit").iterdir())
    numbers = [json.loads(line)["number"] for file in files for line in file.read_text().splitlines()]
    assert numbers == list(range(numbers[0], 20)) and numbers[0] > 0
    assert all(file.stat().st_size <= 200 for file in files)


def test_an_audit_log_that_cannot_be_written_is_said_and_stops_nobody(tmp_path, caplog):
    audit = AuditLog(tmp_path / "audit", max_bytes=200, files=2)
    (tmp_path / "audit").rmdir()
    audit.write(path="/v1/documents")
    assert "cannot be written" in caplog.text and "/v1/documents" in caplog.text


def test_the_command_lines_client_waits_as_long_as_it_is_told_and_gives_up_after_its_limit(tiny_checkpoint, tmp_path):
    settings = make_settings(tiny_checkpoint, tmp_path / "data")
    with serving(settings) as url:
        with open_service(url, (settings.data_dir / "admin.key").read_text().strip()) as admin:
            made = admin.request("POST", "/v1/keys", json={"name": "slow", "limits": {"requests_per_minute": 30}})
        with httpx.Client(base_url=url, headers=sign_in(made["key"])) as http:
            patient, hasty = Service(http), Service(http, max_wait_s=0)
            for _ in range(30):
                hasty.request("GET", "/v1/collections")
            with pytest.raises(CommandFailed, match="30 requests a minute"):
                hasty.request("GET", "/v1/collections")
            assert patient.request("GET", "/v1/collections")["data"]
            with pytest.raises(CommandFailed, match="30 requests a minute"):
                list(hasty.stream("/v1/answers", {"question": "Who?", "stream": True}))
            events = [type for type, _ in patient.stream("/v1/answers", {"question": "Who?", "stream": True})]
            assert events[-1] == "answer.completed"

"""What an operator sees: metrics that say where the time went, a dashboard of nothing else, and traces."""

import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from app_kit import LIGHTHOUSE, make_settings, running_service, serving
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from app.datadir import DataDir, DataDirInUse
from app.observed_store import ObservedStore
from app.settings import SettingsError
from app.tracing import Tracing

pytestmark = pytest.mark.anyio

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana-dashboard.json"
STAGES = {"retrieval", "pack", "queue", "state_load", "prefill", "ttft", "generation"}
FUNCTIONS = {"histogram_quantile", "rate", "sum", "by", "le"}


async def samples(client) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Name -> (labels, value) of everything at /metrics."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


async def test_metrics_say_where_the_time_of_answers_and_documents_went(client):
    await client.upload("a.md", LIGHTHOUSE)
    for _ in range(2):
        answer = await client.ask("Who is the keeper?")
    assert answer["cache"]["tier"] == "host"
    found = await samples(client)
    counts = {(labels["stage"], labels["tier"]): n for labels, n in found["jamba_rag_answer_stage_seconds_count"]}
    assert counts == {(stage, tier): 1 for stage in STAGES for tier in ("none", "host")}
    ingested = {labels["stage"]: n for labels, n in found["jamba_rag_ingest_stage_seconds_count"]}
    assert ingested == dict.fromkeys(("queued", "parsing", "chunking", "embedding", "indexing"), 1)
    assert found["jamba_rag_ingested_total"] == [({"outcome": "ready"}, 1)]
    assert ({"status": "ready"}, 1) in found["jamba_rag_documents"]
    events = {labels["event"]: n for labels, n in found["jamba_rag_prefix_cache_events_total"]}
    assert events["lookups"] == 2 and events["hits"] == 1 and events["cached_tokens"] > 0
    guessed = {labels["outcome"]: n for labels, n in found["jamba_rag_draft_tokens_total"]}
    assert guessed["accepted"] > 0 and guessed.keys() == {"accepted", "rejected"}
    stores = {(labels["tier"], labels["what"]): value for labels, value in found["jamba_rag_state_store"]}
    assert 0 < stores["host", "bytes"] < stores["host", "max_bytes"]
    assert stores["host", "read_bytes"] > 0 and stores["host", "written_bytes"] == stores["host", "bytes"]
    moved = {(labels["what"], labels["tier"]): n for labels, n in found["jamba_rag_state_seconds_count"]}
    assert moved.keys() == {("save", "host"), ("load", "host")}
    assert found["jamba_rag_http_requests_in_flight"] == [({}, 1)]
    assert found["process_resident_memory_bytes"][0][1] > 1e6


async def test_the_dashboard_counts_one_answer_as_one_sequence_though_tokens_are_guessed(client):
    await client.upload("a.md", LIGHTHOUSE)
    await client.ask("Who is the keeper?")
    found = await samples(client)
    panels = {panel["title"]: panel for panel in json.loads(DASHBOARD.read_text())["panels"]}
    expression = panels["Sequences decoded together"]["targets"][0]["expr"]
    for name, label, wanted in re.findall(r'rate\((\w+)\{(\w+)="(\w+)"\}\[\$__rate_interval\]\)', expression):
        value = next(value for labels, value in found[name] if labels[label] == wanted)
        expression = expression.replace(f'rate({name}{{{label}="{wanted}"}}[$__rate_interval])', str(value))
    assert found["jamba_rag_draft_tokens_total"][0][1] > 0 and eval(expression, {"sum": float}) == 1


async def test_a_fault_has_the_id_under_which_the_log_has_its_cause(client, monkeypatch, caplog):
    monkeypatch.setattr(client.app.state.service, "search", lambda *_: {}["secret"])
    reply = await client.post("/v1/search", json={"query": "owl"}, headers={"X-Request-ID": "failed-1"})
    assert (reply.status_code, reply.json()["request_id"]) == (500, "failed-1")
    assert reply.headers["x-request-id"] == "failed-1" and reply.headers["x-content-type-options"] == "nosniff"
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError]
    counts = (await samples(client))["jamba_rag_http_requests_total"]
    assert {"method": "POST", "route": "/v1/search", "status": "500"} in [labels for labels, _ in counts]


async def test_a_service_that_cannot_write_answers_and_says_so(tiny_checkpoint, tmp_path):
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data")) as client:
        await client.upload("a.md", LIGHTHOUSE)
        assert (await client.get("/readyz")).json()["checks"]["storage"] == "ok"
        (tmp_path / "data" / "files").rename(tmp_path / "away")
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "ready")
        assert ready.json()["checks"]["storage"].endswith("the data directory cannot be written")
        refused = await client.post("/v1/documents", files={"file": ("b.md", b"text")})
        assert (refused.status_code, refused.json()["code"]) == (503, "storage_not_writable")
        assert int(refused.headers["retry-after"]) > 0
        assert (await client.ask("Who is the keeper?"))["text"]
        (tmp_path / "away").rename(tmp_path / "data" / "files")
        assert (await client.upload("b.md", "text"))["status"] == "ready"


async def test_an_index_that_cannot_be_saved_stops_in_order(tiny_checkpoint, tmp_path, caplog):
    settings, index = make_settings(tiny_checkpoint, tmp_path / "data"), tmp_path / "data" / "faiss"
    async with running_service(settings) as client:
        await client.upload("a.md", LIGHTHOUSE)
        shutil.rmtree(index, ignore_errors=True)
        index.touch()
    assert "vector index cannot be saved" in caplog.text
    index.unlink()
    async with running_service(settings) as client:
        assert (await client.ask("Who is the keeper?"))["text"]


async def test_what_is_ingested_beyond_the_stop_keeps_the_database_open(tiny_checkpoint, tmp_path, monkeypatch, caplog):
    entered, opened, after, closed = threading.Event(), threading.Event(), [], []

    def ingest_slowly(job, *parts):
        entered.set()
        assert opened.wait(30)
        after.append(job.store.get_document(job.document.id).status)
        return 0

    monkeypatch.setattr("ingest.jobs.ingest_document", ingest_slowly)
    close = ObservedStore.close
    monkeypatch.setattr(ObservedStore, "close", closed.append)
    settings = make_settings(tiny_checkpoint, tmp_path / "data", server={"shutdown_s": 0})
    async with running_service(settings) as client:
        await client.post("/v1/documents", files={"file": ("a.md", LIGHTHOUSE.encode())})
        assert entered.wait(30)
    assert "ingestion has not ended within 1 s" in caplog.text
    assert closed == []
    with pytest.raises(DataDirInUse):
        DataDir(tmp_path / "data")
    opened.set()
    for thread in [one for one in threading.enumerate() if one.name.startswith("ingest-")]:
        thread.join(30)
    assert after == ["queued"]
    close(client.app.state.service.store)


async def test_the_time_of_a_stage_that_was_given_up_is_not_counted(tmp_path, monkeypatch):
    store, stages, now = ObservedStore(tmp_path / "rag.sqlite3"), [], iter(range(100))
    monkeypatch.setattr("app.observed_store.time.perf_counter", lambda: next(now))
    store.create_document("default", "a.txt", "text/plain", 1, "digest")
    store.on_stage = lambda stage, seconds: stages.append((stage, seconds))
    for _ in range(3):
        document = store.lease_next("worker", 60)
        store.set_progress(document.id, "parsing", version=1, worker_id="worker")
        store.release_lease(document.id, "worker", version=1)
    document = store.lease_next("worker", 60)
    for stage in ("parsing", "chunking"):
        store.set_progress(document.id, stage, version=1, worker_id="worker")
    assert stages[-1] == ("parsing", 1)
    store.close()


async def test_a_document_that_fails_is_counted(client):
    before = dict((labels["outcome"], n) for labels, n in (await samples(client)).get("jamba_rag_ingested_total", []))
    assert (await client.upload("broken.pdf", b"%PDF-1.4 nothing"))["status"] == "failed"
    after = dict((labels["outcome"], n) for labels, n in (await samples(client))["jamba_rag_ingested_total"])
    assert after["failed"] == before.get("failed", 0) + 1


async def test_the_dashboard_shows_only_what_is_measured_and_all_of_it(client):
    await client.upload("a.md", LIGHTHOUSE)
    await client.ask("Who is the keeper?")
    found = await samples(client)
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    shown: set[str] = set()
    for query in queries:
        for name, selector in re.findall(r"((?:jamba_rag|process)_\w+)(\{[^}]*\})?", query):
            shown.add(name)
            assert name in found, query
            for label, _, pattern in re.findall(r'(\w+)(=~?)"([^"]*)"', selector):
                values = {labels[label] for labels, _ in found[name]}
                assert values & set(pattern.split("|")), query
        for labels in re.findall(r"by \(([^)]*)\)", query):
            names = set(re.findall(r"(?:jamba_rag|process)_\w+", query))
            assert all(set(labels.split(", ")) <= set(found[name][0][0]) for name in names), query
    measured = {name for name in found if name.startswith("jamba_rag_") and not name.endswith(("_created", "_sum"))}
    assert {name for name in measured if name not in shown and not name.endswith("_count")} == set()


class Collector(HTTPServer):
    """Takes traces as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Take)
        self.spans: list = []
        self.paths: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Take(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.server.paths.add(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector():
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_request_is_a_trace_with_a_span_for_each_stage(tiny_checkpoint, tmp_path, collector):
    settings = make_settings(tiny_checkpoint, tmp_path / "data", telemetry={"otlp_endpoint": collector.url})
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(settings) as url:
        key = (settings.data_dir / "admin.key").read_text().strip()
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
            document = http.post("/v1/documents", files={"file": ("a.md", LIGHTHOUSE.encode())}).json()["data"][0]
            http.get(f"/v1/documents/{document['id']}/events")
            asked = {"question": "Who is the keeper?", "stream": True}
            http.post("/v1/answers", json=asked, headers={"traceparent": caller, "X-Request-ID": "traced-1"})
    assert collector.paths == {"/v1/traces"}
    (request,) = [span for span in collector.spans if span.name == "POST /v1/answers"]
    assert request.trace_id.hex() in caller and request.parent_span_id.hex() in caller
    attributes = {attribute.key: attribute.value for attribute in request.attributes}
    assert attributes["request_id"].string_value == "traced-1"
    assert attributes["http.response.status_code"].int_value == 200
    stages = [span for span in collector.spans if span.parent_span_id == request.span_id]
    stages.sort(key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))
    assert {span.name for span in stages} == {"retrieve", "pack", "queue", "state_load", "prefill", "decode"}
    assert (stages[0].name, stages[-1].name) == ("retrieve", "decode")
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in stages)
    assert "keeper" not in str(collector.spans)


async def test_a_collector_that_is_gone_costs_no_answer(tiny_checkpoint, tmp_path):
    settings = make_settings(tiny_checkpoint, tmp_path / "data", telemetry={"otlp_endpoint": "http://127.0.0.1:9"})
    async with running_service(settings) as client:
        await client.upload("a.md", LIGHTHOUSE)
        assert (await client.ask("Who is the keeper?"))["citations"]


def test_an_endpoint_without_the_sdk_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"jamba-rag\[otel\]"):
        Tracing("http://127.0.0.1:9")
    assert Tracing(None).current_trace_id() is None

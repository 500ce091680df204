"""A service whose Redis cannot be used says why at its start and answers all the same; the password is nowhere."""

import logging

import pytest
from app_kit import GARDEN, LIGHTHOUSE, make_settings, running_service
from state_kit import all_keys, running_server
from tls_kit import Authority, tls_in_front_of

from app.main import create_app
from app.settings import SettingsError


@pytest.mark.anyio
async def test_a_service_goes_on_without_a_redis_that_it_cannot_trust(tiny_checkpoint, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    authority, other = Authority(tmp_path / "authority"), Authority(tmp_path / "other")
    with running_server() as server, tls_in_front_of(server.port, authority.issue()) as port:
        url = f"rediss://me:s3cr3t@127.0.0.1:{port}?ssl_ca_certs={other.ca}"
        settings = make_settings(tiny_checkpoint, tmp_path / "data", redis={"url": url, "timeout_s": 5})
        async with running_service(settings) as client:
            await client.upload("lighthouse.md", LIGHTHOUSE)
            answer = await client.ask("When was it built?")
            assert answer["usage"]["output_tokens"] > 0
            pages = [(await client.get(path)).text for path in ("/metrics", "/v1/config", "/readyz")]
        assert "its certificate is not accepted (unable to get local issuer certificate)" in caplog.text
        assert "rediss://***@127.0.0.1" in pages[1]
        assert "s3cr3t" not in caplog.text + "".join(pages)
        assert all_keys(server) == []


@pytest.mark.anyio
async def test_int8_snapshots_come_back_after_a_restart_and_are_not_read_by_a_service_without_them(
    tiny_checkpoint, tmp_path
):
    with running_server() as server:
        answers = []
        for dtype in ("int8", "int8", "float32"):
            settings = make_settings(
                tiny_checkpoint,
                tmp_path / "data",
                redis={"url": server.connection_url, "timeout_s": 5},
                cache={"snapshot_dtype": dtype},
            )
            async with running_service(settings) as client:
                await client.upload("lighthouse.md", LIGHTHOUSE)
                answers.append(await client.ask("When was it built?"))
                client.app.state.service.cache.flush(10)
                metrics = (await client.get("/metrics")).text
                assert 'jamba_rag_state_seconds_count{tier="redis",what="save"}' in metrics or len(answers) == 2
                assert ('jamba_rag_state_seconds_count{tier="redis",what="load"}' in metrics) == (len(answers) == 2)
        first, again, without = answers
        assert first["cache"]["tier"] == without["cache"]["tier"] == "none"
        assert again["cache"]["tier"] == "redis" and again["usage"]["cached_input_tokens"] > 0
        assert (again["text"], again["citations"]) == (first["text"], first["citations"])


@pytest.mark.anyio
@pytest.mark.parametrize("change", ["delete a collection", "replace a document"])
async def test_states_that_a_crash_left_of_a_document_go_at_the_next_start(
    tiny_checkpoint, tmp_path, monkeypatch, change
):
    with running_server() as server:
        redis = {"url": server.connection_url, "timeout_s": 5}
        settings = make_settings(tiny_checkpoint, tmp_path / "data", redis=redis)
        async with running_service(settings) as client:
            kept = await client.upload("garden.md", GARDEN)
            await client.post("/v1/collections", json={"name": "towers"})
            document = await client.upload("lighthouse.md", LIGHTHOUSE, collection="towers")
            for collection in ("default", "towers"):
                await client.ask("When was it built?", collections=[collection])
            service = client.app.state.service
            assert service.cache.flush(10)
            monkeypatch.setattr(service.cache, "invalidate", crash)
            if change == "delete a collection":
                assert (await client.delete("/v1/collections/towers")).status_code == 500
            else:
                await client.put(f"/v1/documents/{document['id']}", files={"file": ("lighthouse.md", b"It is gone.")})
                await client.settle(document["id"])
        gone, stays = (b"jamba-rag:tag:" + one["id"].encode() for one in (document, kept))
        assert {gone, stays} < set(all_keys(server))
        async with running_service(settings) as client:
            assert gone not in all_keys(server) and stays in all_keys(server)
            assert client.app.state.service.store.to_forget() == []


def crash(document_ids) -> None:
    raise RuntimeError("the process ends here")


def test_what_is_no_address_stops_the_start_and_is_not_repeated(tiny_checkpoint, tmp_path):
    settings = make_settings(tiny_checkpoint, tmp_path, redis={"url": "redis://me:s3cr3t/x@host"})
    with pytest.raises(SettingsError, match="JAMBA_RAG_REDIS__URL is not the address of a Redis server") as refused:
        create_app(settings)
    assert "s3cr3t" not in str(refused.value)

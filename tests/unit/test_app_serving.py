"""Whether the address of the service is taken, before anything is loaded; and what is no request of HTTP's own."""

import asyncio
import http.client
import json
import logging
import socket

import httpx
import pytest
import uvicorn
from app_kit import make_settings, serving

from app.main import create_app
from app.serving import SteadyServer, check_address


def test_a_port_is_taken_only_where_it_is():
    """IPv4 and IPv6 have each their own."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="another does"):
            check_address("127.0.0.1", port)
        check_address("::", port)
    check_address("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_an_address_that_cannot_be_had_is_known_before_anything_is_loaded(host):
    with pytest.raises(OSError, match=f"cannot listen on {host}:0: [A-Z]"):
        check_address(host, 0)


def test_an_upgrade_is_refused_as_any_request_is(tiny_checkpoint, tmp_path):
    wanted = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    with serving(make_settings(tiny_checkpoint, tmp_path / "data")) as url:
        reply = httpx.get(f"{url}/v1/documents", headers=wanted)
        assert httpx.get(f"{url}/healthz", headers=wanted).status_code == 200
    assert (reply.status_code, reply.json()["code"]) == (401, "unauthorized")
    assert reply.headers["content-type"] == "application/problem+json"


def test_a_target_with_its_host_is_served_as_its_path(tiny_checkpoint, tmp_path):
    with serving(make_settings(tiny_checkpoint, tmp_path / "data", auth={"enabled": False})) as url:

        def get(target: str) -> tuple[int, dict]:
            connection = http.client.HTTPConnection(url.removeprefix("http://"))
            connection.request("GET", target, headers={"Host": "localhost"})
            reply = connection.getresponse()
            body = json.loads(reply.read())
            connection.close()
            return reply.status, body

        assert get(f"{url}/v1/documents?limit=3") == get("/v1/documents?limit=3")
        assert "no collection 'a b'" in get("HTTP://localhost/v1/collections/a%20b")[1]["detail"]
        status, refused = get("http://elsewhere.example/v1/documents")  # whatever the header says
    assert (status, refused["code"]) == (403, "forbidden")


@pytest.mark.anyio
async def test_a_second_ctrl_c_ends_in_order_though_a_request_is_open(tiny_checkpoint, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = uvicorn.Config(create_app(make_settings(tiny_checkpoint, tmp_path / "data")), port=0, log_config=None)
    server = SteadyServer(config, stall_s=30)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
    key = (tmp_path / "data" / "admin.key").read_bytes().strip()
    writer.write(b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
    writer.write(b"Authorization: Bearer " + key + b"\r\n\r\n")
    while not server.server_state.tasks:
        await asyncio.sleep(0.01)
    server.should_exit = True
    await asyncio.sleep(0.3)
    server.force_exit = True
    await serving
    assert b" 503 " in await reader.readline()
    writer.close()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert "Application shutdown complete." in caplog.text

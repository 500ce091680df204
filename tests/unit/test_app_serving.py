"""Whether the address of the service is taken, before anything is loaded; and what is no request of HTTP's own."""

import socket

import httpx
import pytest
from app_kit import make_settings, serving

from app.serving import check_address


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

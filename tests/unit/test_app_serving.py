"""Whether the address of the service is taken, before anything is loaded."""

import socket

import pytest

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
    check_address("no-such-host.invalid", port)

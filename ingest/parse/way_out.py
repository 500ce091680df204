"""A child process that tests whether it can open a socket, as a compromised parser would."""

import json
import socket

from ingest.parse.child import ParseLimits, answer_parent
from ingest.parse.seccomp import REFUSED, block_network


def main(raw_limits: str) -> None:
    answer_parent(ParseLimits(*json.loads(raw_limits)), _look)


def _look() -> str | None:
    try:
        socket.socket().close()
    except OSError as error:
        return None if error.errno == REFUSED else str(error)
    return block_network() or "the filter is in place and does not hold"

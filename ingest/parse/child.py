"""The child's half of cage.py. It imports little, because every document pays for it."""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ingest.parse import MAX_OUTPUT_BYTES, ParseError, output_too_large, parse_file
from ingest.parse.seccomp import REFUSED, block_network
from ingest.parse.wire import to_json


class ParseLimits(NamedTuple):
    """Resource limits for one document."""

    wall_s: float = 300.0
    cpu_s: int = 240
    memory_bytes: int = 2 * 1024**3  # address space of the child
    output_bytes: int = MAX_OUTPUT_BYTES
    pages: int = 20_000


def memory_exceeded(limits: ParseLimits) -> ParseError:
    return ParseError(
        "memory_limit",
        f"reading the document takes over {limits.memory_bytes // 1024**2} MiB of memory; split it, or raise the limit",
    )


def network_refused() -> ParseError:
    return ParseError(
        "network_refused", "the document asks for something on the network, which no parser may reach; embed it instead"
    )


def _set_limits(limits: ParseLimits) -> None:
    """Limit this process irrevocably. The alarm ends it even if the parent, which enforces wall time, is gone."""
    for what, value in (
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(what, (value, value + (what == resource.RLIMIT_CPU)))
    signal.alarm(int(limits.wall_s) + 5)


def main(path: str, media_type: str, raw_limits: str) -> None:
    """Entry point of the parsing child."""
    limits = ParseLimits(*json.loads(raw_limits))
    answer_parent(
        limits,
        lambda: to_json(parse_file(Path(path), media_type, max_pages=limits.pages, report=_send_progress)),
    )


def answer_parent(limits: ParseLimits, work: Callable[[], Any]) -> NoReturn:
    """Do the child's work within the limits, write its result or error to stdout, and exit.

    Blocks network access if possible; otherwise reports to the parent why not, and continues.
    """
    _set_limits(limits)
    if (exposed := block_network()) is not None:
        _send({"exposed": exposed})
    try:
        answer: dict[str, Any] = {"result": work()}
    except ParseError as error:
        answer = {"error": _error_json(error)}
    except OSError as error:
        if error.errno != REFUSED:
            raise
        answer = {"error": _error_json(network_refused())}
    except MemoryError:
        answer = {"error": _error_json(memory_exceeded(limits))}
    line = json.dumps(answer, ensure_ascii=False).encode() + b"\n"
    if len(line) > limits.output_bytes:
        line = json.dumps({"error": _error_json(output_too_large(limits.output_bytes))}).encode() + b"\n"
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
    os._exit(0)  # skip the interpreter's shutdown; everything is flushed


def _send_progress(done: int, total: int) -> None:
    _send({"progress": [done, total]})


def _send(message: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


def _error_json(error: ParseError) -> dict[str, Any]:
    return {"code": error.code, "message": str(error), "page": error.page, "retryable": error.retryable}

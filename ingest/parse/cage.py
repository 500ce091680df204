"""Runs a parser in a sandboxed child process, so that crashes, hangs and memory exhaustion do not harm the service.

This is the parent's half, child.py the child's; they are separate, because every child imports its half, and starting
the child dominates the cost of small documents. The child has a minimal environment, its own session, hard limits and
no network (seccomp.py). It writes JSON lines to stdout: any number of progress lines, then one result. Other work on
untrusted files also uses `run_in_child`. Start at `parse_in_child`.
"""

import contextlib
import json
import logging
import os
import selectors
import signal
import site
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ingest.parse import ParseError, Report, output_too_large
from ingest.parse.child import ParseLimits, memory_exceeded
from ingest.parse.wire import from_json
from retrieval.parsed import ParsedDocument

_LOG = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[2]
# The child starts without `site`, whose .pth files take a third of the startup time, so it needs the package paths.
_PATHS = json.dumps([str(_ROOT), *site.getsitepackages()])
_START = (
    "import sys, json, importlib; sys.path[:0] = json.loads(sys.argv[1]);"
    "importlib.import_module(sys.argv[2]).main(*sys.argv[3:])"
)
_MAX_STDERR_BYTES = 16 * 1024
_READ_BYTES = 256 * 1024
_CHECK_EVERY_S = 0.05
_END_S = 5.0  # timeout for a child to exit after closing its output
_FULL = 0.75  # share of the memory limit that counts as full: samples lag, and lack the failed allocation


@dataclass(slots=True)
class _Seen:
    """What the parent observes of a child besides stdout: stderr, and the peak address space."""

    errors: bytearray = field(default_factory=bytearray)
    peak_bytes: int = 0


def parse_in_child(
    path: Path,
    media_type: str,
    limits: ParseLimits | None = None,
    report: Report | None = None,
    check: Callable[[], None] | None = None,
) -> ParsedDocument:
    """Parse in a child process, calling `report` with (pages done, total pages).

    `check` is called several times a second; if it raises, the child is killed and the exception propagates. Raises
    ParseError, for all failures of the child as well.
    """
    arguments = [str(path.resolve()), media_type]
    return from_json(run_in_child("ingest.parse.child", arguments, limits or ParseLimits(), report, check))


def find_way_out(limits: ParseLimits | None = None) -> str | None:
    """None if child processes have no network, which one tries; otherwise why they have. Raises ParseError."""
    return run_in_child("ingest.parse.way_out", [], limits or ParseLimits())


def run_in_child(
    module: str,
    arguments: Sequence[str],
    limits: ParseLimits,
    report: Report | None = None,
    check: Callable[[], None] | None = None,
) -> Any:
    """Run `main(*arguments, limits as JSON)` of `module` in a child process; returns its result by `answer_parent`.

    `report` and `check` as in `parse_in_child`. Raises ParseError, for all failures of the child as well.
    """
    child = subprocess.Popen(
        [sys.executable, "-IS", "-c", _START, _PATHS, module, *arguments, json.dumps(limits)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"LANG": "C.UTF-8", "PATH": os.defpath},
        cwd="/",
        start_new_session=True,
    )
    try:
        seen = _Seen()
        for line in _read_lines(child, limits, seen, check or (lambda: None)):
            message = json.loads(line)
            if "progress" in message:
                if report is not None:
                    report(*message["progress"])
            elif "exposed" in message:
                _warn_of_network(message["exposed"])
            elif "error" in message:
                raise ParseError(**message["error"])
            else:
                return message["result"]
        raise _explain_death(child.wait(_END_S), seen, limits)
    except subprocess.TimeoutExpired as error:
        raise ParseError("parser_crashed", "the parser closed its output without a result and did not end") from error
    except json.JSONDecodeError as error:
        raise ParseError("parser_crashed", "the parser wrote something that is no result; report this file") from error
    finally:
        _kill_group(child)


@cache
def _warn_of_network(reason: str) -> None:
    """Log each reason only once, as it is the same for every document."""
    _LOG.warning("parsers are not kept off the network here: %s", reason)


def _read_lines(
    child: subprocess.Popen[bytes], limits: ParseLimits, seen: _Seen, check: Callable[[], None]
) -> Iterator[bytes]:
    """Lines of the child's stdout as they arrive; records other observations in `seen`. Raises ParseError at limits."""
    assert child.stdout is not None and child.stderr is not None
    deadline, received, rest = time.monotonic() + limits.wall_s, 0, bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        selector.register(child.stderr, selectors.EVENT_READ)
        while selector.get_map():
            check()
            seen.peak_bytes = max(seen.peak_bytes, _address_space(child.pid))
            ready = selector.select(_CHECK_EVERY_S)
            if time.monotonic() > deadline:
                raise ParseError(
                    "parse_timeout",
                    f"reading the document took longer than {limits.wall_s:g} s; split it, or raise the limit",
                    retryable=True,
                )
            for key, _ in ready:
                data = os.read(key.fd, _READ_BYTES)  # available data, without blocking
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is child.stderr:
                    seen.errors += data[: max(0, _MAX_STDERR_BYTES - len(seen.errors))]
                else:
                    received += len(data)
                    if received > limits.output_bytes:
                        raise output_too_large(limits.output_bytes)
                    rest += data
                    if b"\n" in data:
                        *lines, last = bytes(rest).split(b"\n")
                        rest = bytearray(last)
                        yield from lines


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and its descendants, and reap it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM when only the dead leader is left
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()


def _address_space(pid: int) -> int:
    """Peak address space of a running process in bytes; 0 if unknown."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmPeak:"):
                return 1024 * int(line.split()[1])
    return 0


def _explain_death(status: int, seen: _Seen, limits: ParseLimits) -> ParseError:
    """The error for a child that ended without a result."""
    if status in (-signal.SIGXCPU, -signal.SIGALRM):
        return ParseError(
            "parse_timeout",
            f"reading the document took more than {limits.cpu_s} s of CPU time; split it, or raise the limit",
            retryable=True,
        )
    if status == -signal.SIGKILL:
        return ParseError(
            "parser_killed", "the parser was killed from outside, probably for lack of memory; retry it", retryable=True
        )
    last = seen.errors.decode("utf-8", "replace").strip().rpartition("\n")[2][:200]
    if "MemoryError" in last or "bad_alloc" in last or "emory" in last:
        return memory_exceeded(limits)
    if status < 0 and seen.peak_bytes > _FULL * limits.memory_bytes:  # a library that aborts if an allocation fails
        return memory_exceeded(limits)
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    reason = f"{how}: {last}" if last else how
    return ParseError("parser_crashed", f"the parser crashed on this document ({reason}); it is probably damaged")

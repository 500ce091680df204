"""Runs a parser in a child process that can be stopped, starved and killed without harm to the service.

This is the parent's half, child.py the child's: apart, since each child imports its half anew, and the start of a child
is most of what a small document costs. The child gets an empty environment, a session of its own, hard limits and no
network (seccomp.py); it answers in JSON lines on its standard output: any number of progress lines, then one result.
Other work on files from outside stands on `run_in_child` too. Start at `parse_in_child`.
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
# The child starts without `site`, whose .pth files take a third of its start; so it is told where packages are.
_PATHS = json.dumps([str(_ROOT), *site.getsitepackages()])
_START = (
    "import sys, json, importlib; sys.path[:0] = json.loads(sys.argv[1]);"
    "importlib.import_module(sys.argv[2]).main(*sys.argv[3:])"
)
_MAX_STDERR_BYTES = 16 * 1024
_READ_BYTES = 256 * 1024
_CHECK_EVERY_S = 0.05
_END_S = 5.0  # for a child that has closed its output to end
_FULL = 0.75  # of the memory limit: what was seen lags behind, and the allocation that failed is not in it


@dataclass(slots=True)
class _Seen:
    """What the parent has noticed of a child beside its answer: stderr, and the most address space it had."""

    errors: bytearray = field(default_factory=bytearray)
    peak_bytes: int = 0


def parse_in_child(
    path: Path,
    media_type: str,
    limits: ParseLimits | None = None,
    report: Report | None = None,
    check: Callable[[], None] | None = None,
) -> ParsedDocument:
    """Parse in a child process, calling `report` with (pages done, pages in all) on the way.

    `check` is called several times a second; what it raises ends the child and comes out here. Raises ParseError, also
    for every way in which the child can fail.
    """
    arguments = [str(path.resolve()), media_type]
    return from_json(run_in_child("ingest.parse.child", arguments, limits or ParseLimits(), report, check))


def find_way_out(limits: ParseLimits | None = None) -> str | None:
    """None when a child of this service has no network, tried by one; else why it has. Raises ParseError."""
    return run_in_child("ingest.parse.way_out", [], limits or ParseLimits())


def run_in_child(
    module: str,
    arguments: Sequence[str],
    limits: ParseLimits,
    report: Report | None = None,
    check: Callable[[], None] | None = None,
) -> Any:
    """What `module`'s `main(*arguments, limits as JSON)` gives to `answer_parent` in a child process.

    `report` and `check` as in `parse_in_child`. Raises ParseError, also for every way in which the child can fail.
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
    """Once for each reason: it is the same for every document."""
    _LOG.warning("parsers are not kept off the network here: %s", reason)


def _read_lines(
    child: subprocess.Popen[bytes], limits: ParseLimits, seen: _Seen, check: Callable[[], None]
) -> Iterator[bytes]:
    """Lines of the child's stdout as they come, what else it does into `seen`; raises ParseError at the limits."""
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
                data = os.read(key.fd, _READ_BYTES)  # what is there, without waiting for more
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
    """Kill the child and whatever it started, and collect it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM when only the dead leader is left
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()


def _address_space(pid: int) -> int:
    """The most that a living process had so far, in bytes; 0 where the system doesn't say."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmPeak:"):
                return 1024 * int(line.split()[1])
    return 0


def _explain_death(status: int, seen: _Seen, limits: ParseLimits) -> ParseError:
    """Why a child that gave no result ended, in words."""
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
    if status < 0 and seen.peak_bytes > _FULL * limits.memory_bytes:  # a library that aborts when it gets no more
        return memory_exceeded(limits)
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    reason = f"{how}: {last}" if last else how
    return ParseError("parser_crashed", f"the parser crashed on this document ({reason}); it is probably damaged")

"""Runs a parser in a child process that can be stopped, starved and killed without harm to the service.

The parent's half is `parse_in_child`, the child's `main`; both stand on `run_in_child` and `answer_parent`, which serve
other work on files from outside too. The child gets an empty environment, a session of its own and hard limits; it
answers in JSON lines on its standard output: any number of progress lines, then one result.
"""

import contextlib
import dataclasses
import json
import os
import resource
import selectors
import signal
import site
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ingest.parse import ParseError, Report, parse_file
from ingest.parse.wire import from_json, to_json
from retrieval.parsed import ParsedDocument

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
_FULL = 0.75  # of the memory limit: what was seen lags behind, and the allocation that failed is not in it


@dataclass(frozen=True, slots=True)
class ParseLimits:
    """What one document may cost."""

    wall_s: float = 300.0
    cpu_s: int = 240
    memory_bytes: int = 2 * 1024**3  # address space of the child
    output_bytes: int = 256 * 1024**2
    pages: int = 20_000


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
        [sys.executable, "-IS", "-c", _START, _PATHS, module, *arguments, json.dumps(dataclasses.asdict(limits))],
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
            elif "error" in message:
                raise ParseError(**message["error"])
            else:
                return message["result"]
        raise _explain_death(child.wait(), seen, limits)
    except json.JSONDecodeError as error:
        raise ParseError("parser_crashed", "the parser wrote something that is no result; report this file") from error
    finally:
        _kill_group(child)


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
                        raise _output_too_large(limits)
                    rest += data
                    if b"\n" in data:
                        *lines, last = bytes(rest).split(b"\n")
                        rest = bytearray(last)
                        yield from lines


def _output_too_large(limits: ParseLimits) -> ParseError:
    return ParseError(
        "output_too_large", f"the document holds more than {limits.output_bytes} bytes of text; split it into parts"
    )


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
        return _memory_exceeded(limits)
    if status < 0 and seen.peak_bytes > _FULL * limits.memory_bytes:  # a library that aborts when it gets no more
        return _memory_exceeded(limits)
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    reason = f"{how}: {last}" if last else how
    return ParseError("parser_crashed", f"the parser crashed on this document ({reason}); it is probably damaged")


def _memory_exceeded(limits: ParseLimits) -> ParseError:
    return ParseError(
        "memory_limit",
        f"reading the document takes over {limits.memory_bytes // 1024**2} MiB of memory; split it, or raise the limit",
    )


def _set_limits(limits: ParseLimits) -> None:
    """Limit this process for good. The alarm ends it even when the parent is gone and nobody counts wall time."""
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
    """The child that parses."""
    limits = ParseLimits(**json.loads(raw_limits))
    answer_parent(
        limits,
        lambda: to_json(parse_file(Path(path), media_type, max_pages=limits.pages, report=_send_progress)),
    )


def answer_parent(limits: ParseLimits, work: Callable[[], Any]) -> NoReturn:
    """Do the child's work within the limits, write its result or error to standard output, and end the process."""
    _set_limits(limits)
    try:
        answer: dict[str, Any] = {"result": work()}
    except ParseError as error:
        answer = {"error": _error_json(error)}
    except MemoryError:
        answer = {"error": _error_json(_memory_exceeded(limits))}
    line = json.dumps(answer, ensure_ascii=False).encode() + b"\n"
    if len(line) > limits.output_bytes:
        line = json.dumps({"error": _error_json(_output_too_large(limits))}).encode() + b"\n"
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
    os._exit(0)  # no time spent on tearing down; nothing is left to flush


def _send_progress(done: int, total: int) -> None:
    sys.stdout.buffer.write(json.dumps({"progress": [done, total]}).encode() + b"\n")
    sys.stdout.buffer.flush()


def _error_json(error: ParseError) -> dict[str, Any]:
    return {"code": error.code, "message": str(error), "page": error.page, "retryable": error.retryable}

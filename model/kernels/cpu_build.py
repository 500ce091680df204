"""Builds the CPU kernels with the machine's own C compiler at first use and caches the library per user.

Not here: what the kernels compute (cpu.c, cpu_linear.c) or how tensors reach them (cpu.py). Without a compiler there is
no library, and callers use PyTorch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

_HEADERS = ("cpu.h", "cpu_channels.h", "cpu_linear.h")
_SOURCES = ("cpu.c", "cpu_linear.c", "cpu_int8.c", "cpu_layer.c", "cpu_rows.c", "cpu_attention.c", "cpu_scan_grad.c")
# No -ffast-math: NaN must stay NaN. -march=native is why the file name carries the processor's features.
_FLAGS = ["-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
# (compile, link), best first: OpenMP from the runtime PyTorch has already loaded (two runtimes would fight for the
# cores), then one of our own, then none.
_OPENMP_FLAGS = ((["-fopenmp"], []), (["-fopenmp"], ["-fopenmp"]), (["-Wno-unknown-pragmas"], []))
_BUILD_TIMEOUT_S = 120
_HERE = Path(__file__).parent

_log = logging.getLogger(__name__)
_lock = threading.Lock()


def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (logged once) if this machine cannot build them."""
    with _lock:
        return _load_library()


@cache
def _load_library() -> ctypes.CDLL | None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        _log.warning("no C compiler (cc, gcc, clang) found: CPU kernels run in PyTorch, several times slower")
        return None
    problems = []
    for compile_flags, link_flags in _OPENMP_FLAGS:
        try:
            return _open([compiler, *_FLAGS, *compile_flags], [compiler, "-shared", *link_flags])
        except (OSError, subprocess.SubprocessError) as error:
            problems.append(_describe(error))
    _log.warning("CPU kernels run in PyTorch, several times slower; %s: %s", compiler, problems[-1])
    return None


def _open(compile_command: list[str], link_command: list[str]) -> ctypes.CDLL:
    directory = cache_dir()
    path = directory / f"kernels-{_fingerprint([*compile_command, *link_command])}.so"
    if not path.exists():
        _build(compile_command, link_command, path)
    return ctypes.CDLL(str(path), mode=os.RTLD_NOW)


def _build(compile_command: list[str], link_command: list[str], path: Path) -> None:
    """Builds in a temporary directory first: several processes may do this at once, and none may see half a library."""
    run = partial(subprocess.run, check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: run([*compile_command, "-c", str(_HERE / name)], cwd=scratch), _SOURCES))
        objects = [Path(name).with_suffix(".o").name for name in _SOURCES]
        run([*link_command, *objects, "-o", path.name, "-lm"], cwd=scratch)
        os.replace(Path(scratch) / path.name, path)


def _fingerprint(command: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for name in (*_HEADERS, *_SOURCES):
        digest.update((_HERE / name).read_bytes())
    for text in (*command, platform.machine(), platform.processor(), _cpu_features()):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def cache_dir() -> Path:
    """A directory that only this user can write: ~/.cache, else the user's own under the temporary directory."""
    candidates = [Path(tempfile.gettempdir()) / f"jamba-rag-{os.getuid()}"]
    with suppress(RuntimeError):  # a user of a container may have no home
        candidates.insert(0, Path.home() / ".cache/jamba-rag")
    for directory in candidates:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        info = directory.stat()
        others_write = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if info.st_uid == os.getuid() and not others_write and os.access(directory, os.W_OK):
            return directory
    raise PermissionError(f"none of {', '.join(map(str, candidates))} can be written by this user alone")


def _describe(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return (error.stderr or "").strip()[-500:] or str(error)
    return str(error)

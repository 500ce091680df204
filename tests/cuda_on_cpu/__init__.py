"""Runs the CUDA kernels of model/kernels on the CPU: the same source through g++, a block's threads as fibers.

`kernel` has the arguments of `gpu.emulator`; the fixture `cuda_on_cpu` (tests/conftest.py) puts it there.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from model.kernels import gpu

KERNELS = Path(gpu.__file__).parent
MAX_SHARED_BYTES, MAX_THREADS, MAX_GRID_YZ = 227 << 10, 1024, 65535  # of Hopper

_HERE = Path(__file__).parent
_FLAGS = ["-std=c++17", "-Og", "-w", "-fPIC", "-DCUDA_ON_CPU", "-fsanitize=alignment", f"-I{_HERE}"]
_FLAGS += ["-U_FORTIFY_SOURCE"]  # some compilers set it; a checked longjmp to another fiber aborts
_ENTRY = """#include "{source}"
extern "C" const char* launch(const unsigned* grid, const unsigned* block, unsigned long shared, void** values,
                              const char* kinds) {{
    return cuda_on_cpu::launch(&{name}, grid, block, shared, values, kinds);
}}
"""
_ELEMENTS = {torch.bfloat16: "H", torch.float32: "F", torch.int32: "I", torch.int64: "Q", torch.int8: "B"}


class EmulationError(RuntimeError):
    """What the hardware would have punished: a deadlock, a misaligned access, arguments that do not fit."""


def kernel(file: str, name: str, constants: dict[str, int]) -> gpu.Kernel:
    return _build(KERNELS / f"{file}.cu", name, tuple(sorted(constants.items())))


@cache
def _build(source: Path, name: str, constants: tuple[tuple[str, int], ...]) -> EmulatedKernel:
    flags = [*_FLAGS, f"-I{KERNELS}", *(f"-D{key}={value}" for key, value in constants)]
    digest = hashlib.blake2b(" ".join([str(source), name, *flags]).encode(), digest_size=12)
    for path in (source, *sorted(source.parent.glob("*.cuh")), *sorted(KERNELS.glob("*.cuh")), *_HERE.glob("*.h")):
        digest.update(path.read_bytes())
    cache_dir = Path(tempfile.gettempdir()) / f"cuda-on-cpu-{os.getuid()}"
    cache_dir.mkdir(mode=0o700, exist_ok=True)
    path = cache_dir / f"{name}-{digest.hexdigest()}.so"
    if not path.exists():
        flags = [*flags, "-include", str(_parsed_header(cache_dir))]
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            _compile(_ENTRY.format(source=source, name=name), flags, Path(scratch))
            os.replace(Path(scratch) / "kernel.so", path)
    return EmulatedKernel(name, ctypes.CDLL(str(path)))


def _parsed_header(cache_dir: Path) -> Path:
    """A copy of standard.h with its precompiled form beside it; a compiler that cannot use that reads the copy."""
    text = (_HERE / "standard.h").read_bytes()
    header = cache_dir / f"standard-{hashlib.blake2b(text + str(_FLAGS).encode(), digest_size=12).hexdigest()}.h"
    parsed = header.with_name(f"{header.name}.gch")
    if not parsed.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            (Path(scratch) / header.name).write_bytes(text)
            _run_compiler([*_FLAGS, "-x", "c++-header", header.name, "-o", parsed.name], Path(scratch))
            for path in (header, parsed):
                os.replace(Path(scratch) / path.name, path)
    return header


def _compile(entry: str, flags: list[str], scratch: Path) -> None:
    (scratch / "entry.cpp").write_text(entry)
    # linked apart, without the sanitizer: its one check calls the emulator, not its library
    for command in ([*flags, "-c", "entry.cpp", "-o", "entry.o"], ["-shared", "entry.o", "-o", "kernel.so"]):
        _run_compiler(command, scratch)


def _run_compiler(arguments: list[str], scratch: Path) -> None:
    done = subprocess.run([shutil.which("g++") or "c++", *arguments], cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(done.stderr[-3000:])


class EmulatedKernel:
    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        self.name, self._launch = name, library.launch
        self._launch.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_ulong, ctypes.c_void_p, ctypes.c_char_p]
        self._launch.restype = ctypes.c_char_p

    def __call__(
        self, grid: tuple[int, ...], block: int, *args: gpu.Argument, shared_bytes: int = 0, overlap: bool = False
    ) -> None:
        grid = (*grid, 1, 1)[:3]
        if not (0 < block <= MAX_THREADS and shared_bytes <= MAX_SHARED_BYTES and max(grid[1:]) <= MAX_GRID_YZ):
            raise EmulationError(f"{self.name}: no GPU takes grid {grid}, block {block}, {shared_bytes} shared bytes")
        if min(grid) < 1:
            raise EmulationError(f"{self.name}: empty grid {grid}")
        kinds, values = gpu.unpack(args)
        packed = gpu.PackedArguments(kinds)
        packed.fill(values)
        given = "".join(map(_kind, args, kinds))
        sizes = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(block, 1, 1)
        error = self._launch(*sizes, shared_bytes, packed.pointers, given.encode())
        if error:
            raise EmulationError(f"{self.name}: {error.decode()}")


def _kind(argument: gpu.Argument, kind: str) -> str:
    if isinstance(argument, Tensor):
        if argument.device.type != "cpu":
            raise EmulationError("a tensor that is not on the CPU")
        return _ELEMENTS.get(argument.dtype, "p")
    return "p" if argument is None else kind

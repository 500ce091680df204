"""Compiles the CUDA kernels (*.cu in this folder) with NVRTC at first use and caches the cubins per user.

NVRTC and its bindings come with PyTorch's CUDA wheels; no toolkit is needed. Not here: how a kernel is launched
(gpu.py). Source: NVRTC documentation, CUDA 13.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from model.kernels.cpu_build import cache_dir

try:
    from cuda.bindings import nvrtc
except ImportError:  # a PyTorch without CUDA
    nvrtc = None

_HERE = Path(__file__).parent
_OPTIONS = ("-std=c++17", "-default-device")


class BuildError(RuntimeError):
    """A kernel did not compile; the message ends with the compiler's log."""


@cache
def can_build() -> bool:
    """Whether NVRTC and its bindings are installed."""
    try:
        return nvrtc is not None and bool(_call(nvrtc.nvrtcVersion))
    except RuntimeError:  # the bindings without the library
        return False


def build(file: str, constants: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """The cubin of model/kernels/`file`.cu with `constants` as macros, for a card of this compute capability.

    Raises: BuildError with the compiler's log.
    """
    options = [*_OPTIONS, f"--gpu-architecture={architecture(capability)}"]
    options += [f"-D{name}={value}" for name, value in sorted(constants.items())]
    source = (_HERE / f"{file}.cu").read_bytes()
    headers = {path.name: path.read_bytes() for path in sorted(_HERE.glob("*.cuh"))}
    digest = hashlib.blake2b(digest_size=12)
    for part in (source, *headers.values(), *map(str.encode, options), repr(_call(nvrtc.nvrtcVersion)).encode()):
        digest.update(part + b"\0")
    path = cache_dir() / f"{Path(file).name}-{digest.hexdigest()}.cubin"
    if not path.exists():
        _keep(_compile(file, source, headers, options), path)
    return path.read_bytes()


def architecture(capability: tuple[int, int]) -> str:
    """The name of the target architecture: Hopper's own instructions need the suffix `a`."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if capability == (9, 0) else "")


def _compile(file: str, source: bytes, headers: Mapping[str, bytes], options: list[str]) -> bytes:
    names, contents = [name.encode() for name in headers], [*headers.values()]
    program = _call(nvrtc.nvrtcCreateProgram, source, f"{Path(file).name}.cu".encode(), len(names), contents, names)
    try:
        status, *_ = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_call(nvrtc.nvrtcGetProgramLogSize, program))
            _call(nvrtc.nvrtcGetProgramLog, program, log)
            text = log.rstrip(b"\0").decode(errors="replace")
            raise BuildError(f"{Path(file).name}.cu with {' '.join(options)} does not compile ({status.name}):\n{text}")
        cubin = bytearray(_call(nvrtc.nvrtcGetCUBINSize, program))
        _call(nvrtc.nvrtcGetCUBIN, program, cubin)
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _call(function, *arguments):
    status, *results = function(*arguments)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BuildError(f"{function.__name__} failed: {status.name}")
    return results[0] if len(results) == 1 else results


def _keep(cubin: bytes, path: Path) -> None:
    """Writes under another name first: several processes may do this at once, and none may see half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(cubin)
    os.replace(file.name, path)

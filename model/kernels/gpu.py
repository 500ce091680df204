"""Launches the project's own CUDA kernels (*.cu) on PyTorch's tensors and streams, via the driver API and ctypes.

Callers check `supports()` first and use Triton or PyTorch if it is false. Nothing here is differentiable.
How kernels are compiled: gpu_build.py. What every kernel includes: gpu.cuh.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from model.kernels import gpu_build

Argument = Tensor | int | float | None

_INVALID_CONTEXT = 201
_MAX_DYNAMIC_SHARED_BYTES, _FREE_SHARED_BYTES = 8, 48 << 10  # a function's attribute; what needs no permission
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_MIN_CAPABILITY = (8, 0)  # cp.async and bf16 mma

_log = logging.getLogger(__name__)


class LaunchError(RuntimeError):
    """The driver refused a kernel; the message names the kernel and the driver's reason."""


class Kernel(Protocol):
    def __call__(
        self, grid: tuple[int, ...], block: int, *args: Argument, shared_bytes: int = 0, overlap: bool = False
    ) -> None:
        """Launch on the current stream. Tensors are passed as pointers (None: null), int as long long, float as float.

        `overlap` lets it start while the preceding kernel ends (programmatic dependent launch): it must then not read
        that kernel's output before its grid_wait().
        """


# The tests put their emulator here: (file, name, constants) -> kernel
emulator: Callable[[str, str, dict[str, int]], Kernel] | None = None


def kernel(file: str, name: str, **constants: int) -> Kernel:
    """The function `name` of model/kernels/`file`.cu, with `constants` as macros; compiled for a card at first use."""
    if emulator is not None:
        return emulator(file, name, constants)
    return _cuda_kernel(file, name, tuple(sorted(constants.items())))


def supports(*tensors: Tensor | None) -> bool:
    """Whether the kernels support these tensors: all on one card that can run them, and no gradient required."""
    given = [x for x in tensors if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    if emulator is not None:
        return all(x.device.type == "cpu" for x in given)
    if not all(x.is_cuda and x.device == given[0].device for x in given):
        return False
    return bool(given) and _can_run(given[0].device.index)


def has_bulk_copies(*tensors: Tensor | None) -> bool:
    """Whether Triton kernels can load these by descriptors (TMA): like `supports`, from the H100 on."""
    if not supports(*tensors):
        return False
    return emulator is not None or torch.cuda.get_device_capability(tensors[0].device) >= (9, 0)


def sm_count(device: torch.device) -> int:
    """Multiprocessors of a card; under emulation those of an H100."""
    return 132 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _can_run(device: int) -> bool:
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return False
    if not gpu_build.can_build():
        _log.warning("the package cuda-bindings is missing: GPU kernels run in Triton and PyTorch, slower")
    return gpu_build.can_build()


@cache
def _cuda_kernel(file: str, name: str, constants: tuple[tuple[str, int], ...]) -> CudaKernel:
    return CudaKernel(file, name, dict(constants))


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and a value of 64 bytes at offset 8."""

    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared_bytes")),
        *(("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", ctypes.c_uint)),
    ]


class PackedArguments:
    """A kernel's arguments in the form that the driver expects: `pointers[i]` points to the i-th value.

    `kinds`: one letter per argument, as in `struct`: P pointer, q long long, f float.
    """

    def __init__(self, kinds: str) -> None:
        self._pack = struct.Struct(
            "=" + "".join("f4x" if kind == "f" else "Q" if kind == "P" else kind for kind in kinds)
        )
        self._values = (ctypes.c_uint64 * max(len(kinds), 1))()
        base = ctypes.addressof(self._values)
        self.pointers = (ctypes.c_void_p * max(len(kinds), 1))(*(base + 8 * i for i in range(len(kinds))))

    def fill(self, values: Sequence[int | float]) -> None:
        self._pack.pack_into(self._values, 0, *values)


def unpack(arguments: Sequence[Argument]) -> tuple[str, list[int | float]]:
    """The kinds of the arguments and their plain values."""
    kinds, values = "", []
    for argument in arguments:
        if isinstance(argument, int):
            kinds += "q"
            values.append(argument)
        elif isinstance(argument, float):
            kinds += "f"
            values.append(argument)
        else:
            kinds += "P"
            values.append(0 if argument is None else argument.data_ptr())
    return kinds, values


class CudaKernel:
    """A `Kernel` on the GPU. Thread safe."""

    def __init__(self, file: str, name: str, constants: dict[str, int]) -> None:
        self._file, self.name, self._constants = file, name, constants
        self._lock = threading.Lock()
        self._functions: dict[int, ctypes.c_void_p] = {}
        self._shared_bytes: dict[int, int] = {}
        self._packed: dict[str, PackedArguments] = {}
        self._attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(by=1, bz=1, attributes=ctypes.pointer(self._attribute))
        self._config_at = ctypes.byref(self._config)

    def __call__(
        self, grid: tuple[int, ...], block: int, *args: Argument, shared_bytes: int = 0, overlap: bool = False
    ) -> None:
        device = next(arg.device.index for arg in args if isinstance(arg, Tensor))
        stream = torch.cuda.current_stream(device).cuda_stream
        kinds, values = unpack(args)
        with self._lock:
            function = self._functions.get(device) or self._load(device)
            if shared_bytes > self._shared_bytes[device]:
                self._allow_shared(function, device, shared_bytes)
            packed = self._packed.get(kinds) or self._packed.setdefault(kinds, PackedArguments(kinds))
            packed.fill(values)
            config = self._config
            config.gx, config.gy, config.gz = (*grid, 1, 1)[:3]
            config.bx, config.shared_bytes, config.stream, config.num_attributes = block, shared_bytes, stream, overlap
            status = _driver().cuLaunchKernelEx(self._config_at, function, packed.pointers, None)
            if status == _INVALID_CONTEXT:  # the first work of this thread on this card
                _enter_context(device)
                status = _driver().cuLaunchKernelEx(self._config_at, function, packed.pointers, None)
        if status:
            _check(status, f"{self.name}: grid {grid}, block {block}, {shared_bytes} bytes of shared memory")

    def function(self, device: int) -> ctypes.c_void_p:
        """The driver's handle of the kernel on a card; compiles and loads it first."""
        with self._lock:
            return self._functions.get(device) or self._load(device)

    def _load(self, device: int) -> ctypes.c_void_p:
        cubin = gpu_build.build(self._file, self._constants, torch.cuda.get_device_capability(device))
        _enter_context(device)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), f"loading {self._file}.cu")
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, self.name.encode()), self.name)
        self._functions[device], self._shared_bytes[device] = function, _FREE_SHARED_BYTES
        return function

    def _allow_shared(self, function: ctypes.c_void_p, device: int, shared_bytes: int) -> None:
        status = _driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
        _check(status, f"{self.name}: {shared_bytes} bytes of shared memory")
        self._shared_bytes[device] = shared_bytes


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    pointer = ctypes.c_void_p
    driver.cuLaunchKernelEx.argtypes = [pointer, pointer, pointer, pointer]
    driver.cuModuleLoadData.argtypes = [pointer, ctypes.c_char_p]
    driver.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
    driver.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    driver.cuGetErrorString.argtypes = [ctypes.c_int, pointer]
    driver.cuDevicePrimaryCtxRetain.argtypes = [pointer, ctypes.c_int]
    driver.cuCtxSetCurrent.argtypes = [pointer]
    return driver


def _enter_context(device: int) -> None:
    """Make PyTorch's context on the card current in this thread, as the runtime does at a thread's first call."""
    torch.cuda.init()
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(handle), ctypes.c_int(device)), f"device {device}")
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"context of device {device}")
    _check(_driver().cuCtxSetCurrent(context), f"context of device {device}")


def _check(status: int, what: str) -> None:
    if status:
        reason = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(reason))
        raise LaunchError(f"{what}: {(reason.value or b'unknown error').decode()} ({status})")

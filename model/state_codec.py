"""Tensors of a state as one value of a store, and back: a small header, then raw bytes.

Value: magic, header length, crc32 of all that follows, payload length; a JSON header {key, layout, tensors:
[[dtype, shape], ...]}; the tensors' bytes, each at a multiple of 64. The header repeats the key and the layout, so a
value found in another's place is as damaged as a flipped one. Nothing in a value is executed.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MAGIC = b"JAMBAST1"
_PRELUDE = struct.Struct("<8sIIQ")
_ALIGN = 64
_KEPT = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _KEPT}


class DamagedValue(ValueError):
    """A value that is truncated, changed, of another key or of another layout."""


def encode_value(key: str, layout: str, tensors: Sequence[Tensor]) -> bytearray:
    """Copy the tensors, from any device, into one buffer that `decode_value` accepts under the same key and layout."""
    described = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
    header = json.dumps({"key": key, "layout": layout, "tensors": described}).encode()
    header += b" " * (_aligned(_PRELUDE.size + len(header)) - _PRELUDE.size - len(header))
    payload_bytes = sum(_aligned(tensor.nbytes) for tensor in tensors)
    start = _PRELUDE.size + len(header)
    value = bytearray(start + payload_bytes)
    value[_PRELUDE.size : start] = header
    for tensor in tensors:
        if tensor.nbytes:
            # NumPy's copy, not PyTorch's: that would give the thread that writes behind a team of OpenMP threads of its
            # own, and more threads than cores make those of the model sleep between its loops (prefill 30% slower)
            data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
            np.frombuffer(value, np.uint8, tensor.nbytes, start)[:] = data
        start += _aligned(tensor.nbytes)
    checksum = zlib.crc32(memoryview(value)[_PRELUDE.size :])
    _PRELUDE.pack_into(value, 0, _MAGIC, len(header), checksum, payload_bytes)
    return value


def decode_value(key: str, layout: str, value: bytearray | memoryview, count: int) -> list[Tensor]:
    """The `count` tensors, on the CPU, sharing `value`'s writable memory. Raises DamagedValue."""
    start = _check_bytes(key, value)
    try:
        header = json.loads(bytes(value[_PRELUDE.size : start]))
        if (header["key"], header["layout"]) != (key, layout):
            raise DamagedValue(f"{key} of layout {layout}: holds {header['key']} of layout {header['layout']}")
        tensors = []
        for name, shape in header["tensors"]:
            tensors.append(_tensor_at(value, start, _DTYPES[name], shape))
            start += _aligned(tensors[-1].nbytes)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedValue(f"{key}: its header does not describe it ({error})") from error
    if len(tensors) != count:
        raise DamagedValue(f"{key}: holds {len(tensors)} tensors, expected {count}")
    return tensors


def _check_bytes(key: str, value: bytearray | memoryview) -> int:
    """Where the payload begins, once length and checksum are right."""
    if len(value) < _PRELUDE.size:
        raise DamagedValue(f"{key}: {len(value)} bytes are too few for a header of {_PRELUDE.size}")
    magic, header_bytes, checksum, payload_bytes = _PRELUDE.unpack_from(value)
    start = _PRELUDE.size + header_bytes
    if magic != _MAGIC or len(value) != start + payload_bytes:
        raise DamagedValue(f"{key}: {len(value)} bytes with magic {magic!r}, expected {start + payload_bytes}")
    if zlib.crc32(memoryview(value)[_PRELUDE.size :]) != checksum:
        raise DamagedValue(f"{key}: the checksum is wrong")
    return start


def _tensor_at(value: bytearray | memoryview, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(value, dtype=dtype, offset=start, count=count).view(tuple(shape))


def _aligned(size: int) -> int:
    return size + -size % _ALIGN

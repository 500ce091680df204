"""The operations of a layer on the CPU, in C: tensors in, tensors out. Each is defined by its `_ref`.

Callers check `available()` first and use PyTorch if it is false (no compiler). Nothing here is differentiable.
Activations float32 or bfloat16, accumulation and recurrent states float32. How the library is built: cpu_build.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.cpu_build import load_library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_PACKED = {8: 3, 4: 4}  # by bits
_FEW_ROWS = {torch.float32: 64, torch.bfloat16: 24}  # with more rows unpacking int8 weights pays (MKL; oneDNN with AMX)
GROUP = 64  # columns of an activation row that share a scale when it is rounded to int8
Pointer, Int64 = ctypes.c_void_p, ctypes.c_int64
Pointers, _int64s = ctypes.POINTER(Pointer), ctypes.POINTER(Int64)


class Rows(ctypes.Structure):
    """The struct of that name in cpu.h, like the next two."""

    _fields_ = [("data", Pointer), ("stride", Int64), ("dtype", Int64)]

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        return cls(x.data_ptr(), x.stride(-2), _DTYPES[x.dtype])


class Vec(ctypes.Structure):
    _fields_ = [("data", Pointer), ("dtype", Int64)]

    @classmethod
    def of(cls, x: Tensor | None) -> Vec:
        return cls() if x is None else cls(_address(x), _DTYPES[x.dtype])


class Packed(NamedTuple):
    """A quantized matrix (out, in), or rows of one, packed in the order in which `rounded_linear` reads it."""

    bytes: Tensor
    shape: tuple[int, int]
    bits: int
    scale: Tensor | None  # (out,) for int8; int4 scales are among the bytes
    first: int = 0  # index of the first row in the packed matrix

    @classmethod
    def of_int8(cls, weight: Tensor, scale: Tensor) -> Packed:
        """weight (out, in) int8, scale (out,) float32."""
        return cls._pack(8, weight.shape, scale, weight)

    @classmethod
    def of_int4(cls, weight: Tensor, scales: Tensor) -> Packed:
        """weight (out, in/2) uint8, scales (out, in/64), see model/int4.py."""
        return cls._pack(4, (weight.shape[0], 2 * weight.shape[1]), None, weight, scales.float())

    @classmethod
    def _pack(cls, bits: int, shape: Sequence[int], scale: Tensor | None, *given: Tensor) -> Packed:
        out, in_ = map(Int64, shape)
        packed = torch.empty(_function(f"packed_int{bits}_bytes", ctypes.c_int64)(out, in_), dtype=torch.uint8)
        pointers = map(Pointer, (*map(_address, given), packed.data_ptr()))
        call(f"pack_int{bits}", *pointers, out, in_, Int64(torch.get_num_threads()))
        return cls(packed, tuple(shape), bits, scale)

    def chunk(self, parts: int) -> list[Packed]:
        """Like `Tensor.chunk` on the rows, whose number must be a multiple of `parts`."""
        rows, scales = self.shape[0] // parts, [None] * parts if self.scale is None else self.scale.chunk(parts)
        starts = range(self.first, self.first + self.shape[0], rows)
        return [
            self._replace(shape=(rows, self.shape[1]), scale=scale, first=first)
            for scale, first in zip(scales, starts, strict=True)
        ]


class Linear(ctypes.Structure):
    """The struct in cpu_linear.h: weight (out, in), scale (out,) for int8, bias (out,) if any; all contiguous."""

    _fields_ = [("weight", Pointer), ("scale", Pointer), ("bias", Vec)]
    _fields_ += [(name, Int64) for name in ("dtype", "in_features", "out_features", "first")]

    @classmethod
    def of(cls, weight: Tensor | Packed, scale: Tensor | None = None, bias: Tensor | None = None) -> Linear:
        out, in_ = weight.shape
        if isinstance(weight, Packed):
            scale = weight.scale
        others = None if scale is None else _address(scale), Vec.of(bias)
        if isinstance(weight, Packed):
            return cls(weight.bytes.data_ptr(), *others, _PACKED[weight.bits], in_, out, weight.first)
        return cls(_address(weight), *others, _DTYPES[weight.dtype], in_, out)


class _ScanArgs(ctypes.Structure):
    _fields_ = [(name, Rows) for name in ("u", "delta", "z", "out", "B", "C")]
    _fields_ += [(name, Vec) for name in ("A", "D", "bias")] + [("starts", _int64s), ("states", Pointers)]
    _fields_ += [("trail", Pointer)]
    _fields_ += [(name, Int64) for name in ("A_is_log", "num_sequences", "e", "n", "threads")]


class _ConvArgs(ctypes.Structure):
    _fields_ = [("x", Rows), ("out", Rows), ("weight", Vec), ("bias", Vec), ("starts", _int64s), ("states", Pointers)]
    _fields_ += [("trail", Pointer)]
    _fields_ += [(name, Int64) for name in ("state_dtype", "num_sequences", "e", "w", "threads")]


class _AttentionArgs(ctypes.Structure):
    _fields_ = [("q", Rows), ("out", Rows), ("starts", _int64s), ("pasts", _int64s), ("keys", Pointers)]
    _fields_ += [("values", Pointers)]
    _fields_ += [(name, Int64) for name in ("kv_dtype", "num_sequences", "h", "g", "p", "threads")]


class _LinearArgs(ctypes.Structure):
    _fields_ = [("x", Rows), ("y", Rows), ("linear", Linear), ("m", Int64), ("threads", Int64)]


class _NormArgs(ctypes.Structure):
    _fields_ = [("x", Rows), ("out", Rows), ("weight", Vec)]
    _fields_ += [(name, Int64) for name in ("m", "d", "threads")] + [("eps", ctypes.c_double)]


class _GateArgs(ctypes.Structure):
    _fields_ = [("gate", Rows), ("up", Rows), ("out", Rows), ("m", Int64), ("f", Int64), ("threads", Int64)]


def available() -> bool:
    """Whether the kernels can run here; the first call may spend seconds compiling them."""
    return load_library() is not None


def supports(*tensors: Tensor | None) -> bool:
    """Whether the kernels support these tensors: on the CPU, float32 or bfloat16, and no gradient required."""
    given = [x for x in tensors if x is not None]
    fits = all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) for x in given)
    return fits and not (torch.is_grad_enabled() and any(x.requires_grad for x in given)) and available()


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    state: Tensor | None = None,
    delta_bias: Tensor | None = None,
) -> Tensor:
    """`selective_scan.selective_scan` on the CPU; with `delta_bias` (e,) delta is softplus(delta + delta_bias).

    Splitting t over several calls gives the same bits. `state` is contiguous and updated in place.
    """
    (b, t, e), n = u.shape, A.shape[1]
    if not (u.shape == delta.shape == z.shape and B.shape == C.shape == (b, t, n) and len(A) == len(D) == e):
        raise ValueError(f"shapes do not fit: {', '.join(str(tuple(x.shape)) for x in (u, delta, A, B, C, D, z))}")
    state = u.new_zeros(b, e, n, dtype=torch.float32) if state is None else state
    _check_state(state, (b, e, n), (torch.float32,))
    out = torch.empty(b, t, e, dtype=u.dtype)
    A, D, B, C = (x.contiguous() for x in (A, D, B.float(), C.float()))
    u, delta, z = map(_packable, (u, delta, z))
    arguments = _ScanArgs(
        *map(Rows.of, (u, delta, z, out, B, C)),
        *map(Vec.of, (A, D, delta_bias)),
        *(row_starts([t] * b), addresses(state), None),
        *(0, b, e, n, torch.get_num_threads()),
    )
    call("selective_scan", arguments)
    return out


def causal_conv(x: Tensor, state: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`causal_conv.causal_conv` on the CPU; splitting t over calls gives the same bits. `state` is contiguous."""
    (b, t, e), w = x.shape, weight.shape[1]
    state = x.new_zeros(b, e, w - 1) if state is None else state
    _check_state(state, (b, e, w - 1), (torch.float32, x.dtype))
    out = torch.empty(b, t, e, dtype=x.dtype)
    x, weight = _packable(x), weight.contiguous()
    arguments = _ConvArgs(
        *map(Rows.of, (x, out)),
        *(Vec.of(weight), Vec.of(bias)),
        *(row_starts([t] * b), addresses(state), None),
        *(_DTYPES[state.dtype], b, e, w, torch.get_num_threads()),
    )
    call("causal_conv", arguments)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last dimension in one pass; x may be a slice of wider rows."""
    rows, out = _as_rows(x), torch.empty(x.shape, dtype=x.dtype)
    shape = (*rows.shape, torch.get_num_threads())
    call("rms_norm_rows", _NormArgs(Rows.of(rows), Rows.of(_as_rows(out)), Vec.of(weight), *shape, eps))
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in one pass; both may be slices of wider rows."""
    out = torch.empty(gate.shape, dtype=gate.dtype)
    matrices = tuple(map(_as_rows, (gate, up, out)))
    call("gate_rows", _GateArgs(*map(Rows.of, matrices), *matrices[0].shape, torch.get_num_threads()))
    return out


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ (weight * scale[:, None]).T + bias -> (..., out) in x.dtype.

    weight (out, in) int8, scale (out,) float32, both contiguous. For few rows a kernel reads the int8 weights directly,
    and a row's result has the same bits whatever other rows there are; for many rows the weights are unpacked to
    x.dtype for oneDNN or MKL.
    """
    if x.shape[:-1].numel() <= _FEW_ROWS[x.dtype]:
        return linear_few(x, weight, scale, bias)
    unpacked = torch.empty(weight.shape, dtype=x.dtype)
    pointers, sizes = (_address(weight), _address(scale)), (*weight.shape, torch.get_num_threads())
    call("unpack_int8", *map(Pointer, pointers), Rows.of(unpacked), *map(Int64, sizes))
    return F.linear(x, unpacked, bias)


def rounds_rows() -> bool:
    """Whether `rounded_linear` is the fastest product on this CPU: it has VNNI or the like, and no AMX."""
    return available() and bool(_function("packing_pays", ctypes.c_int)())


def rounded_linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight.T + bias -> (..., out) in x.dtype, with the rows of x rounded to int8.

    Each GROUP columns of a row share a scale, a 127th of their largest value. A row's result has the same bits whatever
    other rows there are.
    """
    return _linear("linear_packed", x, weight, None, bias)


def linear_few(x: Tensor, weight: Tensor | Packed, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for few rows of x, reading the weight (int8 with its scale, bfloat16 or float32) only once."""
    return _linear("linear_few", x, weight, scale, bias)


def attends(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend` takes these and is the fastest way here for many tokens: all but bfloat16 where there is AMX."""
    pays = supports(q, keys, values) and _function("attention_pays", ctypes.c_int)(Int64(_DTYPES[q.dtype]))
    return bool(pays)


def attend(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """The last `lengths[i]` tokens of each sequence attend to all up to themselves.

    q (T, h, p) contiguous, all sequences end to end; keys[i], values[i] (s+t, g, p) contiguous -> (T, h, p). A token's
    result is the same bits in any company and wherever its prompt is cut. The definition is `attention.attend_ref`.
    """
    (_, h, p), g = q.shape, keys[0].shape[1]
    out, tensors = torch.empty(q.shape, dtype=q.dtype), (*keys, *values)
    if sum(lengths) != len(q) or h % g or any(not x.is_contiguous() or x.shape[1:] != (g, p) for x in tensors):
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, keys {[tuple(x.shape) for x in keys]}")
    pasts = [len(own) - length for own, length in zip(keys, lengths, strict=True)]
    arguments = _AttentionArgs(
        *map(Rows.of, (q.flatten(1), out.flatten(1))),
        *(row_starts(lengths), (Int64 * len(pasts))(*pasts)),
        *((Pointer * len(x))(*(one.data_ptr() for one in x)) for x in (keys, values)),
        *(_DTYPES[keys[0].dtype], len(lengths), h, g, p, torch.get_num_threads()),
    )
    call("attention", arguments)
    return out


def rounded_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition of `rounded_linear`, in float32; `weight` is the float weight before quantizing and packing."""
    k = x.shape[-1]
    groups = F.pad(x.float(), (0, -k % GROUP)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    rounded = ((groups * (127 / largest)).round() * (largest / 127)).flatten(-2)[..., :k]
    return F.linear(rounded, weight.float(), None if bias is None else bias.float()).to(x.dtype)


def int8_linear_ref(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition of `int8_linear`, in float32."""
    return F.linear(x.float(), weight.float() * scale[:, None], None if bias is None else bias.float()).to(x.dtype)


def call(name: str, *arguments: ctypes.Structure | ctypes._SimpleCData) -> None:
    """Run a function of the library; a single structure is passed by reference, as the C functions expect."""
    if len(arguments) == 1:
        _function(name)(ctypes.byref(arguments[0]))
    else:
        _function(name)(*arguments)


def _linear(name: str, x: Tensor, weight: Tensor | Packed, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    out, in_ = weight.shape
    rows, y = _as_rows(x), torch.empty(*x.shape[:-1], out, dtype=x.dtype)
    if rows.shape[1] != in_:
        raise ValueError(f"x has {rows.shape[1]} columns, the weight takes {in_}")
    linear, threads = Linear.of(weight, scale, bias), torch.get_num_threads()
    call(name, _LinearArgs(Rows.of(rows), Rows.of(_as_rows(y)), linear, len(rows), threads))
    return y


@cache
def _function(name: str, returns: type[ctypes._SimpleCData] | None = None) -> ctypes._CFuncPtr:
    function = getattr(load_library(), name)
    function.restype = returns
    return function


def _packable(x: Tensor) -> Tensor:
    """(b, t, c) as rows of constant stride with contiguous columns; copies only if x is not so already."""
    fits = x.stride(-1) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if fits else x.contiguous()


def _address(x: Tensor) -> int:
    if not x.is_contiguous():
        raise ValueError(f"a weight must be contiguous, got strides {x.stride()} for {tuple(x.shape)}")
    return x.data_ptr()


def _as_rows(x: Tensor) -> Tensor:
    """(..., c) as (rows, c) with contiguous columns; copies only if no view is possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def row_starts(lengths: Sequence[int]) -> ctypes.Array:
    """Index of each sequence's first token, then the total."""
    return (Int64 * (len(lengths) + 1))(0, *accumulate(lengths))


def addresses(state: Tensor) -> ctypes.Array:
    """Address of each of the b sequences' part of `state` (b, ...)."""
    first, step = state.data_ptr(), state.stride(0) * state.element_size()
    return (Pointer * len(state))(*range(first, first + len(state) * step, step))


def _check_state(state: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
    if state.shape != torch.Size(shape) or state.dtype not in dtypes or not state.is_contiguous():
        raise ValueError(
            f"state must be contiguous {tuple(shape)} of {' or '.join(map(str, dtypes))}, "
            f"got {tuple(state.shape)} of {state.dtype} with strides {state.stride()}"
        )

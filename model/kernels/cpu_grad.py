"""The selective scan with its gradient on the CPU, in C (cpu_scan_grad.c), to train small models without a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels import cpu

_INPUTS = ("u", "delta", "z", "B", "C", "A", "D", "bias", "grad")
_OUTPUTS = ("grad_u", "grad_delta", "grad_z", "grad_B", "grad_C", "grad_A", "grad_D", "grad_bias")


class _ScanGradArgs(ctypes.Structure):
    """The struct of that name in cpu_scan_grad.c."""

    _fields_ = [(name, cpu.Pointer) for name in (*_INPUTS, *_OUTPUTS)]
    _fields_ += [(name, cpu.Int64) for name in ("b", "t", "e", "n", "threads")]


def supports(*tensors: Tensor | None) -> bool:
    """Whether `selective_scan` supports these tensors: on the CPU, in a dtype that float32 represents exactly."""
    given = [x for x in tensors if x is not None]
    fits = all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) for x in given)
    return fits and cpu.available()


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor | None = None
) -> Tensor:
    """`selective_scan.selective_scan` from an empty state, differentiable once; keeps its inputs in float32."""
    bias = None if delta_bias is None else delta_bias.float()
    return _Scan.apply(*(x.float() for x in (u, delta, A, B, C, D, z)), bias).to(u.dtype)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        u, delta, A, B, C, D, z, bias = (None if x is None else x.contiguous() for x in inputs)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias)
        return cpu.selective_scan(u, delta, A, B, C, D, z, None, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, bias = ctx.saved_tensors
        (b, t, e), n = u.shape, A.shape[1]
        inputs = (u, delta, z, B, C, A, D, bias, grad.contiguous())
        of_inputs = [torch.empty_like(x) for x in (u, delta, z, B, C)]
        of_weights = [u.new_empty(b, e, n), u.new_empty(b, e), None if bias is None else u.new_empty(b, e)]
        pointers = (None if x is None else x.data_ptr() for x in (*inputs, *of_inputs, *of_weights))
        cpu.call("selective_scan_grad", _ScanGradArgs(*pointers, b, t, e, n, torch.get_num_threads()))
        grad_u, grad_delta, grad_z, grad_B, grad_C = of_inputs
        grad_A, grad_D, grad_bias = (None if x is None else x.sum(0) for x in of_weights)
        return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias

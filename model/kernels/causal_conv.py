"""Causal depthwise convolution over time with SiLU; the last w-1 inputs are carried from call to call as state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import cpu, gpu

try:
    from model.kernels.causal_conv_triton import causal_conv_triton
except ImportError:  # a PyTorch without Triton, as the CPU wheels are
    causal_conv_triton = None

_BITS = {torch.float32: 32, torch.bfloat16: 16}
_SHARING = {"THREADS": 128, "STEPS": 32, "AT_ONCE": 8}  # how conv.cu shares out the work


def causal_conv(x: Tensor, conv_state: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve x preceded by `conv_state` (None: zeros), apply SiLU; updates `conv_state` in place. Shapes: see `_ref`.

    Differentiable when `conv_state` is None.
    """
    if gpu.supports(x, conv_state, weight, bias) and _fits_cuda(x, conv_state, weight):
        return causal_conv_cuda(x, conv_state, weight, bias)
    if cpu.supports(x, weight, bias):
        return cpu.causal_conv(x, conv_state, weight, bias)
    if x.is_cuda and causal_conv_triton is not None:
        return causal_conv_triton(x, conv_state, weight, bias)
    return causal_conv_torch(x, conv_state, weight, bias)


def causal_conv_cuda(x: Tensor, conv_state: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`causal_conv` with conv.cu; only if `_fits_cuda`. Not differentiable."""
    b, t, e = x.shape
    bits = {"ACTIVATION_BITS": _BITS[x.dtype], "WEIGHT_BITS": _BITS[weight.dtype]}
    bits["STATE_BITS"] = _BITS[x.dtype if conv_state is None else conv_state.dtype]
    out = torch.empty(b, t, e, dtype=x.dtype, device=x.device)
    grid = (-(-e // (8 * _SHARING["THREADS"])), -(-t // _SHARING["STEPS"]), b)
    bias = None if bias is None else bias.to(weight.dtype).contiguous()
    conv = gpu.kernel("conv", "conv", W=weight.shape[1], **_SHARING, **bits)
    conv(grid, _SHARING["THREADS"], x, conv_state, weight, bias, out, t, e, *x.stride()[:2])
    return out


def _fits_cuda(x: Tensor, conv_state: Tensor | None, weight: Tensor) -> bool:
    """Whether conv.cu supports these tensors: it loads eight channels (16 bytes) at a time."""
    aligned = all(at * x.element_size() % 16 == 0 for at in x.stride()[:2]) and x.data_ptr() % 16 == 0
    own_state = conv_state is None or (conv_state.is_contiguous() and conv_state.dtype in _BITS)
    known = x.dtype in _BITS and weight.dtype in _BITS and weight.is_contiguous() and weight.shape[1] > 1
    return aligned and own_state and known and x.stride(-1) == 1 and x.shape[-1] % 8 == 0


def causal_conv_torch(x: Tensor, conv_state: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`causal_conv` in plain PyTorch: w shifted products, because F.conv1d needs time as the last dimension."""
    t, past = x.shape[1], weight.shape[1] - 1
    if conv_state is None:
        window = F.pad(x, (0, 0, past, 0))  # (b, w-1+t, e)
    else:
        window = torch.cat([conv_state.transpose(1, 2), x], dim=1)
        conv_state.copy_(window[:, t:].transpose(1, 2))
    dtype = torch.promote_types(x.dtype, torch.float32)
    window, weight = window.to(dtype), weight.to(dtype)
    out = window[:, :t] * weight[:, 0]
    for i in range(1, past + 1):
        out = torch.addcmul(out, window[:, i : i + t], weight[:, i])
    return F.silu(out if bias is None else out + bias.to(dtype)).to(x.dtype)


def causal_conv_ref(x: Tensor, conv_state: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (b, t, e), conv_state (b, e, w-1), weight (e, w), bias (e,) -> (b, t, e); float32 accumulation."""
    width, dtype = weight.shape[1], torch.promote_types(x.dtype, torch.float32)
    past = x.new_zeros(x.shape[0], x.shape[2], width - 1) if conv_state is None else conv_state
    outputs = []
    for step in x.unbind(1):
        window = torch.cat([past, step[:, :, None]], dim=-1)  # (b, e, w)
        past = window[:, :, 1:]
        total = (window.to(dtype) * weight.to(dtype)).sum(-1)
        outputs.append(F.silu(total if bias is None else total + bias.to(dtype)).to(x.dtype))
    if conv_state is not None:
        conv_state.copy_(past)
    return torch.stack(outputs, dim=1)

"""Causal depthwise convolution over time with SiLU, carrying the last w-1 inputs from call to call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import cpu

try:
    from model.kernels.causal_conv_triton import causal_conv_triton
except ImportError:  # a PyTorch without Triton, as the CPU wheels are
    causal_conv_triton = None


def causal_conv(x: Tensor, conv_state: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve x behind `conv_state` (None: zeros), apply SiLU; `conv_state` is updated in place. Shapes: see `_ref`.

    Differentiable when `conv_state` is None.
    """
    if cpu.supports(x, weight, bias):
        return cpu.causal_conv(x, conv_state, weight, bias)
    if x.is_cuda and causal_conv_triton is not None:
        return causal_conv_triton(x, conv_state, weight, bias)
    return causal_conv_torch(x, conv_state, weight, bias)


def causal_conv_torch(x: Tensor, conv_state: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`causal_conv` in PyTorch alone: w shifted products, for F.conv1d wants time to come last."""
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

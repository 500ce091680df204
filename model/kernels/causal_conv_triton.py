"""Causal depthwise convolution + SiLU on a GPU, forward and backward, in the (b, t, e) layout of the surrounding code.

Memory-bound: each kernel reads its inputs once; the w taps come from the cache. Definition: `causal_conv.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_E = 32, 64


@triton.jit
def _convolve(x, past, weight, bias, rows, offs_e, mask_e, t, stride_t, W: tl.constexpr, HAS_PAST: tl.constexpr):
    """The convolution before the activation, for `rows` of one sequence: (BLOCK_T, BLOCK_E) float32."""
    total = tl.zeros([rows.shape[0], offs_e.shape[0]], tl.float32) + bias[None, :]
    for k in tl.static_range(W):
        at = rows - (W - 1 - k)
        inside = (at[:, None] >= 0) & (at[:, None] < t) & mask_e[None, :]
        tap = tl.load(x + at.to(tl.int64)[:, None] * stride_t + offs_e[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_PAST:
            before = (at[:, None] < 0) & (at[:, None] >= 1 - W) & mask_e[None, :]
            earlier = past + offs_e[None, :] * (W - 1) + at[:, None] + W - 1
            tap += tl.load(earlier, mask=before, other=0.0).to(tl.float32)
        total += tap * tl.load(weight + offs_e * W + k, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def _forward_kernel(
    x, past, weight, bias, out, t, e, stride_b, stride_t,
    W: tl.constexpr, HAS_PAST: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    rows, offs_e = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BE + tl.arange(0, BE)
    mask_e = offs_e < e
    added = tl.load(bias + offs_e, mask=mask_e & HAS_BIAS, other=0.0).to(tl.float32)
    past += row * e * (W - 1)
    total = _convolve(x + row * stride_b, past, weight, added, rows, offs_e, mask_e, t, stride_t, W, HAS_PAST)
    value = (total * tl.sigmoid(total)).to(out.dtype.element_ty)
    mask = (rows[:, None] < t) & mask_e[None, :]
    tl.store(out + (row * t + rows[:, None]) * e + offs_e[None, :], value, mask=mask)


@triton.jit
def _backward_inner_kernel(
    x, weight, bias, dout, inner, dweight, dbias, t, e, stride_b, stride_t,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Gradient with respect to the value before the activation, and its sums into dweight and dbias."""
    row = tl.program_id(2).to(tl.int64)
    rows, offs_e = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BE + tl.arange(0, BE)
    mask_e = offs_e < e
    mask = (rows[:, None] < t) & mask_e[None, :]
    added = tl.load(bias + offs_e, mask=mask_e & HAS_BIAS, other=0.0).to(tl.float32)
    x += row * stride_b
    total = _convolve(x, x, weight, added, rows, offs_e, mask_e, t, stride_t, W, False)
    sig = tl.sigmoid(total)
    at = (row * t + rows[:, None]) * e + offs_e[None, :]
    grad = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32) * sig * (1.0 + total * (1.0 - sig))
    tl.store(inner + at, grad.to(inner.dtype.element_ty), mask=mask)
    tl.atomic_add(dbias + offs_e, tl.sum(grad, axis=0), mask=mask_e, sem="relaxed")
    for k in tl.static_range(W):
        tap_rows = rows - (W - 1 - k)
        inside = (tap_rows[:, None] >= 0) & mask
        tap = tl.load(x + tap_rows.to(tl.int64)[:, None] * stride_t + offs_e[None, :], mask=inside, other=0.0)
        tl.atomic_add(dweight + offs_e * W + k, tl.sum(grad * tap.to(tl.float32), axis=0), mask=mask_e, sem="relaxed")


@triton.jit
def _backward_input_kernel(inner, weight, dx, t, e, W: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr):
    row = tl.program_id(2).to(tl.int64)
    rows, offs_e = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BE + tl.arange(0, BE)
    mask_e = offs_e < e
    total = tl.zeros([BT, BE], tl.float32)
    for k in tl.static_range(W):
        at = rows + (W - 1 - k)
        inside = (at[:, None] < t) & mask_e[None, :]
        grad = tl.load(inner + (row * t + at[:, None]) * e + offs_e[None, :], mask=inside, other=0.0).to(tl.float32)
        total += grad * tl.load(weight + offs_e * W + k, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    mask = (rows[:, None] < t) & mask_e[None, :]
    tl.store(dx + (row * t + rows[:, None]) * e + offs_e[None, :], total.to(dx.dtype.element_ty), mask=mask)


def _grid(b: int, t: int, e: int) -> tuple[int, int, int]:
    return triton.cdiv(t, BLOCK_T), triton.cdiv(e, BLOCK_E), b


def _forward(x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    b, t, e = x.shape
    out = torch.empty((b, t, e), dtype=x.dtype, device=x.device)
    _forward_kernel[_grid(b, t, e)](
        x, x if past is None else past, weight, weight if bias is None else bias, out, t, e, *x.stride()[:2],
        W=weight.shape[1], HAS_PAST=past is not None, HAS_BIAS=bias is not None, BT=BLOCK_T, BE=BLOCK_E,
    )  # fmt: skip
    return out


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return _forward(x, None, weight, bias)

    @staticmethod
    def backward(ctx, dout):
        x, weight, bias = ctx.saved_tensors
        (b, t, e), width, dout = x.shape, weight.shape[1], dout.contiguous()
        inner, dx = (torch.empty((b, t, e), dtype=x.dtype, device=x.device) for _ in range(2))
        dweight = torch.zeros((e, width), dtype=torch.float32, device=x.device)
        dbias = torch.zeros((e,), dtype=torch.float32, device=x.device)
        _backward_inner_kernel[_grid(b, t, e)](
            x, weight, weight if bias is None else bias, dout, inner, dweight, dbias, t, e, *x.stride()[:2],
            W=width, HAS_BIAS=bias is not None, BT=BLOCK_T, BE=BLOCK_E,
        )  # fmt: skip
        _backward_input_kernel[_grid(b, t, e)](inner, weight, dx, t, e, W=width, BT=BLOCK_T, BE=BLOCK_E)
        return dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


def causal_conv_triton(x: Tensor, conv_state: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Like `causal_conv_ref`; x may be strided except in its last dimension. Differentiable if `conv_state` is None."""
    if x.stride(-1) != 1 or not weight.is_contiguous():
        raise ValueError(f"x must be contiguous in its last dimension and weight altogether, got {x.stride()}")
    if conv_state is None:
        return _CausalConv.apply(x, weight, bias)
    if not conv_state.is_contiguous():
        raise ValueError(f"conv_state must be contiguous, got strides {conv_state.stride()}")
    out, kept = _forward(x, conv_state, weight, bias), conv_state.shape[-1]
    window = torch.cat([conv_state, x[:, -kept:].transpose(1, 2)], dim=-1) if kept else conv_state
    conv_state.copy_(window[:, :, window.shape[-1] - kept :])
    return out

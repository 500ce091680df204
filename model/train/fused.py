"""Fused Triton kernels for the memory-bound operations of training: RMS norm, SwiGLU gate, step sizes of the scan,
RoPE, losses over the vocabulary.

Each is a differentiable function of GPU tensors; the PyTorch references are `F.rms_norm`, `kernels.silu_mul`,
`F.softplus`, `attention.rotate` and `losses.vocabulary_loss_ref`. Computes in float32, returns the dtype of the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024  # among which the rows are divided if a gradient is summed over them
TILE = 2048  # elements per program, about


@triton.jit
def _norm_kernel(x, weight, y, scale, rows, d, stride, eps, R: tl.constexpr, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    col = tl.arange(0, D)
    mask = (row < rows)[:, None] & (col < d)[None, :]
    wide = tl.load(x + row[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + col, mask=col < d, other=0.0).to(tl.float32)
    s = tl.rsqrt(tl.sum(wide * wide, axis=1) / d + eps)
    tl.store(scale + row, s, mask=row < rows)
    tl.store(y + row[:, None] * d + col[None, :], (wide * s[:, None] * w[None, :]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _norm_gradient_kernel(
    x, weight, scale, dy, dx, dweight, rows, d, stride, dy_stride, per_program, R: tl.constexpr, D: tl.constexpr
):
    col = tl.arange(0, D)
    w = tl.load(weight + col, mask=col < d, other=0.0).to(tl.float32)
    total = tl.zeros([D], tl.float32)
    first = tl.program_id(0).to(tl.int64) * per_program
    for at in range(0, per_program, R):
        row = first + at + tl.arange(0, R)
        mask = (row < rows)[:, None] & (col < d)[None, :]
        normed = tl.load(x + row[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        s = tl.load(scale + row, mask=row < rows, other=0.0)
        normed *= s[:, None]
        total += tl.sum(grad * normed, axis=0)
        grad *= w[None, :]
        out = (grad - normed * (tl.sum(grad * normed, axis=1) / d)[:, None]) * s[:, None]
        tl.store(dx + row[:, None] * d + col[None, :], out.to(dx.dtype.element_ty), mask=mask)
    tl.store(dweight + tl.program_id(0) * d + col, total, mask=col < d)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, d = x.shape
        width = triton.next_power_of_2(d)
        tile = max(1, TILE // width)
        y, scale = torch.empty((rows, d), dtype=x.dtype, device=x.device), torch.empty(rows, device=x.device)
        _norm_kernel[(triton.cdiv(rows, tile),)](x, weight, y, scale, rows, d, x.stride(0), eps, R=tile, D=width)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        rows, d = x.shape
        width = triton.next_power_of_2(d)
        tile = max(1, TILE // width)
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        per_program = triton.cdiv(triton.cdiv(rows, PROGRAMS), tile) * tile
        programs = triton.cdiv(rows, per_program)
        dx = torch.empty((rows, d), dtype=x.dtype, device=x.device)
        dweight = torch.empty((programs, d), device=x.device)
        _norm_gradient_kernel[(programs,)](
            x, weight, scale, dy, dx, dweight, rows, d, x.stride(0), dy.stride(0), per_program, R=tile, D=width
        )
        return dx, dweight.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (T, d), rows perhaps strided, weight (d,) -> (T, d)."""
    return _RmsNorm.apply(x, weight, eps)


@triton.jit
def _gate_kernel(gate_up, out, rows, f, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * f + col, mask=col < f, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * f + f + col, mask=col < f, other=0.0).to(tl.float32)
    tl.store(out + row * f + col, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=col < f)


@triton.jit
def _gate_gradient_kernel(gate_up, dout, dgate_up, rows, f, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * f + col, mask=col < f, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * f + f + col, mask=col < f, other=0.0).to(tl.float32)
    grad = tl.load(dout + row * f + col, mask=col < f, other=0.0).to(tl.float32)
    sig = tl.sigmoid(gate)
    dgate = grad * up * sig * (1.0 + gate * (1.0 - sig))
    tl.store(dgate_up + row * 2 * f + col, dgate.to(dgate_up.dtype.element_ty), mask=col < f)
    tl.store(dgate_up + row * 2 * f + f + col, (grad * gate * sig).to(dgate_up.dtype.element_ty), mask=col < f)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        rows, f = gate_up.shape[0], gate_up.shape[1] // 2
        gate_up = gate_up.contiguous()
        out = torch.empty((rows, f), dtype=gate_up.dtype, device=gate_up.device)
        block = min(512, triton.next_power_of_2(f))
        _gate_kernel[(rows, triton.cdiv(f, block))](gate_up, out, rows, f, BLOCK=block)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        rows, f = gate_up.shape[0], gate_up.shape[1] // 2
        grad, block = torch.empty_like(gate_up), min(512, triton.next_power_of_2(f))
        _gate_gradient_kernel[(rows, triton.cdiv(f, block))](gate_up, dout.contiguous(), grad, rows, f, BLOCK=block)
        return grad


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up (T, 2f), gates first -> (T, f)."""
    return _Gate.apply(gate_up)


@triton.jit
def _softplus_kernel(x, bias, y, e, BLOCK: tl.constexpr):
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(x + row * e + col, mask=col < e, other=0.0).to(tl.float32)
    wide += tl.load(bias + col, mask=col < e, other=0.0).to(tl.float32)
    power = tl.exp(-tl.abs(wide))
    series = power * (1.0 + power * (-0.5 + power * (1 / 3 - power * 0.25)))
    log1p = tl.where(power < 0.03, series, tl.log(1.0 + power))  # 1 + power would lose precision
    tl.store(y + row * e + col, tl.maximum(wide, 0.0) + log1p, mask=col < e)


@triton.jit
def _softplus_gradient_kernel(y, dy, dx, dbias, rows, e, per_program, R: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * per_program
    for at in range(0, per_program, R):
        row = first + at + tl.arange(0, R)
        mask = (row < rows)[:, None] & (col < e)[None, :]
        cell = row[:, None] * e + col[None, :]
        grad = tl.load(dy + cell, mask=mask, other=0.0)
        grad *= 1.0 - tl.exp(-tl.load(y + cell, mask=mask, other=0.0))
        total += tl.sum(grad, axis=0)
        tl.store(dx + cell, grad.to(dx.dtype.element_ty), mask=mask)
    tl.store(dbias + tl.program_id(0) * e + col, total, mask=col < e)


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        rows, e, x = x.shape[:-1].numel(), x.shape[-1], x.contiguous()
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        block = min(1024, triton.next_power_of_2(e))
        _softplus_kernel[(rows, triton.cdiv(e, block))](x, bias, y, e, BLOCK=block)
        ctx.save_for_backward(y)
        ctx.dtypes = x.dtype, bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        (y,) = ctx.saved_tensors
        rows, e, (dtype, bias_dtype) = y.shape[:-1].numel(), y.shape[-1], ctx.dtypes
        block = min(64, triton.next_power_of_2(e))
        tile = TILE // block
        per_program = triton.cdiv(triton.cdiv(rows, PROGRAMS), tile) * tile
        programs = triton.cdiv(rows, per_program)
        dx, dbias = torch.empty(y.shape, dtype=dtype, device=y.device), torch.empty((programs, e), device=y.device)
        _softplus_gradient_kernel[(programs, triton.cdiv(e, block))](
            y, dy.contiguous(), dx, dbias, rows, e, per_program, R=tile, BLOCK=block
        )
        return dx, dbias.sum(0).to(bias_dtype)


def softplus(x: Tensor, bias: Tensor) -> Tensor:
    """log(1 + exp(x + bias)) of x (..., e), bias (e,) -> (..., e) float32."""
    return _Softplus.apply(x, bias)


@triton.jit
def _rotate_kernel(x, cos, sin, y, t, heads, HEADS: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr):
    row, head, col = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS), tl.arange(0, P)
    mask = (head < heads)[:, None] & (col < HALF)[None, :]
    cell = (row * heads + head[:, None]) * 2 * HALF + col[None, :]
    turned = (row % t) * HALF + col
    c = tl.load(cos + turned, mask=col < HALF, other=0.0)[None, :]
    s = tl.load(sin + turned, mask=col < HALF, other=0.0)[None, :]
    low = tl.load(x + cell, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x + cell + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + cell, (low * c - high * s).to(y.dtype.element_ty), mask=mask)
    tl.store(y + cell + HALF, (high * c + low * s).to(y.dtype.element_ty), mask=mask)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (rows, heads, p), x = x.shape, x.contiguous()
    y, half = torch.empty_like(x), p // 2
    sizes = {"HEADS": triton.next_power_of_2(heads), "HALF": half, "P": triton.next_power_of_2(half)}
    _rotate_kernel[(rows,)](x, cos, sin, y, len(cos), heads, **sizes)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x (b·t, heads, p), rows of t tokens, by cos and sin (t, p/2) float32 of each position -> like x."""
    return _Rotate.apply(x, cos, sin)


@triton.jit
def _vocabulary_kernel(
    logits, others, targets, kl_weights, ce_weights, kl_out, ce_out, v, HAS_OTHER: tl.constexpr, BLOCK: tl.constexpr
):
    """KL(others ‖ logits) and cross entropy of one token; overwrites logits with the gradient of their weighted sum."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * v
    others += row * v
    cols = tl.arange(0, BLOCK)
    low = -1e30  # not -inf, so that a difference of two is not NaN
    q_max = low
    q_sum = 0.0
    p_max = low
    p_sum = 0.0
    for at in range(0, v, BLOCK):
        q = tl.load(logits + at + cols, mask=at + cols < v, other=low).to(tl.float32)
        high = tl.maximum(q_max, tl.max(q, axis=0))
        q_sum = q_sum * tl.exp(q_max - high) + tl.sum(tl.exp(q - high), axis=0)
        q_max = high
        if HAS_OTHER:
            p = tl.load(others + at + cols, mask=at + cols < v, other=low).to(tl.float32)
            high = tl.maximum(p_max, tl.max(p, axis=0))
            p_sum = p_sum * tl.exp(p_max - high) + tl.sum(tl.exp(p - high), axis=0)
            p_max = high
    target = tl.load(targets + row)
    kl_weight = tl.load(kl_weights + row)
    ce_weight = tl.load(ce_weights + row)
    q_log = q_max + tl.log(q_sum)
    p_log = q_log
    if HAS_OTHER:
        p_log = p_max + tl.log(p_sum)
    else:
        kl_weight = 0.0
    tl.store(ce_out + row, q_log - tl.load(logits + target).to(tl.float32))
    tl.debug_barrier()  # read the target's logit before it is overwritten
    kl = 0.0
    for at in range(0, v, BLOCK):
        inside = at + cols < v
        q = tl.load(logits + at + cols, mask=inside, other=low).to(tl.float32) - q_log
        grad = (kl_weight + ce_weight) * tl.exp(q) - tl.where(at + cols == target, ce_weight, 0.0)
        if HAS_OTHER:
            p = tl.load(others + at + cols, mask=inside, other=low).to(tl.float32) - p_log
            share = tl.exp(p)
            kl += tl.sum(share * (p - q), axis=0)
            grad -= kl_weight * share
        tl.store(logits + at + cols, grad.to(logits.dtype.element_ty), mask=inside)
    tl.store(kl_out + row, kl)


class _VocabularyLoss(torch.autograd.Function):
    """Computes gradients together with the loss, in chunks of tokens: logits are neither kept nor recomputed."""

    @staticmethod
    def forward(ctx: Any, hidden, head, other, other_head, targets, kl_weights, ce_weights, chunk):
        n, v = len(hidden), len(head)
        kl, ce = torch.zeros(n, device=hidden.device), torch.zeros(n, device=hidden.device)
        dhidden, dhead = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        for at in range(0, n, chunk):
            own = slice(at, at + chunk)
            logits = hidden[own] @ head.T
            others = logits if other is None else other[own] @ other_head.T
            _vocabulary_kernel[(len(logits),)](
                logits, others, targets[own], kl_weights[own], ce_weights[own], kl[own], ce[own], v,
                HAS_OTHER=other is not None, BLOCK=min(4096, triton.next_power_of_2(v)), num_warps=8,
            )  # fmt: skip
            dhidden[own] = logits @ head
            dhead += logits.T @ hidden[own]
        ctx.save_for_backward(dhidden, dhead.to(head.dtype))
        ctx.mark_non_differentiable(kl, ce)
        return (kl_weights * kl).sum() + (ce_weights * ce).sum(), kl, ce

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _kl: None, _ce: None) -> tuple:
        dhidden, dhead = ctx.saved_tensors
        return (dhidden * grad).to(dhidden.dtype), (dhead * grad).to(dhead.dtype), *[None] * 6


def vocabulary_loss(
    hidden: Tensor, head: Tensor, other: Tensor | None, other_head: Tensor | None, targets: Tensor,
    kl_weights: Tensor, ce_weights: Tensor, chunk: int = 8192,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`losses.vocabulary_loss` on a GPU. If `hidden` is float16, the weights must be well within its range."""
    return _VocabularyLoss.apply(hidden, head, other, other_head, targets, kl_weights, ce_weights, chunk)

"""The selective scan of Mamba-1 on a GPU, forward and backward, as two Triton kernels.

One program walks the whole sequence for a block of channels with the states in registers; the loads of the next step
are issued before the arithmetic of this one. Enough for training, where batch × channels fill the card; a scan that is
parallel over the sequence too belongs beside it for long single prompts. Definition: `selective_scan.py`.

The backward keeps one state in `CHUNK` steps from the forward, recomputes those between into a scratch small enough
for the L2 cache, and walks back over them.
Source: Mamba, section 3.3.2 (recomputation) and its algorithm 2; letters as in `model/jamba.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32
BLOCK_E = 32
NUM_WARPS = 1
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_step(u, delta, z, B, C, offs_e, offs_n, mask_e, mask_n, HAS_Z: tl.constexpr):
    u_t = tl.load(u + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    d_t = tl.load(delta + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    z_t = tl.load(z + offs_e, mask=mask_e, other=0.0).to(tl.float32) if HAS_Z else u_t
    b_t = tl.load(B + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    c_t = tl.load(C + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    return u_t, d_t, z_t, b_t, c_t


@triton.jit
def _scan_forward_kernel(
    u, delta, z, A, B, C, D, state, out, saved, t, e, n,
    su_b, su_t, sd_b, sd_t, sz_b, sz_t, sb_b, sb_t, sc_b, sc_t, so_b, so_t,
    HAS_STATE: tl.constexpr, HAS_Z: tl.constexpr, SAVE: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    offs_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.arange(0, N)
    mask_e, mask_n = offs_e < e, offs_n < n
    mask = mask_e[:, None] & mask_n[None, :]
    cell = offs_e[:, None] * n + offs_n[None, :]
    decay = tl.load(A + cell, mask=mask, other=0.0).to(tl.float32) * LOG2E
    skip = tl.load(D + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    h = tl.zeros([BLOCK, N], tl.float32)
    if HAS_STATE:
        h = tl.load(state + row * e * n + cell, mask=mask, other=0.0)
    u += row * su_b
    delta += row * sd_b
    z += row * sz_b
    B += row * sb_b
    C += row * sc_b
    out += row * so_b
    if SAVE:
        saved += row * tl.cdiv(t, STEPS) * e * n
    u_t, d_t, z_t, b_t, c_t = _load_step(u, delta, z, B, C, offs_e, offs_n, mask_e, mask_n, HAS_Z)
    for i in range(t):
        if SAVE:
            chunk_starts = i % STEPS == 0
            if chunk_starts:
                tl.store(saved + cell, h, mask=mask)
                saved += e * n
        ahead = tl.minimum(i + 1, t - 1) - i  # the last step loads itself again
        u += ahead * su_t
        delta += ahead * sd_t
        z += ahead * sz_t
        B += ahead * sb_t
        C += ahead * sc_t
        u_n, d_n, z_n, b_n, c_n = _load_step(u, delta, z, B, C, offs_e, offs_n, mask_e, mask_n, HAS_Z)
        h = tl.exp2(d_t[:, None] * decay) * h + (d_t * u_t)[:, None] * b_t[None, :]
        y = tl.sum(h * c_t[None, :], axis=1) + skip * u_t
        if HAS_Z:
            y = y * z_t * tl.sigmoid(z_t)
        tl.store(out + offs_e, y.to(out.dtype.element_ty), mask=mask_e)
        out += so_t
        u_t, d_t, z_t, b_t, c_t = u_n, d_n, z_n, b_n, c_n
    if HAS_STATE:
        tl.store(state + row * e * n + cell, h, mask=mask)


@triton.jit
def _scan_backward_kernel(
    u, delta, z, A, B, C, D, dout, saved, scratch, du, ddelta, dz, dA, dB, dC, dD, t, e, n,
    su_b, su_t, sd_b, sd_t, sz_b, sz_t, sb_b, sb_t, sc_b, sc_t,
    HAS_Z: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    offs_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.arange(0, N)
    mask_e, mask_n = offs_e < e, offs_n < n
    mask = mask_e[:, None] & mask_n[None, :]
    cell = offs_e[:, None] * n + offs_n[None, :]
    rates = tl.load(A + cell, mask=mask, other=0.0).to(tl.float32)
    decay = rates * LOG2E
    skip = tl.load(D + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    local = tl.arange(0, BLOCK)[:, None] * N + offs_n[None, :]
    scratch += (row * tl.num_programs(0) + tl.program_id(0)) * STEPS * BLOCK * N
    chunks = tl.cdiv(t, STEPS)
    saved += row * chunks * e * n
    u += row * su_b
    delta += row * sd_b
    z += row * sz_b
    B += row * sb_b
    C += row * sc_b
    carry = tl.zeros([BLOCK, N], tl.float32)
    sum_a = tl.zeros([BLOCK, N], tl.float32)
    sum_d = tl.zeros([BLOCK], tl.float32)
    for k in range(chunks):
        first = (chunks - 1 - k) * STEPS
        last = tl.minimum(first + STEPS, t)
        h = tl.load(saved + (chunks - 1 - k).to(tl.int64) * e * n + cell, mask=mask, other=0.0)
        u_t, d_t, z_t, b_t, c_t = _load_step(
            u + first * su_t, delta + first * sd_t, z, B + first * sb_t, C + first * sc_t,
            offs_e, offs_n, mask_e, mask_n, False,
        )  # fmt: skip
        for i in range(first, last):
            tl.store(scratch + (i - first) * BLOCK * N + local, h)
            j = tl.minimum(i + 1, last - 1)
            u_n, d_n, z_n, b_n, c_n = _load_step(
                u + j * su_t, delta + j * sd_t, z, B + j * sb_t, C + j * sc_t, offs_e, offs_n, mask_e, mask_n, False
            )
            h = tl.exp2(d_t[:, None] * decay) * h + (d_t * u_t)[:, None] * b_t[None, :]
            u_t, d_t, b_t, c_t = u_n, d_n, b_n, c_n
        i = last - 1
        u_t, d_t, z_t, b_t, c_t = _load_step(
            u + i * su_t, delta + i * sd_t, z + i * sz_t, B + i * sb_t, C + i * sc_t,
            offs_e, offs_n, mask_e, mask_n, HAS_Z,
        )  # fmt: skip
        before = tl.load(scratch + (i - first) * BLOCK * N + local)
        grad = tl.load(dout + (row * t + i) * e + offs_e, mask=mask_e, other=0.0).to(tl.float32)
        for back in range(first, last):
            i = last - 1 - (back - first)
            j = tl.maximum(i - 1, first)
            u_n, d_n, z_n, b_n, c_n = _load_step(
                u + j * su_t, delta + j * sd_t, z + j * sz_t, B + j * sb_t, C + j * sc_t,
                offs_e, offs_n, mask_e, mask_n, HAS_Z,
            )  # fmt: skip
            before_n = tl.load(scratch + (j - first) * BLOCK * N + local)
            grad_n = tl.load(dout + (row * t + j) * e + offs_e, mask=mask_e, other=0.0).to(tl.float32)
            at = (row * t + i) * e + offs_e
            a = tl.exp2(d_t[:, None] * decay)
            h = a * before + (d_t * u_t)[:, None] * b_t[None, :]
            if HAS_Z:
                sig = tl.sigmoid(z_t)
                y = tl.sum(h * c_t[None, :], axis=1) + skip * u_t
                dz_t = grad * y * sig * (1.0 + z_t * (1.0 - sig))
                tl.store(dz + at, dz_t.to(dz.dtype.element_ty), mask=mask_e)
                grad = grad * z_t * sig
            g = carry + grad[:, None] * c_t[None, :]
            at_n = (row * t + i) * n + offs_n
            tl.atomic_add(dC + at_n, tl.sum(h * grad[:, None], axis=0), mask=mask_n, sem="relaxed")
            tl.atomic_add(dB + at_n, tl.sum(g * (d_t * u_t)[:, None], axis=0), mask=mask_n, sem="relaxed")
            gb = tl.sum(g * b_t[None, :], axis=1)
            through = g * before * a
            dd_t = u_t * gb + tl.sum(through * rates, axis=1)
            tl.store(ddelta + at, dd_t.to(ddelta.dtype.element_ty), mask=mask_e)
            tl.store(du + at, (grad * skip + d_t * gb).to(du.dtype.element_ty), mask=mask_e)
            sum_a += through * d_t[:, None]
            sum_d += grad * u_t
            carry = g * a
            u_t, d_t, z_t, b_t, c_t, before, grad = u_n, d_n, z_n, b_n, c_n, before_n, grad_n
    tl.atomic_add(dA + cell, sum_a, mask=mask, sem="relaxed")
    tl.atomic_add(dD + offs_e, sum_d, mask=mask_e, sem="relaxed")


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, state: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (b, t, e), n = u.shape, A.shape[1]
    out = torch.empty((b, t, e), dtype=u.dtype, device=u.device)
    saved = out.new_empty((b, triton.cdiv(t, CHUNK), e, n) if save else (1,), dtype=torch.float32)
    _scan_forward_kernel[(triton.cdiv(e, BLOCK_E), b)](
        u, delta, u if z is None else z, A, B, C, D, saved if state is None else state, out, saved, t, e, n,
        *_strides(u, delta, u if z is None else z, B, C, out),
        HAS_STATE=state is not None, HAS_Z=z is not None, SAVE=save,
        BLOCK=BLOCK_E, N=triton.next_power_of_2(n), STEPS=CHUNK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out, saved


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z):
        out, saved = _forward(u, delta, A, B, C, D, z, None, save=True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, saved)
        return out

    @staticmethod
    def backward(ctx, dout):
        u, delta, A, B, C, D, z, saved = ctx.saved_tensors
        (b, t, e), n, dout = u.shape, A.shape[1], dout.contiguous()
        blocks, width = triton.cdiv(e, BLOCK_E), triton.next_power_of_2(n)
        du, ddelta = (torch.empty((b, t, e), dtype=x.dtype, device=x.device) for x in (u, delta))
        dz = None if z is None else torch.empty((b, t, e), dtype=z.dtype, device=z.device)
        dA, dD = torch.zeros((e, n), dtype=torch.float32, device=u.device), torch.zeros((e,), device=u.device)
        dB, dC = (torch.zeros((b, t, n), dtype=torch.float32, device=u.device) for _ in range(2))
        scratch = torch.empty((b, blocks, CHUNK, BLOCK_E, width), dtype=torch.float32, device=u.device)
        _scan_backward_kernel[(blocks, b)](
            u, delta, u if z is None else z, A, B, C, D, dout, saved, scratch,
            du, ddelta, du if dz is None else dz, dA, dB, dC, dD, t, e, n,
            *_strides(u, delta, u if z is None else z, B, C),
            HAS_Z=z is not None, BLOCK=BLOCK_E, N=width, STEPS=CHUNK, num_warps=NUM_WARPS,
        )  # fmt: skip
        return du, ddelta, dA.to(A.dtype), dB.to(B.dtype), dC.to(C.dtype), dD.to(D.dtype), dz


def selective_scan_triton(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, state: Tensor | None
) -> Tensor:
    """Scan t tokens from `state` (updated in place), add D·u, gate by SiLU(z); differentiable when `state` is None.

    Shapes: u, delta, z (b, t, e); A (e, n) contiguous; B, C (b, t, n); D (e,); state (b, e, n) float32 contiguous
    -> (b, t, e) in u.dtype; float32 inside. The last dimension of each must be contiguous, others may be strided.
    """
    for name, tensor in {"u": u, "delta": delta, "B": B, "C": C, "z": z}.items():
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
    if not A.is_contiguous() or (state is not None and not state.is_contiguous()):
        raise ValueError("A and state must be contiguous")
    if state is None:
        return _SelectiveScan.apply(u, delta, A, B, C, D, z)
    return _forward(u, delta, A, B, C, D, z, state, save=False)[0]

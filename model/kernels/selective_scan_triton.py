"""The selective scan of Mamba-1 on a GPU, forward and backward, in Triton. Definition: `selective_scan.py`.

One program walks a segment of the sequence for a block of channels with the states in registers; the loads of the next
step are issued before the arithmetic of this one. So that long rows fill the card too, segments run in parallel: a
first pass computes what each segment adds to the state (its initial state it scales by exp(A Σ delta)), `_join_kernel`
combines these to the initial states of all segments, and a second pass starts from them. The backward does the same
with gradients, from the end.

The backward keeps one state per `CHUNK` steps from the forward, recomputes those between into a scratch buffer small
enough for the L2 cache, and walks back over them.
Source: Mamba, section 3.3.2 (recomputation) and its algorithm 2; letters as in `model/jamba.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8
SEGMENT = 256  # a multiple of CHUNK
BLOCK_E, NUM_WARPS = 32, 1  # channels and warps per program, forward
BACK_E, BACK_WARPS = 32, 1  # backward
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
def _segment_state_kernel(
    u, delta, A, B, saved, sums, t, e, n, su_b, su_t, sd_b, sd_t, sb_b, sb_t,
    BLOCK: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """The state after a segment that starts from zeros, written as the next segment's initial state; its Σ delta."""
    row, segment = tl.program_id(1).to(tl.int64), tl.program_id(2)
    offs_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.arange(0, N)
    mask_e, mask_n = offs_e < e, offs_n < n
    mask = mask_e[:, None] & mask_n[None, :]
    cell = offs_e[:, None] * n + offs_n[None, :]
    decay = tl.load(A + cell, mask=mask, other=0.0).to(tl.float32) * LOG2E
    first = segment * SEGMENT
    last = tl.minimum(first + SEGMENT, t)
    u += row * su_b
    delta += row * sd_b
    B += row * sb_b
    h = tl.zeros([BLOCK, N], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    u_t, d_t, _z_t, b_t, _c_t = _load_step(
        u + first * su_t, delta + first * sd_t, u, B + first * sb_t, B, offs_e, offs_n, mask_e, mask_n, False
    )
    for i in range(first, last):
        j = tl.minimum(i + 1, last - 1)
        u_n, d_n, _z_n, b_n, _c_n = _load_step(
            u + j * su_t, delta + j * sd_t, u, B + j * sb_t, B, offs_e, offs_n, mask_e, mask_n, False
        )
        h = tl.exp2(d_t[:, None] * decay) * h + (d_t * u_t)[:, None] * b_t[None, :]
        total += d_t
        u_t, d_t, b_t = u_n, d_n, b_n
    segments = tl.cdiv(t, SEGMENT)
    tl.store(sums + (row * segments + segment) * e + offs_e, total, mask=mask_e)
    if segment + 1 < segments:
        chunk = row * tl.cdiv(t, STEPS) + (segment + 1) * (SEGMENT // STEPS)
        tl.store(saved + chunk * e * n + cell, h, mask=mask)


@triton.jit
def _join_kernel(
    A, start, values, sums, entries, segments, e, n,
    HAS_START: tl.constexpr, REVERSE: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Turns what each segment adds (`values`, every RATIO-th of `entries` per row) into its initial state, in place."""
    row = tl.program_id(1).to(tl.int64)
    offs_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.arange(0, N)
    mask_e = offs_e < e
    mask = mask_e[:, None] & (offs_n < n)[None, :]
    cell = offs_e[:, None] * n + offs_n[None, :]
    decay = tl.load(A + cell, mask=mask, other=0.0).to(tl.float32) * LOG2E
    values += row * entries * e * n
    sums += row * segments * e
    h = tl.zeros([BLOCK, N], tl.float32)
    if HAS_START:
        h = tl.load(start + row * e * n + cell, mask=mask, other=0.0)
    for k in range(segments):
        at = segments - 1 - k if REVERSE else k
        if k > 0:
            passed = at + 1 if REVERSE else at - 1
            total = tl.load(sums + passed * e + offs_e, mask=mask_e, other=0.0)
            added = tl.load(values + at.to(tl.int64) * RATIO * e * n + cell, mask=mask, other=0.0)
            h = tl.exp2(total[:, None] * decay) * h + added
        tl.store(values + at.to(tl.int64) * RATIO * e * n + cell, h, mask=mask)


@triton.jit
def _scan_forward_kernel(
    u, delta, z, A, B, C, D, state, out, saved, t, e, n,
    su_b, su_t, sd_b, sd_t, sz_b, sz_t, sb_b, sb_t, sc_b, sc_t, so_b, so_t,
    HAS_STATE: tl.constexpr, HAS_Z: tl.constexpr, SAVE: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(1).to(tl.int64), tl.program_id(2) * SEGMENT
    last = tl.minimum(first + SEGMENT, t)
    offs_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.arange(0, N)
    mask_e, mask_n = offs_e < e, offs_n < n
    mask = mask_e[:, None] & mask_n[None, :]
    cell = offs_e[:, None] * n + offs_n[None, :]
    decay = tl.load(A + cell, mask=mask, other=0.0).to(tl.float32) * LOG2E
    skip = tl.load(D + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    u += row * su_b + first * su_t
    delta += row * sd_b + first * sd_t
    z += row * sz_b + first * sz_t
    B += row * sb_b + first * sb_t
    C += row * sc_b + first * sc_t
    out += row * so_b + first * so_t
    saved += (row * tl.cdiv(t, STEPS) + tl.program_id(2) * (SEGMENT // STEPS)) * e * n
    h = tl.load(saved + cell, mask=mask, other=0.0)
    u_t, d_t, z_t, b_t, c_t = _load_step(u, delta, z, B, C, offs_e, offs_n, mask_e, mask_n, HAS_Z)
    for i in range(first, last):
        if SAVE:
            chunk_starts = i % STEPS == 0
            if chunk_starts:
                tl.store(saved + cell, h, mask=mask)
                saved += e * n
        ahead = tl.minimum(i + 1, last - 1) - i  # the last step loads itself again
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
    if HAS_STATE:  # noqa: SIM102 - known when the kernel is compiled, the next one when it runs
        if last == t:
            tl.store(state + row * e * n + cell, h, mask=mask)


@triton.jit
def _segment_gradient_kernel(
    delta, z, A, C, dout, carries, t, e, n, sd_b, sd_t, sz_b, sz_t, sc_b, sc_t,
    HAS_Z: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """The gradient of a segment's initial state from that segment alone, stored where the preceding one reads it."""
    row, before = tl.program_id(1).to(tl.int64), tl.program_id(2)
    offs_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.arange(0, N)
    mask_e, mask_n = offs_e < e, offs_n < n
    mask = mask_e[:, None] & mask_n[None, :]
    cell = offs_e[:, None] * n + offs_n[None, :]
    decay = tl.load(A + cell, mask=mask, other=0.0).to(tl.float32) * LOG2E
    first = (before + 1) * SEGMENT
    last = tl.minimum(first + SEGMENT, t)
    delta += row * sd_b
    z += row * sz_b
    C += row * sc_b
    dout += row * t * e
    carry = tl.zeros([BLOCK, N], tl.float32)
    i = last - 1
    g_t, d_t, z_t, c_t, _x_t = _load_step(
        dout + i * e, delta + i * sd_t, z + i * sz_t, C + i * sc_t, C, offs_e, offs_n, mask_e, mask_n, HAS_Z
    )
    for back in range(first, last):
        j = tl.maximum(last - 2 - (back - first), first)
        g_n, d_n, z_n, c_n, _x_n = _load_step(
            dout + j * e, delta + j * sd_t, z + j * sz_t, C + j * sc_t, C, offs_e, offs_n, mask_e, mask_n, HAS_Z
        )
        if HAS_Z:
            g_t = g_t * z_t * tl.sigmoid(z_t)
        carry = (carry + g_t[:, None] * c_t[None, :]) * tl.exp2(d_t[:, None] * decay)
        g_t, d_t, z_t, c_t = g_n, d_n, z_n, c_n
    tl.store(carries + (row * tl.cdiv(t, SEGMENT) + before) * e * n + cell, carry, mask=mask)


@triton.jit
def _scan_backward_kernel(
    u, delta, z, A, B, C, D, dout, saved, carries, scratch, du, ddelta, dz, dA, dB, dC, dD, t, e, n,
    su_b, su_t, sd_b, sd_t, sz_b, sz_t, sb_b, sb_t, sc_b, sc_t,
    HAS_Z: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    row, segment, segments = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    offs_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.arange(0, N)
    mask_e, mask_n = offs_e < e, offs_n < n
    mask = mask_e[:, None] & mask_n[None, :]
    cell = offs_e[:, None] * n + offs_n[None, :]
    rates = tl.load(A + cell, mask=mask, other=0.0).to(tl.float32)
    decay = rates * LOG2E
    skip = tl.load(D + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    local = tl.arange(0, BLOCK)[:, None] * N + offs_n[None, :]
    scratch += ((row * segments + segment) * tl.num_programs(0) + tl.program_id(0)) * STEPS * BLOCK * N
    begin = segment * (SEGMENT // STEPS)
    end = tl.minimum(begin + SEGMENT // STEPS, tl.cdiv(t, STEPS))
    saved += row * tl.cdiv(t, STEPS) * e * n
    u += row * su_b
    delta += row * sd_b
    z += row * sz_b
    B += row * sb_b
    C += row * sc_b
    carry = tl.load(carries + (row * segments + segment) * e * n + cell, mask=mask, other=0.0)
    sum_a = tl.zeros([BLOCK, N], tl.float32)
    sum_d = tl.zeros([BLOCK], tl.float32)
    for k in range(begin, end):
        chunk = end - 1 - (k - begin)
        first = chunk * STEPS
        last = tl.minimum(first + STEPS, t)
        h = tl.load(saved + chunk.to(tl.int64) * e * n + cell, mask=mask, other=0.0)
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
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output; states before every `CHUNK` steps (not `save`: before every segment); Σ delta of every segment."""
    (b, t, e), n = u.shape, A.shape[1]
    blocks, segments, steps = triton.cdiv(e, BLOCK_E), triton.cdiv(t, SEGMENT), CHUNK if save else SEGMENT
    sizes = {"BLOCK": BLOCK_E, "N": triton.next_power_of_2(n), "num_warps": NUM_WARPS}
    out = torch.empty((b, t, e), dtype=u.dtype, device=u.device)
    saved = torch.empty((b, triton.cdiv(t, steps), e, n), dtype=torch.float32, device=u.device)
    sums = torch.empty((b, segments, e), dtype=torch.float32, device=u.device)
    if segments > 1:
        _segment_state_kernel[(blocks, b, segments)](
            u, delta, A, B, saved, sums, t, e, n, *_strides(u, delta, B), STEPS=steps, SEGMENT=SEGMENT, **sizes
        )
    _join_kernel[(blocks, b)](
        A, saved if state is None else state, saved, sums, saved.shape[1], segments, e, n,
        HAS_START=state is not None, REVERSE=False, RATIO=SEGMENT // steps, **sizes,
    )  # fmt: skip
    _scan_forward_kernel[(blocks, b, segments)](
        u, delta, u if z is None else z, A, B, C, D, saved if state is None else state, out, saved, t, e, n,
        *_strides(u, delta, u if z is None else z, B, C, out),
        HAS_STATE=state is not None, HAS_Z=z is not None, SAVE=save, STEPS=steps, SEGMENT=SEGMENT, **sizes,
    )  # fmt: skip
    return out, saved, sums


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z):
        out, saved, sums = _forward(u, delta, A, B, C, D, z, None, save=True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, saved, sums)
        return out

    @staticmethod
    def backward(ctx, dout):
        u, delta, A, B, C, D, z, saved, sums = ctx.saved_tensors
        (b, t, e), n, dout = u.shape, A.shape[1], dout.contiguous()
        blocks, segments, gate = triton.cdiv(e, BACK_E), sums.shape[1], u if z is None else z
        sizes = {"BLOCK": BACK_E, "N": triton.next_power_of_2(n), "num_warps": BACK_WARPS}
        du, ddelta = (torch.empty((b, t, e), dtype=x.dtype, device=x.device) for x in (u, delta))
        dz = None if z is None else torch.empty((b, t, e), dtype=z.dtype, device=z.device)
        dA, dD = torch.zeros((e, n), dtype=torch.float32, device=u.device), torch.zeros((e,), device=u.device)
        dB, dC = (torch.zeros((b, t, n), dtype=torch.float32, device=u.device) for _ in range(2))
        carries = torch.empty((b, segments, e, n), dtype=torch.float32, device=u.device)
        scratch = torch.empty((b, segments, blocks, CHUNK, BACK_E, sizes["N"]), dtype=torch.float32, device=u.device)
        if segments > 1:
            _segment_gradient_kernel[(blocks, b, segments - 1)](
                delta, gate, A, C, dout, carries, t, e, n, *_strides(delta, gate, C),
                HAS_Z=z is not None, SEGMENT=SEGMENT, **sizes,
            )  # fmt: skip
        _join_kernel[(blocks, b)](
            A, carries, carries, sums, segments, segments, e, n, HAS_START=False, REVERSE=True, RATIO=1, **sizes
        )
        _scan_backward_kernel[(blocks, b, segments)](
            u, delta, gate, A, B, C, D, dout, saved, carries, scratch,
            du, ddelta, du if dz is None else dz, dA, dB, dC, dD, t, e, n, *_strides(u, delta, gate, B, C),
            HAS_Z=z is not None, STEPS=CHUNK, SEGMENT=SEGMENT, **sizes,
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
        if tensor is not None and tensor.shape[1] * tensor.stride(1) >= 1 << 31:  # offsets in a sequence are 32 bits
            raise ValueError(f"{name} has {tensor.shape[1]} steps {tensor.stride(1)} apart; scan them in several calls")
    if not A.is_contiguous() or (state is not None and not state.is_contiguous()):
        raise ValueError("A and state must be contiguous")
    if state is None:
        return _SelectiveScan.apply(u, delta, A, B, C, D, z)
    return _forward(u, delta, A, B, C, D, z, state, save=False)[0]

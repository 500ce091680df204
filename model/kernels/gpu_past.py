"""Attention of a prefill segment over a long past on the GPU, in one of two ways other than PyTorch's flash attention.

"triton": one kernel of our own, past_triton.py. "blocks": a block of keys at a time by the fastest kernel there is for
one block, and the blocks' results merged by their log-sum-exp (`merge_attention` in elementwise.cu).
cuDNN's attention is the fastest at some shapes alone and plans tens of milliseconds for each new one: blocks all have
one shape. What is left over, and segments of odd lengths, goes to flash attention. Callers ask `takes` first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.kernels import gpu

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from model.kernels.past_triton import attend_kernel
except ImportError:  # a PyTorch without Triton, as the CPU wheels are
    triton = None


class Tile(NamedTuple):
    """What a program of the Triton kernel has at a time, and how."""

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool  # loads by the bulk copy engine


METHOD: Literal["triton", "blocks"] | None = None  # None: PyTorch's flash attention, in attention.py
TILE = Tile(queries=128, keys=128, warps=8, stages=2, tma=True)
MIN_QUERIES = 256  # of the Triton kernel, which does not cut the keys
BLOCK_KEYS = 8192
SEGMENT_UNIT = 8192  # segments of whole multiples have few shapes
_THREADS = 256


def takes(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend` is for these: q (t, h, p), keys and values (s+t, g, p)."""
    (t, _, p), rows = q.shape, (keys, values)
    if METHOD is None or q.dtype != torch.bfloat16 or not gpu.supports(q, keys, values):
        return False
    if METHOD == "triton":
        return triton is not None and t >= MIN_QUERIES and p in (64, 128) and all(x.is_contiguous() for x in rows)
    return t % SEGMENT_UNIT == 0 and p % 8 == 0


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last t of s+t tokens attend to all before them. q (t, h, p), keys, values (s+t, g, p) -> (t, h, p)."""
    if METHOD == "triton":
        return attend_triton(q, keys, values)[0]
    queries, total = q.transpose(0, 1)[None], None
    blocks = [*_cut(len(keys) - len(q)), (len(keys) - len(q), len(keys))]
    for begin, end in blocks:
        k, v = (x[begin:end].transpose(0, 1)[None] for x in (keys, values))
        is_own = end == len(keys)
        planned = is_own or end - begin == BLOCK_KEYS
        out, lse = _attend_block(queries, k, v, is_own, planned)
        out = out[0].transpose(0, 1).contiguous()
        if len(blocks) == 1:
            return out
        if total is None:
            total = out.float(), lse
        else:
            total = merge_attention(*total, out, lse, torch.empty_like(out) if is_own else None)
    return total[0]


def attend_triton(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """As `attend`, and the log-sum-exps (h, t) float32; any t >= 1. keys and values contiguous."""
    (t, h, p), g, past = q.shape, keys.shape[1], len(keys) - len(q)
    matrices = [x.reshape(len(x), -1) for x in (q, keys, values)]
    strides = [x.stride(0) for x in matrices[:2]]
    if TILE.tma:
        heights = (TILE.queries, TILE.keys, TILE.keys)
        matrices = [TensorDescriptor.from_tensor(x, [rows, p]) for x, rows in zip(matrices, heights, strict=True)]
    out, lse = q.new_empty(t, h, p), torch.empty(h, t, dtype=torch.float32, device=q.device)
    attend_kernel[(triton.cdiv(t, TILE.queries) * h,)](
        *(*matrices, out, lse, t, past, math.log2(math.e) / math.sqrt(p), *strides),
        HEADS=h, GROUP=h // g, TMA=TILE.tma, BM=TILE.queries, BN=TILE.keys, P=p,
        num_warps=TILE.warps, num_stages=TILE.stages,
    )  # fmt: skip
    return out, lse


def attend_triton_ref(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """As `attend_triton`, in float32."""
    t, total, group = len(q), len(keys), q.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("thp,shp->hts", q.float(), keys) / math.sqrt(q.shape[-1])
    seen = torch.arange(total, device=q.device) <= torch.arange(total - t, total, device=q.device)[:, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hts,shp->thp", scores.softmax(-1), values), scores.logsumexp(-1)


def merge_attention(
    total: Tensor, total_lse: Tensor, out: Tensor, lse: Tensor, rounded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: results (t, h, p), log-sum-exps (h, t) float32.

    `total` float32 is replaced in place, or the result goes to `rounded` alone, in bfloat16 as `out` is.
    """
    t, h, p = out.shape
    merged_lse, kernel = torch.empty_like(lse), gpu.kernel("elementwise", "merge_attention")
    grid = (-(-out.numel() // (8 * _THREADS)),)
    kernel(grid, _THREADS, total, total_lse, out, lse, merged_lse, rounded, t, h, p)
    return total if rounded is None else rounded, merged_lse


def merge_attention_ref(total: Tensor, total_lse: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge_attention`, in float32 and with nothing replaced."""
    merged = torch.logaddexp(total_lse, lse)
    shares = ((x - merged).exp().T[..., None] for x in (total_lse, lse))  # (t, h, 1)
    return sum(share * x.float() for share, x in zip(shares, (total, out), strict=True)), merged


def _cut(past: int) -> Iterator[tuple[int, int]]:
    """The past in blocks, the odd one first."""
    odd = past % BLOCK_KEYS
    if odd:
        yield 0, odd
    for begin in range(odd, past, BLOCK_KEYS):
        yield begin, begin + BLOCK_KEYS


def _attend_block(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, planned: bool) -> tuple[Tensor, Tensor]:
    """q (1, h, t, p), k, v (1, g, keys, p) -> (1, h, t, p) and its log-sum-exps (h, t)."""
    if not q.is_cuda:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)
    elif planned:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)
    return out, lse.reshape(q.shape[1:3]).float().contiguous()

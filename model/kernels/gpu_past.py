"""Attention of a prefill segment over a long past on the GPU by a Triton kernel of our own, past_triton.py.

Callers ask `takes` first; the rest goes to PyTorch's flash attention, which reaches two thirds of its rate. cuDNN's
attention is a sixth faster still, but plans about a tenth of a second for each new length.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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
    """What a program of the kernel has at a time, and how."""

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool  # loads by the bulk copy engine


TILE = Tile(queries=128, keys=128, warps=8, stages=3, tma=True)
MIN_QUERIES = 256  # with fewer the card stays empty, for the kernel does not cut the keys


def takes(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend` is for these: q (t, h, p), keys and values (s+t, g, p)."""
    (t, _, p), rows = q.shape, (keys, values)
    fits = triton is not None and t >= MIN_QUERIES and p in (64, 128) and all(x.is_contiguous() for x in rows)
    return fits and q.dtype == torch.bfloat16 and gpu.has_bulk_copies(q, keys, values)


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last t >= 1 of s+t tokens attend to all before them. q (t, h, p), keys, values (s+t, g, p) -> (t, h, p)."""
    (t, h, p), g, past = q.shape, keys.shape[1], len(keys) - len(q)
    matrices = [x.reshape(len(x), -1) for x in (q, keys, values)]
    strides = [x.stride(0) for x in matrices[:2]]
    if TILE.tma:
        heights = (TILE.queries, TILE.keys, TILE.keys)
        matrices = [TensorDescriptor.from_tensor(x, [rows, p]) for x, rows in zip(matrices, heights, strict=True)]
    out = q.new_empty(t, h, p)
    attend_kernel[(triton.cdiv(t, TILE.queries) * h,)](
        *(*matrices, out, t, past, math.log2(math.e) / math.sqrt(p), *strides),
        HEADS=h, GROUP=h // g, TMA=TILE.tma, BM=TILE.queries, BN=TILE.keys, P=p,
        num_warps=TILE.warps, num_stages=TILE.stages,
    )  # fmt: skip
    return out


def attend_ref(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As `attend`, in float32."""
    t, total, group = len(q), len(keys), q.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("thp,shp->hts", q.float(), keys) / math.sqrt(q.shape[-1])
    seen = torch.arange(total, device=q.device) <= torch.arange(total - t, total, device=q.device)[:, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hts,shp->thp", scores.softmax(-1), values)

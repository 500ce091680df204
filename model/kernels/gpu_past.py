"""Attention of a few tokens or a prefill segment over everything before them, on the GPU in Triton: past_triton.py.

If the queries are too few to fill the card, the keys are split into parts, which a second kernel combines. Keys may lie
in two pieces, the first lent by another sequence (model/state.py): same tiles, same bits. Callers check `takes` first.
PyTorch's flash attention reaches two thirds of this speed; cuDNN's attention is a sixth faster, but needs about a tenth
of a second of planning for each new length.
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

    from model.kernels.past_triton import attend_kernel, join_kernel
except ImportError:  # a PyTorch without Triton, as the CPU wheels are
    triton = None


class Tile(NamedTuple):
    """Tile sizes and launch options of one program of the kernel."""

    queries: int
    keys: int
    warps: int
    stages: int
    tma: bool  # loads by the bulk copy engine


TILE = Tile(queries=128, keys=128, warps=8, stages=3, tma=True)
FEW = Tile(queries=64, keys=128, warps=4, stages=3, tma=True)  # for at most that many queries
MAX_PARTS = 32  # into which keys are split
_JOINED_ROWS = 8  # rows that one program of the combining kernel handles


def fits(weight: Tensor, p: int) -> bool:
    """Whether `attend` supports heads of this dimension, with weights of this device and dtype."""
    return triton is not None and p in (64, 128) and weight.dtype == torch.bfloat16 and gpu.has_bulk_copies(weight)


def takes(
    q: Tensor, keys: Tensor, values: Tensor, lent_keys: Tensor | None = None, lent_values: Tensor | None = None
) -> bool:
    """Whether `attend` supports these tensors; shapes as there."""
    rows = [keys, values, *([] if lent_keys is None else [lent_keys, lent_values])]
    return all(x.is_contiguous() for x in rows) and fits(q, q.shape[-1])


def attend(
    q: Tensor, keys: Tensor, values: Tensor, lent_keys: Tensor | None = None, lent_values: Tensor | None = None
) -> Tensor:
    """The last t >= 1 of s+t tokens attend to all before them. q (t, h, p), keys, values (s+t, g, p) -> (t, h, p).

    Up to s of the first keys and values, a multiple of a tile, may be lent; `keys` and `values` are then those after.
    """
    (t, h, p), g = q.shape, keys.shape[1]
    lent = 0 if lent_keys is None else len(lent_keys)
    total, tile = lent + len(keys), FEW if t <= FEW.queries else TILE
    tiles = triton.cdiv(t, tile.queries) * h
    parts = min(max(gpu.sm_count(q.device) // tiles, 1), triton.cdiv(total, tile.keys), MAX_PARTS)
    part_keys = triton.cdiv(triton.cdiv(total, tile.keys), parts) * tile.keys
    out = q.new_empty(t, h, p)
    sums, weights = out, out
    if parts > 1:
        sums, weights = (torch.empty(parts, t, h, size, dtype=torch.float32, device=q.device) for size in (p, 2))
    pieces = (keys, values, *((keys, values) if lent_keys is None else (lent_keys, lent_values)))
    matrices = [x.reshape(len(x), -1) for x in (q, *pieces)]
    strides = [x.stride(0) for x in matrices[:2]]
    if tile.tma:
        heights = (tile.queries, *[tile.keys] * 4)
        matrices = [TensorDescriptor.from_tensor(x, [rows, p]) for x, rows in zip(matrices, heights, strict=True)]
    attend_kernel[(tiles, parts)](
        *(*matrices, sums, weights, t, total - t, lent, part_keys, math.log2(math.e) / math.sqrt(p), *strides),
        HEADS=h, GROUP=h // g, PARTED=parts > 1, LENT=lent > 0, TMA=tile.tma, BM=tile.queries, BN=tile.keys, P=p,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        grid = (triton.cdiv(t * h, _JOINED_ROWS),)
        join_kernel[grid](sums, weights, out, t * h, parts, ROWS=_JOINED_ROWS, P=p, num_warps=4)
    return out


def attend_ref(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Like `attend` with keys in one piece, in float32."""
    t, total, group = len(q), len(keys), q.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("thp,shp->hts", q.float(), keys) / math.sqrt(q.shape[-1])
    seen = torch.arange(total, device=q.device) <= torch.arange(total - t, total, device=q.device)[:, None]
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hts,shp->thp", scores.softmax(-1), values)

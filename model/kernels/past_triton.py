"""Attention of a prefill segment over a long past as one Triton kernel; its wrapper and when it runs: gpu_past.py.

A program has one tile of queries of one head. Heads that share their keys stand side by side in the grid, the longest
tiles first, so that keys come from the L2 cache for all but one of them. Only the tiles around the diagonal are masked.
Source: FlashAttention-2, algorithm 1; letters as in model/jamba.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_tile(source, row, last_row, column, stride, TMA: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr):
    """(ROWS, P) from a matrix whose rows are `stride` apart; rows behind `last_row` hold anything finite."""
    if TMA:
        loaded = source.load([row, column])
    else:
        rows = tl.minimum(row + tl.arange(0, ROWS), last_row).to(tl.int64)
        loaded = tl.load(source + rows[:, None] * stride + column + tl.arange(0, P)[None, :])
    return loaded


@triton.jit
def _attend_tiles(
    q, keys, values, out, largest, total, begin, end, num_keys, limit, column, stride, scale,
    MASKED: tl.constexpr, TMA: tl.constexpr, BN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The running sums after keys begin..end, in tiles. limit (BM,): how many keys each query may see."""
    for key in range(begin, end, BN):
        k = _load_tile(keys, key, num_keys - 1, column, stride, TMA, BN, P)
        scores = tl.dot(q, k.T)
        if MASKED:
            scores = tl.where((key + tl.arange(0, BN))[None, :] < limit[:, None], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        v = _load_tile(values, key, num_keys - 1, column, stride, TMA, BN, P)
        out = tl.dot(weights.to(v.dtype), v, out)
        largest = higher
    return out, largest, total


@triton.jit
def attend_kernel(
    queries, keys, values, out, t, past, scale, q_stride, stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Query i of t sees past + i + 1 keys. queries (t, HEADS*P), keys, values (past + t, HEADS/GROUP*P), rows `stride`
    apart; out (t, HEADS*P); `scale` is for base 2."""
    tiles = tl.cdiv(t, BM)
    kv_head = tl.program_id(0) // (tiles * GROUP)
    within = tl.program_id(0) % (tiles * GROUP)
    head = kv_head * GROUP + within % GROUP
    row = (tiles - 1 - within // GROUP) * BM
    rows = row + tl.arange(0, BM)
    limit = past + tl.minimum(rows, t - 1) + 1
    column = kv_head * P
    q = _load_tile(queries, row, t - 1, head * P, q_stride, TMA, BM, P)
    sums = tl.zeros([BM, P], tl.float32)
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    num_keys = past + t
    full = (past + row + 1) // BN * BN  # all queries of the tile see these
    sums, largest, total = _attend_tiles(
        q, keys, values, sums, largest, total, 0, full, num_keys, limit, column, stride, scale,
        False, TMA, BN, P,
    )  # fmt: skip
    sums, largest, total = _attend_tiles(
        q, keys, values, sums, largest, total, full, tl.minimum(past + row + BM, num_keys), num_keys, limit, column,
        stride, scale, True, TMA, BN, P,
    )  # fmt: skip
    at = out + rows.to(tl.int64)[:, None] * (HEADS * P) + head * P + tl.arange(0, P)[None, :]
    tl.store(at, (sums / total[:, None]).to(out.dtype.element_ty), mask=(rows < t)[:, None])

"""Attention of a prefill segment over a long past as one Triton kernel; its wrapper and when it runs: gpu_past.py.

A program handles one tile of queries of one head, and all their keys or a part of them. Heads that share keys are
neighbours in the grid, the longest tiles first, so that all but one of them read the keys from the L2 cache. Only the
tiles around the diagonal are masked.
Source: FlashAttention-2, algorithm 1; letters as in model/jamba.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_tile(source, row, last_row, column, stride, TMA: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr):
    """(ROWS, P) from a matrix whose rows are `stride` apart; rows after `last_row` have any finite values."""
    if TMA:
        loaded = source.load([row, column])
    else:
        rows = tl.minimum(row + tl.arange(0, ROWS), last_row).to(tl.int64)
        loaded = tl.load(source + rows[:, None] * stride + column + tl.arange(0, P)[None, :])
    return loaded


@triton.jit
def _attend_tiles(
    q, keys, values, out, largest, total, begin, end, first, num_keys, limit, column, stride, scale,
    MASKED: tl.constexpr, TMA: tl.constexpr, BN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The running sums after processing keys begin..end in tiles; `keys` and `values` hold keys `first` to num_keys.
    limit (BM,): how many keys each query may see."""
    for key in range(begin, end, BN):
        k = _load_tile(keys, key - first, num_keys - first - 1, column, stride, TMA, BN, P)
        scores = tl.dot(q, k.T)
        if MASKED:
            scores = tl.where((key + tl.arange(0, BN))[None, :] < limit[:, None], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        v = _load_tile(values, key - first, num_keys - first - 1, column, stride, TMA, BN, P)
        out = tl.dot(weights.to(v.dtype), v, out)
        largest = higher
    return out, largest, total


@triton.jit(do_not_specialize=["t", "past", "lent", "part_keys"])
def attend_kernel(
    queries, keys, values, lent_keys, lent_values, out, weights, t, past, lent, part_keys, scale, q_stride, stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PARTED: tl.constexpr, LENT: tl.constexpr, TMA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Query i of t sees past + i + 1 keys. queries (t, HEADS*P), keys, values (past + t - lent, HEADS/GROUP*P) with
    rows `stride` apart, preceded by `lent` others, a multiple of BN; `scale` is for exponentials of base 2.

    Writes out (t, HEADS*P). If PARTED, program (.., i) handles part_keys keys (a multiple of BN) from i * part_keys on,
    and writes the output before division, (parts, t, HEADS*P) float32, and the largest score and the sum to `weights`
    (parts, t, HEADS, 2)."""
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
    largest = tl.full([BM], -1e30, tl.float32)  # finite, for a part may have no key that a query sees
    total = tl.zeros([BM], tl.float32)
    num_keys = past + t
    full = (past + row + 1) // BN * BN  # all queries of the tile see these
    end = tl.minimum(past + row + BM, num_keys)
    begin = 0
    if PARTED:
        begin = tl.program_id(1) * part_keys
        end = tl.minimum(end, begin + part_keys)
        full = tl.maximum(tl.minimum(full, end // BN * BN), begin)
    behind = begin
    if LENT:
        behind = tl.minimum(tl.maximum(lent, begin), full)
        sums, largest, total = _attend_tiles(
            q, lent_keys, lent_values, sums, largest, total, begin, behind, 0, lent, limit, column, stride, scale,
            False, TMA, BN, P,
        )  # fmt: skip
    sums, largest, total = _attend_tiles(
        q, keys, values, sums, largest, total, behind, full, lent, num_keys, limit, column, stride, scale,
        False, TMA, BN, P,
    )  # fmt: skip
    sums, largest, total = _attend_tiles(
        q, keys, values, sums, largest, total, full, end, lent, num_keys, limit, column, stride, scale,
        True, TMA, BN, P,
    )  # fmt: skip
    own = rows.to(tl.int64) * HEADS + head
    if PARTED:
        own += tl.program_id(1).to(tl.int64) * t * HEADS
        tl.store(weights + 2 * own, largest, mask=rows < t)
        tl.store(weights + 2 * own + 1, total, mask=rows < t)
    else:
        sums = sums / total[:, None]
    at = out + own[:, None] * P + tl.arange(0, P)[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=(rows < t)[:, None])


@triton.jit(do_not_specialize=["num_rows", "parts"])
def join_kernel(sums, weights, out, num_rows, parts, ROWS: tl.constexpr, P: tl.constexpr):
    """sums (parts, num_rows, P), weights (parts, num_rows, 2) of attend_kernel -> out (num_rows, P)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    largest = tl.full([ROWS], -1e30, tl.float32)
    for part in range(parts):
        own = tl.cast(part, tl.int64) * num_rows + rows
        largest = tl.maximum(largest, tl.load(weights + 2 * own, mask=inside, other=-1e30))
    joined = tl.zeros([ROWS, P], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    columns = tl.arange(0, P)[None, :]
    for part in range(parts):
        own = tl.cast(part, tl.int64) * num_rows + rows
        factor = tl.exp2(tl.load(weights + 2 * own, mask=inside, other=-1e30) - largest)
        total += factor * tl.load(weights + 2 * own + 1, mask=inside, other=1.0)
        joined += factor[:, None] * tl.load(sums + own[:, None] * P + columns, mask=inside[:, None], other=0.0)
    joined = joined / total[:, None]
    tl.store(out + rows[:, None] * P + columns, joined.to(out.dtype.element_ty), mask=inside[:, None])

"""Attention of many short tasks over a tree of keys: shared prefix, passage, task. In Triton and in PyTorch.

One program processes a block of query rows (tasks of one passage, and heads that share keys) over all three levels,
with the online softmax of FlashAttention (arXiv 2205.14135), so that scores are never written to memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 64  # per block
LOG2E = 1.4426950408889634


class Tree(NamedTuple):
    """Keys and values (first dimension) of a layer with K key heads of size `width`.

    shared (2, K, E, width); passages (2, P, K, L, width), of which the first `lengths` (P,) are valid; own (2, P, N, K,
    S, width) for N tasks per passage, of which the first `pad` (P, N) are padding.
    """

    shared: Tensor
    passages: Tensor
    own: Tensor
    lengths: Tensor
    pad: Tensor


def tree_attention(q: Tensor, tree: Tree, places: Tensor) -> Tensor:
    """q (P, N, t, heads, width) of tokens at `places` (t,) among their own keys -> the same shape.

    Results for padding tokens are undefined.
    """
    if q.device.type != "cuda":
        return tree_attention_ref(q, tree, places)
    return tree_attention_triton(q, tree, places)


def tree_attention_ref(q: Tensor, tree: Tree, places: Tensor) -> Tensor:
    """Reference for `tree_attention`, task by task."""
    out, heads = torch.empty_like(q), q.shape[3] // tree.shared.shape[1]
    for p, n in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
        length, pad = int(tree.lengths[p]), int(tree.pad[p, n])
        keys, values = (
            torch.cat([tree.shared[i], tree.passages[i, p, :, :length], tree.own[i, p, n, :, pad:]], 1)
            .repeat_interleave(heads, 0) for i in (0, 1)
        )  # fmt: skip
        scores = q[p, n].transpose(0, 1) @ keys.mT * q.shape[-1] ** -0.5  # (heads, t, keys)
        before = tree.shared.shape[2] + length - pad
        hidden = torch.arange(keys.shape[1], device=q.device) > before + places[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
        out[p, n] = (weights @ values).transpose(0, 1)
    return out


@triton.jit
def _take(q, keys, values, seen, most, total, out, scale):
    """Add one block of keys (B, width) to the online softmax: maximum score, sum and weighted values per row."""
    scores = tl.where(seen, tl.dot(q, keys.T) * scale, float("-inf"))
    larger = tl.maximum(most, tl.max(scores, axis=1))
    weights = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(most - larger)
    out = tl.dot(weights.to(values.dtype), values, out * shrink[:, None])
    return larger, total * shrink + tl.sum(weights, axis=1), out


@triton.jit
def _tree_kernel(
    q, shared, passages, own, lengths, pad, places, out, E, L, S, N, t, K, shared_v, passages_v, own_v,
    scale, G: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    p, k = (tl.program_id(1) // K).to(tl.int64), (tl.program_id(1) % K).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    task, step, group = row // (t * G), row % (t * G) // G, row % G
    real = row < N * t * G
    col, block = tl.arange(0, W), tl.arange(0, KEYS)
    at = (((p * N + task) * t + step) * K * G + k * G + group)[:, None] * W + col[None, :]
    tile = tl.load(q + at, mask=real[:, None], other=0.0)
    place = tl.load(places + step, mask=real, other=0)
    first = tl.load(pad + p * N + task, mask=real, other=0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, W], tl.float32)

    for start in range(0, E, KEYS):
        here = (k * E + start + block)[:, None] * W + col[None, :]
        inside = start + block < E
        keys = tl.load(shared + here, mask=inside[:, None], other=0.0)
        values = tl.load(shared + shared_v + here, mask=inside[:, None], other=0.0)
        most, total, sums = _take(tile, keys, values, inside[None, :], most, total, sums, scale)

    length = tl.load(lengths + p)
    for start in range(0, length, KEYS):
        here = ((p * K + k) * L + start + block)[:, None] * W + col[None, :]
        inside = start + block < length
        keys = tl.load(passages + here, mask=inside[:, None], other=0.0)
        values = tl.load(passages + passages_v + here, mask=inside[:, None], other=0.0)
        most, total, sums = _take(tile, keys, values, inside[None, :], most, total, sums, scale)

    last_row = tl.minimum(tl.program_id(0) * ROWS + ROWS, N * t * G) - 1
    behind = tl.max(place, axis=0) + 1
    for n in range(tl.program_id(0) * ROWS // (t * G), last_row // (t * G) + 1):
        for start in range(0, behind, KEYS):
            here = (((p * N + n) * K + k) * S + start + block)[:, None] * W + col[None, :]
            slot = start + block
            keys = tl.load(own + here, mask=(slot < behind)[:, None], other=0.0)
            values = tl.load(own + own_v + here, mask=(slot < behind)[:, None], other=0.0)
            seen = (task == n)[:, None] & (slot[None, :] <= place[:, None]) & (slot[None, :] >= first[:, None])
            most, total, sums = _take(tile, keys, values, seen, most, total, sums, scale)

    tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mask=real[:, None])


def tree_attention_triton(q: Tensor, tree: Tree, places: Tensor) -> Tensor:
    """`tree_attention` on a GPU or under the interpreter; inputs contiguous, except for the layer slices of `tree`."""
    p, n, t, heads, width = q.shape
    kv_heads, q = tree.shared.shape[1], q.contiguous()
    groups, out = heads // kv_heads, torch.empty_like(q)
    rows = max(16, min(128, triton.next_power_of_2(n * t * groups)))
    _tree_kernel[(triton.cdiv(n * t * groups, rows), p * kv_heads)](
        q, tree.shared, tree.passages, tree.own, tree.lengths, tree.pad, places, out,
        tree.shared.shape[2], tree.passages.shape[3], tree.own.shape[4], n, t, kv_heads,
        tree.shared.stride(0), tree.passages.stride(0), tree.own.stride(0),
        LOG2E * width**-0.5, G=groups, W=width, ROWS=rows, KEYS=KEYS, num_warps=8 if rows == 128 else 4,
    )  # fmt: skip
    return out

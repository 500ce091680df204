"""Decode attention on the GPU: one new token per sequence over the keys in its state (decode_attention.cu).

Sequences whose first keys have the same bits can share one read of them (`Sharing`), and can keep them in memory that
another sequence lends them (`Loans`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels import gpu

_THREADS = 128
_HEADS_A_BLOCK, _ROWS_A_BLOCK = 8, 64  # query heads per block: of one sequence, and of all that share its keys
SHARED_UNIT = 64  # keys of a tile
_BLOCKS, _STAGES = 3, 2  # blocks that a multiprocessor has room for, and tiles of each
_PADDING = 40  # elements that a tile has besides each key and its value
_JOINERS = 4  # threads of attend_combine per dimension of a head


class Caches(NamedTuple):
    """The KV caches of b sequences, int64 on the device; each is (layers, 2, capacity, g, p) bfloat16 with room for one
    more token. Lent tokens have no rows in it, see `Loans`."""

    addresses: Tensor  # (b,)
    capacities: Tensor  # (b,) tokens
    lengths: Tensor  # (b,) tokens seen so far


class Sharing(NamedTuple):
    """For each of b sequences, int64 on the device: which first tokens are read from another's cache with equal bits.

    An owner reads its own copy. At most `max_members(h // g)` sequences, including the owner, have the same owner; they
    have the same `until`, which is at most the length of each.
    """

    owners: Tensor  # (b,) index in the batch; the sequence's own if it shares nothing
    until: Tensor  # (b,) number of shared first tokens, a multiple of SHARED_UNIT; 0 if it shares nothing


class Loans(NamedTuple):
    """For each of b sequences, int64 on the device: the cache that holds its first tokens instead of its own. The
    result has the same bits."""

    lenders: Tensor  # (b,) addresses
    capacities: Tensor  # (b,)
    num_lent: Tensor  # (b,) number of lent tokens, a multiple of SHARED_UNIT; 0: none


class Partials(NamedTuple):
    """Partial results of attention over each part of the keys, for each sequence that reads it: outputs before division
    (parts, members, h, p), maximum and sum of the scores (parts, members, h, 2)."""

    outs: Tensor
    weights: Tensor

    @classmethod
    def empty(cls, q: Tensor, g: int, sharing: bool = False) -> Partials:
        """For q (b, h, p) and g KV heads: enough parts to fill the card once, or a few for each of many sequences."""
        b, h, p = q.shape
        parts = max(_BLOCKS * gpu.sm_count(q.device) // (g * _tiles(h // g)), 4 * b)
        members = max_members(h // g) if sharing else 1
        return cls(*(torch.empty(parts, members, h, size, dtype=torch.float32, device=q.device) for size in (p, 2)))


def fits(p: int) -> bool:
    """Whether `attend` supports heads of this dimension."""
    return p in (64, 128)


def max_members(group: int) -> int:
    """How many sequences, with `group` query heads per KV head, can share one read of their keys."""
    return _ROWS_A_BLOCK // min(group, _HEADS_A_BLOCK)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    caches: Caches,
    loans: Loans,
    layer: int,
    partials: Partials,
    out: Tensor,
    sharing: Sharing | None = None,
    overlap: bool = True,
) -> None:
    """One token per sequence attends to its cache and itself; its key and value are appended to the cache.

    q (b, h, p), k, v (b, g, p), out (b, h, p) bfloat16; scores, sums and outputs accumulate in float32. `lengths` do
    not change. `partials` have room for as many members as `sharing` needs. `overlap`: see gpu.Kernel; the preceding
    kernel must not write to the caches.
    """
    (b, h, p), g, (parts, members) = q.shape, k.shape[1], partials.outs.shape[:2]
    constants = {"HEAD_DIM": p, "GROUP": h // g, "MEMBERS": members, "STAGES": _STAGES, "BLOCKS": _BLOCKS}
    split, combine = (gpu.kernel("decode_attention", name, **constants) for name in ("attend_split", "attend_combine"))
    scale = math.log2(math.e) / math.sqrt(p)
    addresses, capacities, lengths = caches
    step = (lengths, *(sharing or (None,) * 2))
    inputs = (q, k, v, addresses, capacities, *step, *loans, *partials)
    shared_bytes = _STAGES * SHARED_UNIT * 2 * (2 * p + _PADDING)
    grid = (parts, g * _tiles(h // g))
    split(grid, _THREADS, *inputs, layer, b, g, scale, shared_bytes=shared_bytes, overlap=overlap)
    combine((h, b), _JOINERS * p, *partials, *step, out, b, parts, overlap=overlap)


def attend_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    caches: Sequence[Tensor],
    lengths: Sequence[int],
    layer: int,
    sharing: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Like `attend`, given the caches themselves and each sequence's (owner, until) -> (b, h, p) in q.dtype."""
    outputs = []
    for i, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        cache[layer, :, length] = torch.stack([k[i], v[i]])
        owner, until = sharing[i] if sharing else (i, 0)
        seen = torch.cat([caches[owner][layer, :, :until], cache[layer, :, until : length + 1]], dim=1)
        keys, values = seen.to(q.dtype)  # (s+1, g, p)
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("hp,shp->hs", q[i], keys) / math.sqrt(q.shape[-1])
        outputs.append(torch.einsum("hs,shp->hp", scores.softmax(-1), values))
    return torch.stack(outputs)


def _tiles(group: int) -> int:
    """Blocks that the query heads of one KV head are spread over."""
    return -(-group // _HEADS_A_BLOCK)

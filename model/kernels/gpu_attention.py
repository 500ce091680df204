"""Attention of one new token a sequence over the keys in its own state, on the GPU: decode_attention.cu.

Of sequences whose first keys are the same bits (`Sharing`) one's are read for several of them at once, and may lie in
memory that another has lent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels import gpu

_THREADS = 128
_BLOCKS_A_PROCESSOR, _BLOCKS_THAT_SHARE = 3, 2  # that many fit a multiprocessor's registers
_HEADS_A_BLOCK, _ROWS_A_BLOCK = 8, 16  # query heads of one sequence, of all that a block reads keys for
SHARED_UNIT = 64  # keys that the warps of a block take at once
_JOINERS = 4  # threads of attend_combine a dimension of the head


class Caches(NamedTuple):
    """Of b sequences, int64 on the device; a cache is (layers, 2, capacity, g, p) bfloat16 with room for a token.

    It has no rows for the tokens that are lent, see `Loans`."""

    addresses: Tensor  # (b,)
    capacities: Tensor  # (b,) tokens
    lengths: Tensor  # (b,) tokens seen so far


class Sharing(NamedTuple):
    """Of b sequences, int64 on the device: what of each is read from another's cache, where it is the same bits.

    An owner reads its own copy; `max_members(h // g)` sequences at most have the same owner, itself counted, and the
    same `until`, at most each one's length.
    """

    owners: Tensor  # (b,) place in the batch, a sequence's own if it shares nothing
    until: Tensor  # (b,) tokens from the first on, a multiple of SHARED_UNIT; 0 if it shares nothing


class Loans(NamedTuple):
    """Of b sequences, int64 on the device: whose cache a sequence's first tokens are read from, in the place of its
    own. The result has the same bits."""

    lenders: Tensor  # (b,) addresses
    capacities: Tensor  # (b,)
    num_lent: Tensor  # (b,) how many tokens that are, a multiple of SHARED_UNIT; 0: none


class Partials(NamedTuple):
    """What is known of each part of the keys, for each of the sequences that it is read for: outputs before division
    (parts, members, h, p), maximum and sum (parts, members, h, 2)."""

    outs: Tensor
    weights: Tensor

    @classmethod
    def empty(cls, q: Tensor, g: int, sharing: bool = False) -> Partials:
        """For q (b, h, p) and g KV heads: parts enough to fill the card once, or a few for each of many sequences."""
        b, h, p = q.shape
        blocks = _BLOCKS_THAT_SHARE if sharing else _BLOCKS_A_PROCESSOR
        parts = max(blocks * gpu.sm_count(q.device) // (g * _tiles(h // g)), 4 * b)
        members = max_members(h // g) if sharing else 1
        return cls(*(torch.empty(parts, members, h, size, dtype=torch.float32, device=q.device) for size in (p, 2)))


def fits(p: int) -> bool:
    """Whether `attend` is made for heads of this dimension."""
    return p in (64, 128)


def max_members(group: int) -> int:
    """How many sequences of `group` query heads a KV head can share one read of their keys."""
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
    """Attend with one token a sequence to its cache and itself, and write its key and value behind the cached ones.

    q (b, h, p), k, v (b, g, p), out (b, h, p) bfloat16; scores, sums and outputs accumulate in float32. `lengths` are
    left as they are. `partials` are made for as many members as `sharing` wants. `overlap`: see gpu.Kernel; of the
    caches nothing may come from the kernel before.
    """
    (b, h, p), g, (parts, members) = q.shape, k.shape[1], partials.outs.shape[:2]
    constants = {"HEAD_DIM": p, "GROUP": h // g, "MEMBERS": members}
    split, combine = (gpu.kernel("decode_attention", name, **constants) for name in ("attend_split", "attend_combine"))
    scale = math.log2(math.e) / math.sqrt(p)
    addresses, capacities, lengths = caches
    step = (lengths, *(sharing or (None,) * 2))
    inputs = (q, k, v, addresses, capacities, *step, *loans, *partials)
    split((parts, g * _tiles(h // g)), _THREADS, *inputs, layer, b, g, scale, overlap=overlap)
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
    """As `attend` with the caches themselves and (owner, until) of each sequence -> (b, h, p) in q.dtype."""
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
    """Blocks that share a KV head's keys."""
    return -(-group // _HEADS_A_BLOCK)

"""Attention of one new token a sequence over the keys in each sequence's own state, on the GPU: decode_attention.cu."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels import gpu

_THREADS, _BLOCKS_A_PROCESSOR = 128, 3
_HEADS_A_BLOCK = 8
_JOINERS = 4  # threads of attend_combine a dimension of the head


class Caches(NamedTuple):
    """Of b sequences, int64 on the device; a cache is (layers, 2, capacity, g, p) bfloat16 with room for a token."""

    addresses: Tensor  # (b,)
    capacities: Tensor  # (b,) tokens
    lengths: Tensor  # (b,) tokens seen so far


class Partials(NamedTuple):
    """What is known of each part of the keys: outputs (parts, h, p) before division, maximum and sum (parts, h, 2)."""

    outs: Tensor
    weights: Tensor

    @classmethod
    def empty(cls, q: Tensor, g: int) -> Partials:
        """For q (b, h, p) and g KV heads: parts enough to fill the card once, or a few for each of many sequences."""
        b, h, p = q.shape
        blocks = _BLOCKS_A_PROCESSOR * gpu.sm_count(q.device) // (g * _tiles(h // g))
        parts = max(blocks, 4 * b)
        return cls(*(torch.empty(parts, h, size, dtype=torch.float32, device=q.device) for size in (p, 2)))


def fits(p: int) -> bool:
    """Whether `attend` is made for heads of this dimension."""
    return p in (64, 128)


def attend(
    q: Tensor, k: Tensor, v: Tensor, caches: Caches, layer: int, partials: Partials, out: Tensor, overlap: bool = True
) -> None:
    """Attend with one token a sequence to its cache and itself, and write its key and value behind the cached ones.

    q (b, h, p), k, v (b, g, p), out (b, h, p) bfloat16; scores, sums and outputs accumulate in float32. `lengths` are
    left as they are. `overlap`: see gpu.Kernel; of the caches nothing may come from the kernel before.
    """
    (b, h, p), g, parts = q.shape, k.shape[1], len(partials.outs)
    split, combine = (
        gpu.kernel("decode_attention", name, HEAD_DIM=p, GROUP=h // g) for name in ("attend_split", "attend_combine")
    )
    scale = math.log2(math.e) / math.sqrt(p)
    addresses, capacities, lengths = caches
    inputs = (q, k, v, addresses, capacities, lengths, *partials)
    split((parts, g * _tiles(h // g)), _THREADS, *inputs, layer, b, g, scale, overlap=overlap)
    combine((h, b), _JOINERS * p, *partials, lengths, out, b, parts, overlap=overlap)


def attend_ref(q: Tensor, k: Tensor, v: Tensor, caches: Sequence[Tensor], lengths: Sequence[int], layer: int) -> Tensor:
    """As `attend` with the caches themselves -> (b, h, p) in q.dtype."""
    outputs = []
    for i, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        cache[layer, :, length] = torch.stack([k[i], v[i]])
        keys, values = cache[layer, :, : length + 1].to(q.dtype)  # (s+1, g, p)
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("hp,shp->hs", q[i], keys) / math.sqrt(q.shape[-1])
        outputs.append(torch.einsum("hs,shp->hp", scores.softmax(-1), values))
    return torch.stack(outputs)


def _tiles(group: int) -> int:
    """Blocks that share a KV head's keys."""
    return -(-group // _HEADS_A_BLOCK)

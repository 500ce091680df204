"""Attention of a prefill segment over a long past on the GPU, a block of keys at a time: the fastest kernel there is
for one block, and the blocks' results merged by their log-sum-exp (`merge_attention` in elementwise.cu).

cuDNN's attention is the fastest at some shapes alone and plans tens of milliseconds for each new one: blocks all have
one shape. What is left over, and segments of odd lengths, goes to flash attention. Callers ask `takes` first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.kernels import gpu

ENABLED = False
BLOCK_KEYS = 8192
SEGMENT_UNIT = 8192  # segments of whole multiples have few shapes
_THREADS = 256


def takes(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend` is for these: q (t, h, p), keys and values (s+t, g, p)."""
    t, p = len(q), q.shape[-1]
    regular = t % SEGMENT_UNIT == 0 and q.dtype == torch.bfloat16 and p % 8 == 0
    return ENABLED and regular and gpu.supports(q, keys, values)


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last t of s+t tokens attend to all before them. q (t, h, p), keys, values (s+t, g, p) -> (t, h, p)."""
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

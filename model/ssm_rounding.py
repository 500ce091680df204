"""SSM states in int8 with one scale per channel, an option for snapshots.

A snapshot is rounded once, when it is taken, and its sequence continues from the rounded values, so a restored state
and one that was never stored have the same bits. Why not another scale: docs/log.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_ssm(ssm: Tensor) -> tuple[Tensor, Tensor]:
    """(n_mamba, e, n) float32 -> int8 of the same shape, bfloat16 scale (n_mamba, e, 1); ssm is about int8 * scale.

    The scale is at most 1/256 too small, which rounds to no more than 127.
    """
    scale = (ssm.abs().amax(2, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny).bfloat16()
    return (ssm / scale).round_().to(torch.int8), scale


def dequantize_ssm(rounded: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write the values (n_mamba, e, n) into float32 `out`, which may be on another device."""
    out.copy_(rounded)
    out *= scale.to(out.device)

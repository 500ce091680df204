"""The gate of SwiGLU, silu(gate) * up, in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import cpu, gpu, gpu_prefill


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., f), possibly the halves of one product -> (..., f). Differentiable."""
    if gpu.supports(gate, up) and gpu_prefill.rows_fit(gate, up):
        return gpu_prefill.silu_mul(gate, up)
    return cpu.silu_mul(gate, up) if cpu.supports(gate, up) else F.silu(gate) * up


def silu_mul_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The definition, in float32."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)

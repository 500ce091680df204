"""The Mamba mixer's recurrence for one token per sequence on the GPU, with states updated in place: mamba_step.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import gpu

_THREADS, _LANES = 128, 4
_MAX_SEQUENCES = 4  # of a block: their states wait in registers


class StepWeights(NamedTuple):
    """All bfloat16, except A_log and D, which are float32."""

    dt_norm: Tensor  # (r,)
    b_norm: Tensor  # (n,)
    c_norm: Tensor  # (n,)
    dt_proj: Tensor  # (e, r)
    dt_bias: Tensor  # (e,)
    A_log: Tensor  # (e, n)
    D: Tensor  # (e,)
    eps: float


def fits(r: int, n: int) -> bool:
    """Whether `ssm_step` supports this dt_rank and d_state."""
    return r % 4 == 0 and n % 4 == 0


def ssm_step(
    x: Tensor,
    u: Tensor,
    z: Tensor,
    weights: StepWeights,
    states: Tensor,
    offset: int,
    out: Tensor,
    overlap: bool = True,
) -> None:
    """Norms of dt, B and C, dt_proj, one step of the selective scan, and its gate.

    x (b, r+2n) float32: dt, B and C; u, z, out (b, e) bfloat16; states (b,) int64: addresses of float32 memory with the
    state (e, n) at element `offset`, advanced in place. `overlap`: see gpu.Kernel; the preceding kernel must write
    neither the addresses nor the states. Accumulates in float32.
    """
    b, e = u.shape
    r, n = weights.dt_proj.shape[1], weights.A_log.shape[1]
    sequences = min(1 << (b - 1).bit_length(), _MAX_SEQUENCES)
    step = gpu.kernel("mamba_step", "ssm_step", DT_RANK=r, D_STATE=n, SEQUENCES=sequences)
    grid = (-(-e * _LANES // _THREADS), -(-b // sequences))
    *tensors, eps = weights
    step(grid, _THREADS, x, u, z, *tensors, states, out, offset, b, e, eps, overlap=overlap)


def ssm_step_ref(x: Tensor, u: Tensor, z: Tensor, weights: StepWeights, states: Sequence[Tensor]) -> Tensor:
    """Like `ssm_step`, given the states (e, n) themselves -> (b, e) in x.dtype."""
    r, n = weights.dt_proj.shape[1], weights.A_log.shape[1]
    u, z, *tensors = (tensor.to(x.dtype) for tensor in (u, z, *weights[:-1]))
    dt_norm, b_norm, c_norm, dt_proj, dt_bias, A_log, D = tensors
    dt, B, C = x.split([r, n, n], dim=-1)
    dt = F.rms_norm(dt, (r,), dt_norm, weights.eps)
    B, C = F.rms_norm(B, (n,), b_norm, weights.eps), F.rms_norm(C, (n,), c_norm, weights.eps)
    delta = F.softplus(F.linear(dt, dt_proj, dt_bias))
    outputs = []
    for i, state in enumerate(states):
        state.copy_(torch.exp(delta[i, :, None] * -A_log.exp()) * state + (delta[i] * u[i])[:, None] * B[i])
        outputs.append((state.to(x.dtype) @ C[i] + D * u[i]) * F.silu(z[i]))
    return torch.stack(outputs)

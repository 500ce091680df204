"""The forward pass of training: hidden states of chosen layers, positions computed on the device, fused operations.

`accelerate` replaces operations that take many small kernels in PyTorch: norms and gates are fused, gate and up
projections are one product, and the permutation of tokens to experts gathers in its backward instead of adding up.
Results and gradients are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Attention, rotation
from model.batch import Batch, Group
from model.jamba import Jamba
from model.kernels.rms_norm import RMSNorm
from model.kernels.selective_scan import selective_scan
from model.kernels.silu_mul import silu_mul
from model.mamba import MambaMixer
from model.moe import MLP, MoE, RouterStats

try:
    from model.train import fused
except ImportError:  # a PyTorch without Triton
    fused = None


@dataclass(frozen=True, slots=True)
class Rows(Batch):
    """Rows of equal length without cached state."""

    def positions(self) -> Tensor:
        return torch.arange(self.groups[0].t, device=self.device).repeat(self.groups[0].b)


def forward_hidden(model: Jamba, token_ids: Tensor, taps: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
    """token_ids (b, t) -> final hidden states (b·t, d) before the head, and after each layer in `taps`."""
    batch = Rows.fresh(*token_ids.shape, token_ids.device)
    x, kept = model.embed_tokens(token_ids.flatten()), {}
    for i, layer in enumerate(model.layers):
        x = layer(x, batch)
        if i in taps:
            kept[i] = x
    return model.final_layernorm(x), kept


def set_rope(model: Jamba, scale: float) -> None:
    """Scale the rotary angles; 0 disables RoPE."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.rope_scale, module.rope_theta = scale, model.config.rope_theta if scale > 0 else None


def accelerate(model: Jamba) -> None:
    """Replace the forward of norms, positions, scans, MLPs and experts in place.

    Without gradients the model's own kernels run, except for positions.
    """
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(_norm, module)
        elif isinstance(module, Attention):
            module.turn = partial(_turn, module)
        elif isinstance(module, MambaMixer):
            module._scan = partial(_scan, module)
        elif isinstance(module, MLP):
            module.forward = partial(_mlp, module)
        elif isinstance(module, MoE) and module.top_k == 1:
            module.forward = partial(_experts, module)


def _norm(module: RMSNorm, x: Tensor) -> Tensor:
    if fused is None or not x.is_cuda or not torch.is_grad_enabled():
        return RMSNorm.forward(module, x)
    return fused.rms_norm(x.flatten(0, -2), module.weight, module.eps).view(x.shape)


def _turn(attention: Attention, q: Tensor, k: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    if fused is None or not q.is_cuda or attention.rope_theta is None or not isinstance(batch, Rows):
        return Attention.turn(attention, q, k, batch)
    t = batch.groups[0].t
    turned = _angles(t, attention.rope_theta, attention.rope_scale, attention.head_dim, q.device)
    return fused.rotate(q, *turned), fused.rotate(k, *turned)


@lru_cache(maxsize=16)
def _angles(t: int, theta: float, scale: float, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (t, p/2), equal for both halves of a head."""
    with torch.inference_mode(False):  # the cached tensors are also used in training
        positions = torch.arange(t, device=device)
        cos, sin = (x[:, 0, : head_dim // 2].contiguous() for x in rotation(positions, theta, scale, head_dim))
    return cos, sin


def _scan(mixer: MambaMixer, group: Group, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
    if fused is None or not u.is_cuda or not torch.is_grad_enabled():
        return MambaMixer._scan(mixer, group, u, dt, B, C, z)
    delta = fused.softplus(dt, mixer.dt_proj.bias)
    return selective_scan(u, delta, -torch.exp(mixer.A_log.float()), B, C, mixer.D, z)


def _gated(gate_up: Tensor) -> Tensor:
    """(T, 2f) -> (T, f)"""
    if fused is None or not gate_up.is_cuda or not torch.is_grad_enabled():
        return silu_mul(*gate_up.chunk(2, dim=-1))
    return fused.gated(gate_up)


def _mlp(mlp: MLP, x: Tensor) -> Tensor:
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    return mlp.down_proj(_gated(F.linear(x, gate_up)))


def _experts(moe: MoE, x: Tensor) -> Tensor:
    """`MoE.forward` with top-1 routing. (T, d) -> (T, d)"""
    probabilities = moe.router(x).softmax(dim=-1, dtype=torch.float32)
    weights, chosen = probabilities.max(dim=-1)
    order = chosen.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    counts = (chosen[:, None] == torch.arange(moe.num_experts, device=x.device)).sum(0)
    if moe.collect_stats:
        moe.stats = RouterStats(counts / len(order), probabilities.mean(0))
    ends = counts.cumsum(0, dtype=torch.int32)  # stays on the device: no synchronization
    gate_up = F.grouped_mm(Permute.apply(x, order, inverse), moe.experts.gate_up_proj.mT, offs=ends)
    down = F.grouped_mm(_gated(gate_up), moe.experts.down_proj.mT, offs=ends)
    return weights[:, None].to(x.dtype) * Permute.apply(down, inverse, order)


class Permute(torch.autograd.Function):
    """x[order]; the gradient is gathered by the inverse permutation instead of scatter-added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None

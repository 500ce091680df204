"""The forward of training: hidden states at chosen layers, positions made on the device, and faster token-wise parts.

`accelerate` swaps what costs many small kernels in PyTorch: norms and gates are fused, gates and ups are one product,
and the experts' sorting has a backward that gathers instead of adding up. Results and gradients stay the same up to
rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import Attention
from model.batch import Batch
from model.jamba import Jamba
from model.kernels.rms_norm import RMSNorm
from model.kernels.silu_mul import silu_mul
from model.moe import MLP, MoE, RouterStats

try:
    from model.train import fused
except ImportError:  # a PyTorch without Triton
    fused = None


@dataclass(frozen=True, slots=True)
class Rows(Batch):
    """Equally long rows without a past."""

    def positions(self) -> Tensor:
        return torch.arange(self.groups[0].t, device=self.device).repeat(self.groups[0].b)


def forward_hidden(model: Jamba, token_ids: Tensor, taps: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
    """token_ids (b, t) -> final hidden states (b·t, d) before the head, and those after each layer in `taps`."""
    batch = Rows.fresh(*token_ids.shape, token_ids.device)
    x, kept = model.embed_tokens(token_ids.flatten()), {}
    for i, layer in enumerate(model.layers):
        x = layer(x, batch)
        if i in taps:
            kept[i] = x
    return model.final_layernorm(x), kept


def set_rope(model: Jamba, scale: float) -> None:
    """Multiply the rotary angles; at 0 nothing is turned."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.rope_scale, module.rope_theta = scale, model.config.rope_theta if scale > 0 else None


def accelerate(model: Jamba) -> None:
    """Swap the forward of norms, MLPs and experts in place. Without gradients the model's own kernels run."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(_norm, module)
        elif isinstance(module, MLP):
            module.forward = partial(_mlp, module)
        elif isinstance(module, MoE) and module.top_k == 1:
            module.forward = partial(_experts, module)


def _norm(module: RMSNorm, x: Tensor) -> Tensor:
    if fused is None or not x.is_cuda or not torch.is_grad_enabled():
        return RMSNorm.forward(module, x)
    return fused.rms_norm(x.flatten(0, -2), module.weight, module.eps).view(x.shape)


def _gated(gate_up: Tensor) -> Tensor:
    """(T, 2f) -> (T, f)"""
    if fused is None or not gate_up.is_cuda or not torch.is_grad_enabled():
        return silu_mul(*gate_up.chunk(2, dim=-1))
    return fused.gated(gate_up)


def _mlp(mlp: MLP, x: Tensor) -> Tensor:
    gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    return mlp.down_proj(_gated(F.linear(x, gate_up)))


def _experts(moe: MoE, x: Tensor) -> Tensor:
    """`MoE.forward` with one expert a token. (T, d) -> (T, d)"""
    probabilities = moe.router(x).softmax(dim=-1, dtype=torch.float32)
    weights, chosen = probabilities.max(dim=-1)
    order = chosen.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    counts = (chosen[:, None] == torch.arange(moe.num_experts, device=x.device)).sum(0)
    if moe.collect_stats:
        moe.stats = RouterStats(counts / len(order), probabilities.mean(0))
    rows, parts = Permute.apply(x, order, inverse), []
    gate_ups, downs = moe.experts.gate_up_proj.unbind(), moe.experts.down_proj.unbind()
    for own, gate_up, down in zip(rows.split(counts.tolist()), gate_ups, downs, strict=True):
        if len(own):
            parts.append(F.linear(_gated(F.linear(own, gate_up)), down))
    return weights[:, None].to(x.dtype) * Permute.apply(torch.cat(parts), inverse, order)


class Permute(torch.autograd.Function):
    """x[order]; its gradient is gathered by the inverse, not added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None

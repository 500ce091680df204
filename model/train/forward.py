"""The forward of training: hidden states at chosen layers, positions made on the device, and faster token-wise parts.

`accelerate` swaps what costs many small kernels in PyTorch: norms and gates are compiled, and the experts' sorting has
a backward that gathers instead of adding up. Results and gradients stay the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
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


def accelerate(model: Jamba, backend: str = "inductor") -> None:
    """Swap the forward of norms, MLPs and experts in place; what fails to compile runs as it is.

    Compiled code is for steps, whose shapes repeat: without gradients, as when scoring, the plain one runs.
    """
    torch._dynamo.config.suppress_errors = True
    norm = torch.compile(_norm, dynamic=False, backend=backend)
    gate = torch.compile(_gate, dynamic=True, backend=backend)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(_run_norm, norm, module)
        elif isinstance(module, MLP):
            module.forward = partial(_run_mlp, gate, module)
        elif isinstance(module, MoE) and module.top_k == 1:
            module.forward = partial(_run_experts, gate, module)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(x.dtype)


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _run_norm(norm: Callable[..., Tensor], module: RMSNorm, x: Tensor) -> Tensor:
    return norm(x, module.weight, module.eps) if torch.is_grad_enabled() else RMSNorm.forward(module, x)


def _run_mlp(gate: Callable[..., Tensor], mlp: MLP, x: Tensor) -> Tensor:
    gate = gate if torch.is_grad_enabled() else silu_mul
    return mlp.down_proj(gate(mlp.gate_proj(x), mlp.up_proj(x)))


def _run_experts(gate: Callable[..., Tensor], moe: MoE, x: Tensor) -> Tensor:
    """`MoE.forward` with one expert a token. (T, d) -> (T, d)"""
    gate = gate if torch.is_grad_enabled() else silu_mul
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
            first, second = F.linear(own, gate_up).chunk(2, dim=-1)
            parts.append(F.linear(gate(first, second), down))
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

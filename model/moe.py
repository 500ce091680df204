"""The feed-forward half of a layer: one SwiGLU, or a mixture of experts (a router and several SwiGLUs)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import JambaConfig
from model.kernels.silu_mul import silu_mul


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)"""
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


@dataclass(frozen=True, slots=True)
class RouterStats:
    """How one MoE layer distributed the tokens of its last call."""

    share: Tensor  # (m,) f_e: share of the T*k assignments that went to each expert; sums to 1
    probability: Tensor  # (m,) P_e: mean router probability, differentiable; sums to 1

    def load_balancing_loss(self) -> Tensor:
        """m * sum f_e P_e: 1 when balanced, m when one expert takes all. Source: Switch Transformers, eq. 4-6."""
        return len(self.share) * (self.share * self.probability).sum()


class MoE(nn.Module):
    """Top-k of a softmax over all experts, the chosen weights not renormalised. No token is dropped."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.collect_stats = False
        self.stats: RouterStats | None = None  # of the last call with `collect_stats`

    def forward(self, x: Tensor) -> Tensor:
        """(T, d) -> (T, d)"""
        probabilities = self.router(x).softmax(dim=-1, dtype=torch.float32)  # (T, m)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)  # (T, k)
        if not self.collect_stats and self.experts.can_mix(x):
            return self.experts.mix(x, weights, chosen)
        order = chosen.flatten().argsort(stable=True)  # assignments, expert by expert
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, chosen.flatten(), torch.ones_like(order))
        if self.collect_stats:
            self.stats = RouterStats(counts / chosen.numel(), probabilities.mean(0))
        rows = self.experts(x.index_select(0, order // self.top_k), counts.tolist())
        rows = rows.index_select(0, order.argsort()).unflatten(0, chosen.shape)  # (T, k, d)
        first, *others = (weights[..., None].to(x.dtype) * rows).unbind(1)
        return sum(others, first)


class Experts(nn.Module):
    """m SwiGLUs in two tensors, as `transformers` 5 holds them: the first f rows of `gate_up_proj` are the gates."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        m, d, f = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(m, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(m, d, f))
        if not self.down_proj.is_meta:
            nn.init.normal_(self.gate_up_proj, std=d**-0.5)
            nn.init.normal_(self.down_proj, std=f**-0.5)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """x (T*k, d) sorted by expert, `counts` rows for each -> (T*k, d)."""
        parts = zip(x.split(counts), self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        return torch.cat([_swiglu(rows, gate_up, down) for rows, gate_up, down in parts if len(rows)])

    def can_mix(self, x: Tensor) -> bool:
        """Whether `mix` supports tokens like x (T, d): true for int8 experts on a GPU."""
        return False

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x (T, d) through the chosen experts (T, k) of each token, summed by weights (T, k) float32 -> (T, d)."""
        raise NotImplementedError


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(silu_mul(gate, up), down)

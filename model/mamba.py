"""The Mamba mixer as Jamba has it: Mamba 1 with RMSNorm on dt, B and C."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Group
from model.config import JambaConfig
from model.kernels.causal_conv import causal_conv
from model.kernels.rms_norm import RMSNorm
from model.kernels.selective_scan import selective_scan


class MambaMixer(nn.Module):
    """`index` counts the Mamba layers: the layer's place in a state's conv and ssm."""

    def __init__(self, config: JambaConfig, index: int) -> None:
        super().__init__()
        self.index = index
        d_inner, d_state, dt_rank = config.mamba_d_inner, config.mamba_d_state, config.mamba_dt_rank
        self.in_proj = nn.Linear(config.hidden_size, 2 * d_inner, bias=config.mamba_proj_bias)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.mamba_d_conv, groups=d_inner, bias=config.mamba_conv_bias)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, config.hidden_size, bias=config.mamba_proj_bias)
        self.dt_layernorm = RMSNorm(dt_rank, eps=config.rms_norm_eps)
        self.b_layernorm = RMSNorm(d_state, eps=config.rms_norm_eps)
        self.c_layernorm = RMSNorm(d_state, eps=config.rms_norm_eps)
        self.widths = [dt_rank, d_state, d_state]
        if not self.A_log.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, low: float = 1e-3, high: float = 0.1) -> None:
        """A is -1, -2, ... in each channel; delta starts between `low` and `high`, log-uniformly distributed.

        Source: Mamba, section 3.6.
        """
        self.A_log.copy_(torch.arange(1.0, self.A_log.shape[1] + 1).log())
        nn.init.uniform_(self.dt_proj.bias, math.log(low), math.log(high)).exp_()
        self.dt_proj.bias += torch.log(-torch.expm1(-self.dt_proj.bias))  # the inverse of softplus

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(T, d) -> (T, d); advances the states' conv and ssm."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = batch.map_groups(self._convolve, u)
        dt, B, C = self.x_proj(u).split(self.widths, dim=-1)
        dt = F.linear(self.dt_layernorm(dt), self.dt_proj.weight)  # its bias is added in float32, within the scan
        y = batch.map_groups(self._scan, u, dt, self.b_layernorm(B), self.c_layernorm(C), z)
        return self.out_proj(y)

    def _convolve(self, group: Group, u: Tensor) -> Tensor:
        state = None if group.conv is None else group.conv[self.index]
        out = causal_conv(u, state, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        if group.padding is not None:
            state.copy_(u.index_select(1, group.padding.last).mT)
        return out

    def _scan(self, group: Group, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        state = None if group.ssm is None else group.ssm[self.index]
        if group.padding is not None:  # the step of the scan is softplus of it: none
            dt = dt.masked_fill(group.padding.rows, -torch.inf)
        A = -torch.exp(self.A_log.float())
        return selective_scan(u, dt, A, B, C, self.D, z, state, self.dt_proj.bias)

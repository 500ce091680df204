"""W8A16: linear weights as int8 rows with a float32 scale each, activations as they are.

Quantized: every nn.Linear and all experts. Left alone: embedding (and a head tied to it), norms, conv, A, D, router,
dt_proj. A pair, as in gpt-fast: `quantize_rows` makes the weights, `swap_linears` puts in the layers that use them.
W8A8 on a CPU: `round_rows`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.jamba import Jamba
from model.kernels import cpu, gpu, gpu_prefill
from model.kernels.silu_mul import silu_mul
from model.moe import Experts

_LEFT_ALONE = ("router", "dt_proj")
_FEW_ROUNDED = 32  # tokens up to which a layer in two calls is faster than its modules, where rows are rounded


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (..., out, in) -> int8 of the same shape and float32 scale (..., out); weight is about q * scale."""
    weight = weight.float()
    scale = (weight.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale[..., None]).round_().to(torch.int8), scale


def int8_linear(x: Tensor, weight: Tensor | cpu.Packed, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ (weight (out, in) * scale (out,)).T + bias, in x.dtype; x is rounded where the weight is packed."""
    if isinstance(weight, cpu.Packed):
        return cpu.rounded_linear(x, weight, scale, bias)
    if gpu.supports(x, weight, bias) and gpu_prefill.fits(x, weight):
        return gpu_prefill.int8_linear(x, weight, scale, bias)
    if cpu.supports(x):
        return cpu.int8_linear(x, weight, scale, bias)
    out = F.linear(x, weight.to(x.dtype)) * scale
    return (out if bias is None else out + bias).to(x.dtype)


class Int8Linear(nn.Module):
    """In the place of an nn.Linear; its weights are still to be loaded."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.scale = _empty_int8(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale, self.bias)


class Int8Experts(nn.Module):
    """In the place of `Experts`; its weights are still to be loaded."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate_up_proj, self.gate_up_scale = _empty_int8(experts.gate_up_proj)
        self.down_proj, self.down_scale = _empty_int8(experts.down_proj)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """As `Experts.forward`."""
        parts = zip(x.split(counts), *self._weights(), strict=True)
        return torch.cat([_swiglu(rows, *expert) for rows, *expert in parts if len(rows)])

    def can_mix(self, x: Tensor) -> bool:
        if isinstance(self.down_proj, list):  # of packed matrices
            return False
        return gpu.supports(x, self.down_proj) and gpu_prefill.fits(x, self.gate_up_proj, self.down_proj)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """As `Experts.mix`."""
        return gpu_prefill.mix_experts(x, weights, chosen, *self._weights())

    def _weights(self) -> tuple[Tensor | list[cpu.Packed], Tensor, Tensor | list[cpu.Packed], Tensor]:
        return self.gate_up_proj, self.gate_up_scale, self.down_proj, self.down_scale


def swap_linears(model: Jamba) -> None:
    """Replace the layers whose weights can be int8 by such with empty weights, in place."""
    embedding = model.embed_tokens.weight
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Experts):
                setattr(module, name, Int8Experts(child))
            elif isinstance(child, nn.Linear) and name not in _LEFT_ALONE and child.weight is not embedding:
                setattr(module, name, Int8Linear(child))


def round_rows(model: Jamba) -> None:
    """Let a CPU multiply in int8: weights packed, rows rounded (`cpu.rounded_linear`), in place; x_proj stays W8A16."""
    model.forget_addresses()
    for name, module in model.layers.named_modules():
        if isinstance(module, Int8Experts):
            for matrices in ("gate_up_proj", "down_proj"):
                packed = [cpu.Packed.of(matrix) for matrix in getattr(module, matrices)]
                delattr(module, matrices)
                setattr(module, matrices, packed)
        elif isinstance(module, Int8Linear) and not name.endswith("x_proj"):
            packed = cpu.Packed.of(module.weight)
            del module.weight
            module.weight = packed
    model.few_tokens = _FEW_ROUNDED


def _swiglu(
    x: Tensor, gate_up: Tensor | cpu.Packed, gate_up_scale: Tensor, down: Tensor | cpu.Packed, down_scale: Tensor
) -> Tensor:
    gate, up = int8_linear(x, gate_up, gate_up_scale).chunk(2, dim=-1)
    return int8_linear(silu_mul(gate, up), down, down_scale)


def _empty_int8(weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    return nn.Parameter(values, requires_grad=False), nn.Parameter(scale, requires_grad=False)

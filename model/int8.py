"""W8A16: linear weights in int8 with one float32 scale per row, activations in floating point.

Quantized: every nn.Linear and all experts, except the router and dt_proj. Not quantized: embedding (and a head tied to
it), norms, convolution, A, D. As in gpt-fast, `quantize_rows` makes the weights and `swap_linears` puts in the layers
that use them. `PackedLinear` and `PackedExperts` are W8A8 and W4A8 on a CPU.
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


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (..., out, in) -> int8 values of the same shape, float32 scale (..., out); weight ≈ values * scale."""
    weight = weight.float()
    scale = (weight.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale[..., None]).round_().to(torch.int8), scale


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ (weight (out, in) * scale (out,)).T + bias, in x.dtype."""
    if gpu.supports(x, weight, bias) and gpu_prefill.fits(x, weight):
        return gpu_prefill.int8_linear(x, weight, scale, bias)
    if cpu.supports(x):
        return cpu.int8_linear(x, weight, scale, bias)
    out = F.linear(x, weight.to(x.dtype)) * scale
    return (out if bias is None else out + bias).to(x.dtype)


class Int8Linear(nn.Module):
    """Replaces an nn.Linear; its weights are empty until loaded."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.scale = _empty_int8(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale, self.bias)


class Int8Experts(nn.Module):
    """Replaces `Experts`; its weights are empty until loaded."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate_up_proj, self.gate_up_scale = _empty_int8(experts.gate_up_proj)
        self.down_proj, self.down_scale = _empty_int8(experts.down_proj)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """As `Experts.forward`."""
        parts = zip(x.split(counts), *self._weights(), strict=True)
        return torch.cat([_swiglu(rows, *expert) for rows, *expert in parts if len(rows)])

    def can_mix(self, x: Tensor) -> bool:
        return gpu.supports(x, self.down_proj) and gpu_prefill.fits(x, self.gate_up_proj, self.down_proj)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """As `Experts.mix`."""
        return gpu_prefill.mix_experts(x, weights, chosen, *self._weights())

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.gate_up_proj, self.gate_up_scale, self.down_proj, self.down_scale


class Int8Head(nn.Module):
    """A head tied to an embedding that is stored as int8: the same values in half the bytes of bfloat16."""

    bias = None

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale)


class PackedLinear(nn.Module):
    """Replaces an Int8Linear on a CPU; quantizes its input (`cpu.rounded_linear`)."""

    def __init__(self, weight: cpu.Packed, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return cpu.rounded_linear(x, self.weight, self.bias)


class PackedExperts(nn.Module):
    """Replaces Int8Experts on a CPU; two packed matrices per expert, gate and up concatenated, and down."""

    def __init__(self, gate_up_proj: list[cpu.Packed], down_proj: list[cpu.Packed]) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """As `Experts.forward`."""
        outputs = []
        for rows, gate_up, down in zip(x.split(counts), self.gate_up_proj, self.down_proj, strict=True):
            if len(rows):
                outputs.append(cpu.rounded_linear(silu_mul(*cpu.rounded_linear(rows, gate_up).chunk(2, dim=-1)), down))
        return torch.cat(outputs)

    def can_mix(self, x: Tensor) -> bool:
        return False


def swap_linears(model: Jamba) -> None:
    """Replace all layers that can be int8 with int8 layers whose weights are empty, in place."""
    embedding = model.embed_tokens.weight
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Experts):
                setattr(module, name, Int8Experts(child))
            elif isinstance(child, nn.Linear) and name not in _LEFT_ALONE and child.weight is not embedding:
                setattr(module, name, Int8Linear(child))


def _swiglu(x: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor) -> Tensor:
    gate, up = int8_linear(x, gate_up, gate_up_scale).chunk(2, dim=-1)
    return int8_linear(silu_mul(gate, up), down, down_scale)


def _empty_int8(weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    return nn.Parameter(values, requires_grad=False), nn.Parameter(scale, requires_grad=False)

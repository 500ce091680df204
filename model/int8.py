"""W8A16: linear weights as int8 rows with a float32 scale each, activations as they are; rounded, too, where a CPU
reads a prompt (`round_rows`).

Quantized: every nn.Linear and all experts. Left alone: embedding (and a head tied to it), norms, conv, A, D, router,
dt_proj. A pair, as in gpt-fast: `quantize_rows` makes the weights, `swap_linears` puts in the layers that use them.
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
    """weight (..., out, in) -> int8 of the same shape and float32 scale (..., out); weight is about q * scale."""
    weight = weight.float()
    scale = (weight.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale[..., None]).round_().to(torch.int8), scale


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, rounds: bool = False) -> Tensor:
    """x (..., in) @ (weight (out, in) * scale (out,)).T + bias, in x.dtype. rounds: many rows of x may be rounded."""
    if gpu.supports(x, weight, bias) and gpu_prefill.fits(x, weight):
        return gpu_prefill.int8_linear(x, weight, scale, bias)
    if cpu.supports(x):
        return (cpu.rounded_linear if rounds else cpu.int8_linear)(x, weight, scale, bias)
    out = F.linear(x, weight.to(x.dtype)) * scale
    return (out if bias is None else out + bias).to(x.dtype)


class Int8Linear(nn.Module):
    """In the place of an nn.Linear; its weights are still to be loaded."""

    rounds = False  # see `round_rows`

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.scale = _empty_int8(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.scale, self.bias, self.rounds)


class Int8Experts(nn.Module):
    """In the place of `Experts`; its weights are still to be loaded."""

    rounds = False

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate_up_proj, self.gate_up_scale = _empty_int8(experts.gate_up_proj)
        self.down_proj, self.down_scale = _empty_int8(experts.down_proj)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """As `Experts.forward`."""
        parts = zip(x.split(counts), *(weight.unbind() for weight in self._weights()), strict=True)
        return torch.cat([_swiglu(rows, *expert, self.rounds) for rows, *expert in parts if len(rows)])

    def can_mix(self, x: Tensor) -> bool:
        return gpu.supports(x, self.down_proj) and gpu_prefill.fits(x, self.gate_up_proj, self.down_proj)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """As `Experts.mix`."""
        return gpu_prefill.mix_experts(x, weights, chosen, *self._weights())

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    """Let prefills on a CPU multiply in int8: many rows are rounded as well (`cpu.rounded_linear`), in place."""
    for name, module in model.layers.named_modules():
        if isinstance(module, Int8Linear | Int8Experts) and not name.endswith("x_proj"):
            module.rounds = True


def _swiglu(
    x: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor, rounds: bool
) -> Tensor:
    gate, up = int8_linear(x, gate_up, gate_up_scale, rounds=rounds).chunk(2, dim=-1)
    return int8_linear(silu_mul(gate, up), down, down_scale, rounds=rounds)


def _empty_int8(weight: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    return nn.Parameter(values, requires_grad=False), nn.Parameter(scale, requires_grad=False)

"""W8A8 prefill on a GPU: the inputs of selected int8 matrix products are quantized per token, for long segments.

int8 tensor cores run at twice the rate of bfloat16, and weights need no dequantization. Decoding and short segments
stay W8A16. bench/w8a8_drift.py measures the drift that each product causes on the shipped checkpoint; the products are
in kernels/w8a8.py. Start at `round_activations`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from model import gpu_layers, gpu_segment
from model.int8 import Int8Experts, Int8Linear
from model.jamba import Jamba
from model.kernels import cpu, w8a8
from model.moe import MLP

# the products whose inputs may be quantized; those of x_proj, the head and the router never are
SITES = ("mamba_in", "mamba_out", "attention_in", "attention_out", "mlp", "experts")
_SITE_OF = {
    **{"in_proj": "mamba_in", "out_proj": "mamba_out", "o_proj": "attention_out"},
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention_in"),
}


class UnsupportedDevice(ValueError):
    """The message says what the device lacks and what to do."""


class W8A8Linear(Int8Linear):
    """Replaces an Int8Linear, sharing its weights."""

    def __init__(self, linear: Int8Linear) -> None:
        nn.Module.__init__(self)
        self.weight, self.scale, self.bias = linear.weight, linear.scale, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if not w8a8.takes(x, self.weight):
            return super().forward(x)
        return w8a8.linear(x, self.weight, self.scale, self.bias)


class W8A8MLP(MLP):
    """Replaces an MLP, sharing its projections; quantizes the inputs of all three."""

    def __init__(self, mlp: MLP) -> None:
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not w8a8.takes(x, gate.weight, up.weight, down.weight):
            return super().forward(x)
        return w8a8.swiglu(x, gate.weight, gate.scale, up.weight, up.scale, down.weight, down.scale)


class W8A8Experts(Int8Experts):
    """Replaces Int8Experts, sharing their weights; quantizes the inputs of both products."""

    def __init__(self, experts: Int8Experts) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.gate_up_scale = experts.gate_up_proj, experts.gate_up_scale
        self.down_proj, self.down_scale = experts.down_proj, experts.down_scale

    def can_mix(self, x: Tensor) -> bool:
        return w8a8.takes(x, self.down_proj) or super().can_mix(x)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        if not w8a8.takes(x, self.down_proj):
            return super().mix(x, weights, chosen)
        return w8a8.mix_experts(x, weights, chosen, *self._weights())


def check_device(device: torch.device) -> None:
    """Raises UnsupportedDevice if w8a8 would fall back to the reference implementation, which is slower than int8."""
    if device.type == "cpu" and not cpu.rounds_rows():
        raise UnsupportedDevice("w8a8 needs a CPU with VNNI and without AMX, or with Arm's dot products; use int8")
    if device.type != "cpu" and not w8a8.has_kernels(torch.empty(0, device=device)):
        raise UnsupportedDevice(f"w8a8 needs an H100 or later with Triton, not {device}; use int8")


def round_activations(model: Jamba, sites: Collection[str] = SITES) -> None:
    """Make the products at `sites` quantize their inputs, in place; the weights are not copied.

    Raises ValueError for unknown sites, and if the model has no int8 product at any of them.
    """
    if strangers := set(sites) - set(SITES):
        raise ValueError(f"no site {', '.join(sorted(strangers))}; there are {', '.join(SITES)}")
    changed = 0
    for module in list(model.layers.modules()):
        for name, child in module.named_children():
            if (rounding := _rounding(name, child, sites)) is not None:
                setattr(module, name, rounding)
                changed += 1
    if set(sites) == set(SITES):  # then longer segments, too, read weights once, without host syncs
        model.graphed_tokens, model.padded_tokens = gpu_segment.LONGEST, gpu_layers.LONGEST
    if sites and not changed:
        raise ValueError("none of the model's products at these sites is int8; load it with quantize='int8'")


def _rounding(name: str, module: nn.Module, sites: Collection[str]) -> nn.Module | None:
    """The replacement of this module; None if it stays."""
    match module:
        case Int8Experts() if "experts" in sites:
            return W8A8Experts(module)
        case MLP() if "mlp" in sites and isinstance(module.gate_proj, Int8Linear):
            return W8A8MLP(module)
        case Int8Linear() if not isinstance(module, W8A8Linear) and _SITE_OF.get(name) in sites:
            return W8A8Linear(module)
    return None

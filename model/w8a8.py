"""W8A8 prefills on a GPU: the inputs of chosen int8 products are rounded too, a token at a time, where tokens are many.

Twice the rate of bfloat16's tensor cores, and no weight is unpacked. Decoding and short segments stay W8A16. Which
products may be rounded is a matter of drift, measured on the shipped checkpoint by bench/w8a8_drift.py; the products
themselves are in kernels/w8a8.py. Start at `round_activations`.
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

# a product whose input is rounded, by where it stands; of x_proj, the head and the router it never is
SITES = ("mamba_in", "mamba_out", "attention_in", "attention_out", "mlp", "experts")
_SITE_OF = {
    **{"in_proj": "mamba_in", "out_proj": "mamba_out", "o_proj": "attention_out"},
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention_in"),
}


class UnsupportedDevice(ValueError):
    """The message says what the device lacks and what to do."""


class W8A8Linear(Int8Linear):
    """In the place of an Int8Linear, with its weights."""

    def __init__(self, linear: Int8Linear) -> None:
        nn.Module.__init__(self)
        self.weight, self.scale, self.bias = linear.weight, linear.scale, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if not w8a8.takes(x, self.weight):
            return super().forward(x)
        return w8a8.linear(x, self.weight, self.scale, self.bias)


class W8A8MLP(MLP):
    """In the place of an MLP, with its projections; the inputs of all three are rounded."""

    def __init__(self, mlp: MLP) -> None:
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not w8a8.takes(x, gate.weight, up.weight, down.weight):
            return super().forward(x)
        return w8a8.swiglu(x, gate.weight, gate.scale, up.weight, up.scale, down.weight, down.scale)


class W8A8Experts(Int8Experts):
    """In the place of Int8Experts, with their weights; the inputs of both products are rounded."""

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
    """Raises UnsupportedDevice where the products would be computed by their definition, slower than not rounded."""
    if device.type == "cpu" and not cpu.rounds_rows():
        raise UnsupportedDevice("w8a8 needs a CPU with VNNI and without AMX, or with Arm's dot products; use int8")
    if device.type != "cpu" and not w8a8.has_kernels(torch.empty(0, device=device)):
        raise UnsupportedDevice(f"w8a8 needs an H100 or later with Triton, not {device}; use int8")


def round_activations(model: Jamba, sites: Collection[str] = SITES) -> None:
    """Let the products at `sites` round their inputs, in place; the model's weights stay where they are.

    Raises ValueError for unknown sites and for a model none of whose products there are int8.
    """
    if strangers := set(sites) - set(SITES):
        raise ValueError(f"no site {', '.join(sorted(strangers))}; there are {', '.join(SITES)}")
    changed = 0
    for module in list(model.layers.modules()):
        for name, child in module.named_children():
            if (rounding := _rounding(name, child, sites)) is not None:
                setattr(module, name, rounding)
                changed += 1
    if set(sites) == set(SITES):  # longer ones read the weights once, too, and nothing in a layer waits
        model.graphed_tokens, model.padded_tokens = gpu_segment.LONGEST, gpu_layers.LONGEST
    if sites and not changed:
        raise ValueError("none of the model's products at these sites is int8; load it with quantize='int8'")


def _rounding(name: str, module: nn.Module, sites: Collection[str]) -> nn.Module | None:
    """What replaces this module, if anything."""
    match module:
        case Int8Experts() if "experts" in sites:
            return W8A8Experts(module)
        case MLP() if "mlp" in sites and isinstance(module.gate_proj, Int8Linear):
            return W8A8MLP(module)
        case Int8Linear() if not isinstance(module, W8A8Linear) and _SITE_OF.get(name) in sites:
            return W8A8Linear(module)
    return None

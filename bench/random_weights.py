"""A model with random int8 weights, created on its device: the costs of a checkpoint without needing one.

Nothing is loaded or copied, so peak memory is that of the model. Scales are chosen so that activations stay near 1
through all layers and tokens are distributed about evenly among the experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.config import JambaConfig
from model.int8 import Int8Experts, Int8Linear, swap_linears
from model.jamba import Jamba
from model.mamba import MambaMixer
from model.weights import allocate

_INT8_STD = math.sqrt(((2 * 127 + 1) ** 2 - 1) / 12)  # of uniform integers in -127..127
_DT_BIAS = math.log(math.expm1(0.01))  # delta is 0.01 after softplus, the middle of the initial range in training
_ADDS = ("o_proj", "out_proj", "down_proj")  # their outputs are added to the residual stream


@torch.inference_mode(False)  # like `load_model`, independent of the caller's mode
def random_model(
    config: JambaConfig, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> Jamba:
    """An int8 model of this shape on `device`, in evaluation mode; dtype as in `load_model`.

    The same seed gives the same weights on the same kind of device.
    """
    device = torch.device(device)
    with torch.device("meta"):
        model = Jamba(config)
    swap_linears(model)
    allocate(model, dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16), device)
    generator = torch.Generator(device).manual_seed(seed)
    adds = (2 * config.num_hidden_layers) ** -0.5  # all layers together add as much as the embedding
    for name, module in model.named_modules():
        _fill(name.rpartition(".")[2], module, adds, generator)
    if config.tie_word_embeddings:
        model.embed_tokens.weight.data.mul_(config.hidden_size**-0.5)
    return model.eval()


@torch.no_grad()
def _fill(name: str, module: nn.Module, adds: float, generator: torch.Generator) -> None:
    """Fill the module's own parameters, without those of its children."""
    if isinstance(getattr(module, "bias", None), Tensor):
        module.bias.fill_(_DT_BIAS if name == "dt_proj" else 0.0)
    match module:
        case Int8Experts():
            _fill_rows(module.gate_up_proj, module.gate_up_scale, 1.0, generator)
            _fill_rows(module.down_proj, module.down_scale, adds, generator)
        case Int8Linear():
            _fill_rows(module.weight, module.scale, adds if name in _ADDS else 1.0, generator)
        case nn.Linear() | nn.Conv1d():
            std = math.prod(module.weight.shape[1:]) ** -0.5
            module.weight.normal_(std=0.1 * std if name == "dt_proj" else std, generator=generator)
        case nn.Embedding():
            module.weight.normal_(generator=generator)
        case nn.RMSNorm():
            module.weight.fill_(1.0)
        case MambaMixer():
            steps = torch.arange(1.0, module.A_log.shape[1] + 1, device=module.A_log.device)
            module.A_log.copy_(steps.log().expand_as(module.A_log))
            module.D.fill_(1.0)


def _fill_rows(values: Tensor, scale: Tensor, gain: float, generator: torch.Generator) -> None:
    """Fill with uniform int8 values, scaled so that products with unit-RMS activations have RMS `gain`."""
    for matrix in values if values.ndim == 3 else (values,):  # random generation is limited to 32-bit sizes
        matrix.random_(-127, 128, generator=generator)
    scale.fill_(gain * values.shape[-1] ** -0.5 / _INT8_STD)

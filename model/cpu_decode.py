"""A layer's forward for a few tokens on the CPU: two calls into C where the modules would make forty into PyTorch.

Not a second network: jamba.py, mamba.py and moe.py say what a layer is; this only hands their weights to
kernels/cpu_layer.c. Between the residuals everything stays float32, which in bfloat16 is the more exact of the two.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.kernels.cpu import Int64, Linear, Pointers, Rows, Vec, addresses, call, row_starts, supports
from model.mamba import MambaMixer
from model.moe import MLP, MoE

if TYPE_CHECKING:
    from model.jamba import JambaLayer

MAX_TOKENS = 16  # beyond, reading the weights once a row of eight costs more than unpacking them for oneDNN or MKL


class _MambaArgs(ctypes.Structure):
    _fields_ = [("x", Rows), ("out", Rows)]
    _vectors = ("norm", "conv_weight", "conv_bias", "dt_norm", "b_norm", "c_norm", "A_log", "D", "dt_bias")
    _fields_ += [(name, Vec) for name in _vectors]
    _fields_ += [(name, Linear) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    _fields_ += [("starts", ctypes.POINTER(Int64)), ("conv_states", Pointers), ("ssm_states", Pointers)]
    _fields_ += [(name, Int64) for name in ("conv_dtype", "num_sequences", "m", "d", "e", "n", "r", "w", "threads")]
    _fields_ += [("eps", ctypes.c_double)]


class _Expert(ctypes.Structure):
    _fields_ = [(name, Linear) for name in ("gate", "up", "down")]


class _FeedForwardArgs(ctypes.Structure):
    _fields_ = [("x", Rows), ("out", Rows), ("norm", Vec), ("router", Vec), ("experts", ctypes.POINTER(_Expert))]
    _fields_ += [(name, Int64) for name in ("num_experts", "top_k", "m", "d", "f", "threads")]
    _fields_ += [("eps", ctypes.c_double)]


def can_decode(x: Tensor, batch: Batch) -> bool:
    """Whether `DecodeLayer` takes these tokens x (T, d): few, with states, of one length, no gradient."""
    return len(x) <= MAX_TOKENS and bool(batch.states) and len(batch.groups) == 1 and supports(x)


class DecodeLayer:
    """Made once of a layer whose weights stay where they are; their values may change, their memory may not."""

    def __init__(self, layer: JambaLayer) -> None:
        self._layer = layer
        self._mamba = None if layer.is_attention else _mamba_args(layer.input_layernorm, layer.mamba)
        self._feed_forward = _feed_forward_args(layer.pre_ff_layernorm, layer.feed_forward)

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """As `JambaLayer.forward`: (T, d) -> (T, d), advancing the states."""
        if self._mamba is None:
            x = x + self._layer.self_attn(self._layer.input_layernorm(x), batch)
        else:
            x = self._mix(x, batch)
        return _run("feed_forward_step", self._feed_forward, x)

    def _mix(self, x: Tensor, batch: Batch) -> Tensor:
        (group,), arguments, index = batch.groups, self._mamba, self._layer.mamba.index
        conv = group.conv[index]
        arguments.starts, arguments.num_sequences = row_starts(group.b, group.t), group.b
        arguments.conv_states, arguments.ssm_states = addresses(conv), addresses(group.ssm[index])
        arguments.conv_dtype = Vec.of(conv).dtype
        return _run("mamba_step", arguments, x)


def _run(name: str, arguments: _MambaArgs | _FeedForwardArgs, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    arguments.x, arguments.out, arguments.m = Rows.of(x), Rows.of(out), len(x)
    arguments.threads = torch.get_num_threads()
    call(name, arguments)
    return out


def _mamba_args(norm: nn.RMSNorm, mixer: MambaMixer) -> _MambaArgs:
    vectors = (
        *(norm.weight, mixer.conv1d.weight, mixer.conv1d.bias),
        *(mixer.dt_layernorm.weight, mixer.b_layernorm.weight, mixer.c_layernorm.weight),
        *(mixer.A_log, mixer.D, mixer.dt_proj.bias),
    )
    e, n = mixer.A_log.shape
    dt_rank, width = mixer.dt_proj.weight.shape[1], mixer.conv1d.weight.shape[-1]
    arguments = _MambaArgs(d=len(norm.weight), e=e, n=n, r=dt_rank, w=width, eps=norm.eps)
    for name, vector in zip(_MambaArgs._vectors, vectors, strict=True):
        setattr(arguments, name, Vec.of(vector))
    for name in ("in_proj", "x_proj", "out_proj"):
        setattr(arguments, name, _linear(getattr(mixer, name)))
    arguments.dt_proj = Linear.of(mixer.dt_proj.weight)
    return arguments


def _feed_forward_args(norm: nn.RMSNorm, block: MLP | MoE) -> _FeedForwardArgs:
    router = None if isinstance(block, MLP) else block.router.weight
    if isinstance(block, MLP):
        experts = [_Expert(*map(_linear, (block.gate_proj, block.up_proj, block.down_proj)))]
    else:
        experts = _experts(block.experts)
    return _FeedForwardArgs(
        norm=Vec.of(norm.weight),
        router=Vec.of(router),
        experts=(_Expert * len(experts))(*experts),
        num_experts=len(experts),
        top_k=1 if isinstance(block, MLP) else block.top_k,
        d=len(norm.weight),
        f=experts[0].gate.out_features,
        eps=norm.eps,
    )


def _experts(experts: nn.Module) -> list[_Expert]:
    """Of `Experts`, or of `Int8Experts` with their scales."""
    gate_up_scale, down_scale = (getattr(experts, name, None) for name in ("gate_up_scale", "down_scale"))
    made = []
    for i, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        scales = (None, None) if gate_up_scale is None else gate_up_scale[i].chunk(2)
        gate, up = map(Linear.of, gate_up.chunk(2), scales)
        made.append(_Expert(gate, up, Linear.of(down, None if down_scale is None else down_scale[i])))
    return made


def _linear(module: nn.Module) -> Linear:
    """Of an nn.Linear or an Int8Linear."""
    return Linear.of(module.weight, getattr(module, "scale", None), module.bias)

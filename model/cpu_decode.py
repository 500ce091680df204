"""A layer's forward for a few tokens on the CPU: two calls into C instead of forty into PyTorch.

Not a second network: jamba.py, mamba.py, attention.py and moe.py define a layer; this only passes their weights to the
kernels. Except for attention, everything between the residuals stays float32, which is more exact than the modules in
bfloat16. A token's logits and the state after it have the same bits whatever other tokens are computed with it, even
later ones of its sequence: so guessed tokens can be verified (`Trial`) without changing the answer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.kernels.cpu import Int64, Linear, Pointer, Pointers, Rows, Vec, attend, call, linear_few, row_starts
from model.mamba import MambaMixer
from model.moe import MLP, MoE
from model.state import HybridState

if TYPE_CHECKING:
    from model.jamba import JambaLayer

MAX_TOKENS = 16  # with more, reading the weights once per eight rows costs more than unpacking them for oneDNN or MKL


class _MambaArgs(ctypes.Structure):
    _fields_ = [("x", Rows), ("out", Rows)]
    _vectors = ("norm", "conv_weight", "conv_bias", "dt_norm", "b_norm", "c_norm", "A_log", "D", "dt_bias")
    _fields_ += [(name, Vec) for name in _vectors]
    _fields_ += [(name, Linear) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    _fields_ += [("starts", ctypes.POINTER(Int64)), ("conv_states", Pointers), ("ssm_states", Pointers)]
    _fields_ += [("conv_trail", Pointer), ("ssm_trail", Pointer)]
    _fields_ += [(name, Int64) for name in ("conv_dtype", "num_sequences", "m", "d", "e", "n", "r", "w", "threads")]
    _fields_ += [("eps", ctypes.c_double)]


class _Expert(ctypes.Structure):
    _fields_ = [(name, Linear) for name in ("gate", "up", "down")]


class _FeedForwardArgs(ctypes.Structure):
    _fields_ = [("x", Rows), ("out", Rows), ("norm", Vec), ("router", Vec), ("experts", ctypes.POINTER(_Expert))]
    _fields_ += [(name, Int64) for name in ("num_experts", "top_k", "m", "d", "f", "threads")]
    _fields_ += [("eps", ctypes.c_double)]


class Trial:
    """Up to `MAX_TOKENS` tokens of some sequences, computed after their states; `keep` accepts some of them.

    Until then the states are unchanged, except for KV beyond their end, which nobody reads. With `in_place` conv and
    ssm advance at once, and all tokens must be kept.
    """

    def __init__(
        self, lengths: Sequence[int], states: Sequence[HybridState], device: torch.device, in_place: bool = False
    ) -> None:
        self.batch = Batch.of_states(lengths, states, device, grouped=False)
        self.starts = row_starts(lengths)
        self.logits: Tensor | None = None  # (T, v), or (len(lengths), v) of the last tokens
        layout, num_tokens = states[0].layout, self.starts[len(lengths)]
        self.conv = self.ssm = None  # (n_mamba, T, e, w-1) and (n_mamba, T, e, n): the state after each token
        if not in_place:
            n_mamba, *conv_shape = layout.conv_shape
            self.conv = torch.empty(n_mamba, num_tokens, *conv_shape, dtype=layout.conv_dtype)
            self.ssm = torch.empty(n_mamba, num_tokens, *layout.ssm_shape[1:])

    def keep(self, counts: Sequence[int]) -> None:
        """Advance the i-th sequence's state by its first `counts[i]` tokens and discard the others. Call once."""
        for i, (state, count) in enumerate(zip(self.batch.states, counts, strict=True)):
            if not 0 <= count <= self.batch.lengths[i]:
                raise ValueError(f"{count} of {self.batch.lengths[i]} tokens cannot be kept")
            if count and self.ssm is not None:
                last = self.starts[i] + count - 1
                state.conv.copy_(self.conv[:, last])
                state.ssm.copy_(self.ssm[:, last])
            state.num_tokens += count


class DecodeLayer:
    """Built once from a layer; the values of its weights may change later, but not their addresses."""

    def __init__(self, layer: JambaLayer) -> None:
        self._layer = layer
        self._mamba = None if layer.is_attention else _mamba_args(layer.input_layernorm, layer.mamba)
        self._feed_forward = _feed_forward_args(layer.pre_ff_layernorm, layer.feed_forward)

    def __call__(self, x: Tensor, trial: Trial) -> Tensor:
        """Like `JambaLayer.forward`: (T, d) -> (T, d)."""
        x = x + self._attend(x, trial.batch) if self._mamba is None else self._mix(x, trial)
        return _run("feed_forward_step", self._feed_forward, x)

    def _attend(self, x: Tensor, batch: Batch) -> Tensor:
        attention, x = self._layer.self_attn, self._layer.input_layernorm(x)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (project(layer, x).unflatten(-1, (-1, attention.head_dim)) for layer in projections)
        q, k = attention.turn(q, k, batch)
        parts = zip(batch.states, *(own.split(batch.lengths) for own in (k, v)), strict=True)
        kv = [state.append_kv(attention.index, *own) for state, *own in parts]
        keys, values = [own.keys for own in kv], [own.values for own in kv]
        return project(attention.o_proj, attend(q, keys, values, batch.lengths).flatten(-2))

    def _mix(self, x: Tensor, trial: Trial) -> Tensor:
        states, arguments, index = trial.batch.states, self._mamba, self._layer.mamba.index
        arguments.starts, arguments.num_sequences = trial.starts, len(states)
        arguments.conv_states = _pointers([state.conv[index] for state in states])
        arguments.ssm_states = _pointers([state.ssm[index] for state in states])
        arguments.conv_dtype = Vec.of(states[0].conv).dtype
        if trial.ssm is None:
            arguments.conv_trail = arguments.ssm_trail = None
        else:
            arguments.conv_trail, arguments.ssm_trail = trial.conv[index].data_ptr(), trial.ssm[index].data_ptr()
        return _run("mamba_step", arguments, x)


def project(module: nn.Module, x: Tensor) -> Tensor:
    """x (T, in) through an nn.Linear, an Int8Linear or a PackedLinear -> (T, out)."""
    return linear_few(x, module.weight, getattr(module, "scale", None), module.bias)


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (Pointer * len(tensors))(*(x.data_ptr() for x in tensors))


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
    """Of `Experts`, `PackedExperts`, or `Int8Experts` with their scales."""
    gate_up_scale, down_scale = (getattr(experts, name, None) for name in ("gate_up_scale", "down_scale"))
    made = []
    for i, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
        scales = (None, None) if gate_up_scale is None else gate_up_scale[i].chunk(2)
        gate, up = map(Linear.of, gate_up.chunk(2), scales)
        made.append(_Expert(gate, up, Linear.of(down, None if down_scale is None else down_scale[i])))
    return made


def _linear(module: nn.Module) -> Linear:
    """Of an nn.Linear, an Int8Linear or a PackedLinear."""
    return Linear.of(module.weight, getattr(module, "scale", None), module.bias)

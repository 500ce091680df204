"""One decode step of a few sequences on the GPU: some eight kernels per layer, replayed as one CUDA graph per batch
size, and another one for steps in which sequences share the read of a prefix (sharing.py).

Not a second network: jamba.py, mamba.py, attention.py and moe.py define a layer; this only passes their weights to the
kernels. Models that are not int8, and shapes that the kernels do not support, run as modules. The residual stays
float32, which is more exact than the modules in bfloat16. Start at `GpuDecoder.step`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.config import JambaConfig
from model.gpu_graphs import GraphCapture
from model.kernels import gpu_attention as attention
from model.kernels import gpu_linear as linear
from model.kernels import gpu_mamba as mamba
from model.mamba import MambaMixer
from model.moe import MLP, MoE
from model.sharing import share
from model.state import HybridState, Origin

if TYPE_CHECKING:
    from model.jamba import Jamba, JambaLayer

MAX_BATCH = 64
_STAGED_ROWS = 11  # see _Inputs
_MIN_SHARED_TOKENS = 1024  # less is not worth parts of its own; a guess


def fits(model: Jamba) -> bool:
    """Whether `GpuDecoder` supports this model: int8 layers, bfloat16 activations, sizes that the kernels support."""
    c = model.config
    weights = chain.from_iterable(map(_large_weights, model.layers))
    return (
        c.rope_theta is None
        and all(map(linear.fits, weights))
        and (linear.fits(model.lm_head.weight) or c.tie_word_embeddings)
        and all(_dtype_fits(name, parameter) for name, parameter in model.named_parameters())
        and c.hidden_size % 8 == 0
        and c.num_experts <= linear.MAX_ROUTED_EXPERTS
        and MAX_BATCH * c.num_experts_per_tok <= linear.MAX_ASSIGNMENTS
        and mamba.fits(c.mamba_dt_rank, c.mamba_d_state)
        and attention.fits(c.head_dim)
    )


class GpuDecoder:
    """Built once for a model; the values of its weights may change later, but not their addresses."""

    def __init__(self, model: Jamba) -> None:
        self._embedding, self._layers = model.embed_tokens, model.layers  # not the model, which holds this
        self._norm, self._head = model.final_layernorm, model.lm_head
        self.device = model.embed_tokens.weight.device
        with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
            self._buffers = _Buffers.empty(model.config, self.device)
            self._staging = torch.zeros(_STAGED_ROWS * MAX_BATCH, dtype=torch.int64, device=self.device)
            host = torch.zeros_like(self._staging, device="cpu")
            self._host = host.pin_memory() if self.device.type == "cuda" else host
        self._host_array = self._host.numpy()
        self._uploaded = torch.cuda.Event() if self.device.type == "cuda" else None
        self._max_members = attention.max_members(model.config.num_attention_heads // model.config.num_key_value_heads)
        self._origins: list[Origin] = []  # of the last step's states, and what they shared
        self._shared: list[tuple[int, int]] = []
        self._launched: set[_Kind] = set()  # kinds of steps whose kernels are compiled and loaded
        self._graphs: dict[_Kind, torch.cuda.CUDAGraph] = {}
        self._capture = GraphCapture(self.device)

    @torch.no_grad()
    def step(self, token_ids: Tensor, states: Sequence[HybridState], sharing: bool = False) -> Tensor:
        """Advance each state by its token: token_ids (b,) on the CPU or the model's device -> logits (b, v) float32.

        `sharing`: always use the kernels for shared reads, which give other bits.
        """
        shared = self._share(states)
        kind = len(states), sharing or any(until for _, until in shared)
        self._upload(token_ids, states, shared)
        if self.device.type == "cuda" and kind in self._launched:
            if kind not in self._graphs:
                self._graphs[kind] = self._capture(partial(self._launch, kind))
            self._graphs[kind].replay()
        else:
            self._launch(kind)
            self._launched.add(kind)
        for state in states:
            state.num_tokens += 1
        return self._buffers.logits[: len(states)].clone()

    def _share(self, states: Sequence[HybridState]) -> list[tuple[int, int]]:
        """(owner, until) of each, see gpu_attention.Sharing; the same as long as the same states are decoded."""
        origins = [state.origin for state in states]
        if origins != self._origins:
            self._shared = share(origins, self._max_members, _MIN_SHARED_TOKENS, attention.SHARED_UNIT)
            self._origins = origins
        return self._shared

    def _upload(self, token_ids: Tensor, states: Sequence[HybridState], shared: Sequence[tuple[int, int]]) -> None:
        """Reserve room for the tokens' KV, and send all addresses to the device in one copy."""
        for state in states:
            state.reserve(state.num_tokens + 1)
        tokens = [0] * len(states) if token_ids.is_cuda else token_ids.tolist()
        whereabouts = (
            (state.num_tokens, *state.addresses(), *own, *state.lender_address(), state.lent_tokens)
            for state, own in zip(states, shared, strict=True)
        )
        staged = list(chain(tokens, *zip(*whereabouts, strict=True)))
        if self._uploaded is not None:
            self._uploaded.synchronize()  # until the previous copy has read the host buffer
        self._host_array[: len(staged)] = staged
        self._staging[: len(staged)].copy_(self._host[: len(staged)], non_blocking=True)
        if self._uploaded is not None:
            self._uploaded.record()
        if token_ids.is_cuda:
            self._staging[: len(states)].copy_(token_ids)

    def _launch(self, kind: _Kind) -> None:
        """Launch the kernels of one step, from the staged inputs to the logits."""
        b, sharing = kind
        staged = self._staging[: _STAGED_ROWS * b].view(_STAGED_ROWS, b)
        inputs, now = _Inputs(*staged, shares=sharing), self._buffers.cut(b)
        now.residual.copy_(self._embedding(inputs.token_ids))
        pending: _Pending = (None, None)
        for layer in self._layers:
            pending = _run_layer(layer, inputs, now, pending)
        _add_norm(self._norm, now, pending)
        if linear.fits(self._head.weight):
            _project(self._head, now.normed, now.logits)
        else:
            now.logits.copy_(self._head(now.normed))


_Kind = tuple[int, bool]  # sequences of a step, and whether reads may be shared
_Pending = tuple[Tensor | None, Tensor | None]  # not yet added to the residual: (b, d), or (b, k, d) and weights (b, k)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """(b,) int64 each: the inputs of a step, written before it starts."""

    token_ids: Tensor
    lengths: Tensor
    conv: Tensor  # addresses
    ssm: Tensor
    kv: Tensor
    capacities: Tensor
    owners: Tensor  # see attention.Sharing
    until: Tensor
    lenders: Tensor
    lender_capacities: Tensor
    num_lent: Tensor
    shares: bool  # whether `owners` and `until` say anything

    @property
    def caches(self) -> attention.Caches:
        return attention.Caches(self.kv, self.capacities, self.lengths)

    @property
    def sharing(self) -> attention.Sharing | None:
        return attention.Sharing(self.owners, self.until) if self.shares else None

    @property
    def loans(self) -> attention.Loans:
        return attention.Loans(self.lenders, self.lender_capacities, self.num_lent)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Static memory between the kernels; letters as in jamba.py. bfloat16 unless stated otherwise."""

    residual: Tensor  # (b, d) float32
    normed: Tensor  # (b, d)
    mixed: Tensor  # (b, d) float32
    u: Tensor  # (b, e)
    z: Tensor  # (b, e)
    projected: Tensor  # (b, r+2n) float32
    y: Tensor  # (b, e)
    q: Tensor  # (b, h, p)
    k: Tensor  # (b, g, p)
    v: Tensor  # (b, g, p)
    attended: Tensor  # (b, h, p)
    routes: Tensor  # (b, k) float32
    chosen: Tensor  # (b, k) int32
    hidden: Tensor  # (b, k, f)
    expert_out: Tensor  # (b, k, d) float32
    logits: Tensor  # (b, v) float32

    @classmethod
    def empty(cls, c: JambaConfig, device: torch.device) -> Self:
        d, e, f, k, p = c.hidden_size, c.mamba_d_inner, c.intermediate_size, c.num_experts_per_tok, c.head_dim
        h, g, full = c.num_attention_heads, c.num_key_value_heads, torch.float32

        def room(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(MAX_BATCH, *shape, dtype=dtype, device=device)

        return cls(
            **{name: room(d, dtype=full) for name in ("residual", "mixed")},
            **{name: room(e) for name in ("u", "z", "y")},
            **{name: room(heads, p) for name, heads in (("q", h), ("k", g), ("v", g), ("attended", h))},
            normed=room(d),
            projected=room(c.mamba_dt_rank + 2 * c.mamba_d_state, dtype=full),
            routes=room(k, dtype=full),
            chosen=room(k, dtype=torch.int32),
            hidden=room(k, f),
            expert_out=room(k, d, dtype=full),
            logits=room(c.vocab_size, dtype=full),
        )

    def cut(self, b: int) -> Self:
        """The buffers of a batch of b."""
        return type(self)(**{field.name: getattr(self, field.name)[:b] for field in fields(self)})


def _run_layer(layer: JambaLayer, inputs: _Inputs, now: _Buffers, pending: _Pending) -> _Pending:
    _add_norm(layer.input_layernorm, now, pending)
    if layer.is_attention:
        _attend(layer.self_attn, inputs, now)
    else:
        _mix(layer.mamba, inputs, now)
    block = layer.feed_forward
    _add_norm(layer.pre_ff_layernorm, now, (now.mixed, None), block.router if isinstance(block, MoE) else None)
    return _feed_experts(block, now) if isinstance(block, MoE) else _feed(block, now)


def _add_norm(norm: nn.RMSNorm, now: _Buffers, pending: _Pending, router: nn.Linear | None = None) -> None:
    routing = (None, None, None) if router is None else (router.weight, now.routes, now.chosen)
    arguments = (now.residual, *pending, norm.weight, norm.eps, now.normed, *routing)
    linear.add_norm(*arguments, overlap=pending[0] is not None)  # nothing is pending behind PyTorch's own kernels


def _mix(mixer: MambaMixer, inputs: _Inputs, now: _Buffers) -> None:
    weights = mamba.StepWeights(
        *(mixer.dt_layernorm.weight, mixer.b_layernorm.weight, mixer.c_layernorm.weight),
        *(mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log, mixer.D, mixer.dt_layernorm.eps),
    )
    (e, n), conv, index = mixer.A_log.shape, mixer.conv1d, mixer.index
    in_proj, x_proj, past = mixer.in_proj, mixer.x_proj, conv.weight.shape[-1] - 1
    convolution = (conv.weight.squeeze(1), conv.bias, inputs.conv, now.u, now.z, e, index * e * past)
    linear.in_proj_conv(now.normed, in_proj.weight, in_proj.scale, in_proj.bias, *convolution)
    linear.int8_rows(now.u, x_proj.weight, x_proj.scale, now.projected)
    mamba.ssm_step(now.projected, now.u, now.z, weights, inputs.ssm, index * e * n, now.y)
    _project(mixer.out_proj, now.y, now.mixed)


def _attend(block: Attention, inputs: _Inputs, now: _Buffers) -> None:
    for projection, out in ((block.q_proj, now.q), (block.k_proj, now.k), (block.v_proj, now.v)):
        _project(projection, now.normed, out.flatten(1))
    partials = attention.Partials.empty(now.q, now.k.shape[1], inputs.shares)
    arguments = (now.q, now.k, now.v, inputs.caches, inputs.loans, block.index, partials, now.attended)
    attention.attend(*arguments, inputs.sharing)
    _project(block.o_proj, now.attended.flatten(1), now.mixed)


def _feed(block: MLP, now: _Buffers) -> _Pending:
    gate, up, hidden = block.gate_proj, block.up_proj, now.hidden.flatten(0, 1)[: len(now.normed)]
    linear.swiglu_rows(now.normed, gate.weight, gate.scale, up.weight, up.scale, hidden)
    _project(block.down_proj, hidden, now.mixed)
    return now.mixed, None


def _feed_experts(block: MoE, now: _Buffers) -> _Pending:
    experts = block.experts
    up, down = (experts.gate_up_proj, experts.gate_up_scale), (experts.down_proj, experts.down_scale)
    linear.experts_gate_up(now.normed, now.chosen, *up, now.hidden)
    linear.experts_down(now.hidden, now.chosen, *down, now.expert_out)
    return now.expert_out, now.routes


def _project(layer: nn.Module, x: Tensor, out: Tensor) -> None:
    linear.int8_rows(x, layer.weight, layer.scale, out, layer.bias)


def _large_weights(layer: JambaLayer) -> Iterator[Tensor]:
    """The weights that decoding needs as int8."""
    mixer, block = (layer.self_attn if layer.is_attention else layer.mamba), layer.feed_forward
    names = ("q_proj", "k_proj", "v_proj", "o_proj") if layer.is_attention else ("in_proj", "x_proj", "out_proj")
    yield from (getattr(mixer, name).weight for name in names)
    if isinstance(block, MoE):
        yield from (block.experts.gate_up_proj, block.experts.down_proj)
    else:
        yield from (module.weight for module in (block.gate_proj, block.up_proj, block.down_proj))


def _dtype_fits(name: str, parameter: Tensor) -> bool:
    """As load_model leaves them: A, D and scales float32, everything else that is not int8 bfloat16."""
    own = torch.float32 if name.endswith((".A_log", ".D", "scale")) else torch.bfloat16
    return parameter.dtype in (own, torch.int8)

"""Grouped-query attention, causal, without positions unless the config has `rope_theta`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.batch import Batch
from model.config import JambaConfig
from model.kernels import cpu, gpu_past
from model.state import LayerKv

_UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Attention(nn.Module):
    """`index` counts the attention layers: the layer's place in a state's KV.

    `rope_scale` multiplies the rotary angles: lowered from 1 to 0 in training, it makes a model do without positions.
    """

    rope_scale: float = 1.0

    def __init__(self, config: JambaConfig, index: int) -> None:
        super().__init__()
        self.index, self.head_dim, self.rope_theta = index, config.head_dim, config.rope_theta
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(T, d) -> (T, d); appends to the states' KV."""
        q, k, v = self.project(x)
        q, k = self.turn(q, k, batch)
        out = self.attend_states(q, k, v, batch) if batch.states else _attend_fresh(q, k, v, batch)
        return self.o_proj(out.flatten(-2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, d) -> q (T, h, p), k, v (T, g, p), without positions."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def turn(self, q: Tensor, k: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """q, k of `project`, with rotary positions if the config has them."""
        if self.rope_theta is None:
            return q, k
        cos, sin = rotation(batch.positions(), self.rope_theta, self.rope_scale, self.head_dim)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def attend_states(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Each sequence attends to its own KV, to which k and v are appended -> (T, h, p)."""
        outputs = []
        parts = (x.split(batch.lengths) for x in (q, k, v))
        for state, q_own, k_own, v_own in zip(batch.states, *parts, strict=True):
            outputs.append(attend_past(q_own, state.append_kv(self.index, k_own, v_own)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def rotation(positions: Tensor, theta: float, scale: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """positions (T,) -> cos and sin (T, 1, p) in float32; `scale` multiplies every angle."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angles = positions[:, None, None] * (scale * theta**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, p) rotated, one half of p with the other. Source: transformers modeling_llama.py."""
    low, high = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)


def _attend_fresh(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
    """Attention within sequences of equal length without a past. q (T, h, p), k, v (T, g, p) -> (T, h, p)."""
    (group,) = batch.groups
    q, k, v = (x.unflatten(0, (group.b, group.t)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def attend_past(q: Tensor, kv: LayerKv) -> Tensor:
    """The last t of s+t tokens attend to all up to themselves. q (t, h, p) -> (t, h, p).

    KV is never copied, except lent KV if kernels/gpu_past.py does not run.
    """
    if gpu_past.takes(q, *kv):
        return gpu_past.attend(q, *kv)
    keys, values, *lent = kv
    if kv.lent_keys is not None:
        keys, values = (torch.cat(pair) for pair in zip(lent, (keys, values), strict=True))
    if cpu.attends(q, keys, values):
        return cpu.attend(q.contiguous(), [keys], [values], [len(q)])
    return attend_ref(q, keys, values)


def attend_ref(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`attend_past` in PyTorch. q (t, h, p), keys, values (s+t, g, p) -> (t, h, p).

    The heads of a group share their keys by view: a second batch dimension of stride 0.
    Source: PyTorch flash_api.cpp::mha_fwd, whose causal mask is aligned to the last key.
    """
    t, total, kv_heads = len(q), len(keys), keys.shape[1]
    q = q.unflatten(1, (kv_heads, -1))  # (t, g, h/g, p)
    keys, values = (x.transpose(0, 1)[None] for x in (keys, values))  # (1, g, s+t, p)
    if t == 1:
        with _any_length(q):
            return F.scaled_dot_product_attention(q, keys, values).flatten(1, 2)
    q = q.permute(2, 1, 0, 3)  # (h/g, g, t, p)
    keys, values = (x.expand(len(q), -1, -1, -1) for x in (keys, values))
    with _any_length(q):
        if t == total:
            out = F.scaled_dot_product_attention(q, keys, values, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=_causal_mask(t, total, q))
    return out.permute(2, 1, 0, 3).flatten(1, 2)


def _any_length(q: Tensor) -> AbstractContextManager[None]:
    """Avoids cuDNN on a GPU: PyTorch prefers it on Hopper, and it needs tens of milliseconds for each new length.

    Source: PyTorch sdp_utils.cpp::check_prefer_cudnn_attention, cudnn/MHA.cpp.
    """
    return sdpa_kernel(_UNPLANNED) if q.is_cuda else nullcontext()


def _causal_mask(t: int, total: int, q: Tensor) -> Tensor:
    """(t, total): causal mask of the last t of `total` tokens, to be added to the scores of queries q."""
    if not q.is_cuda:  # PyTorch would convert booleans to this, which takes a quarter of the time
        return q.new_full((t, total), -torch.inf).triu_(total - t + 1)
    from torch.nn.attention.bias import causal_lower_right  # seconds: it imports torch._dynamo

    return causal_lower_right(t, total)  # no tensor, but a hint for flash attention

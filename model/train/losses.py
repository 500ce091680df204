"""Losses over the vocabulary, a chunk of tokens at a time: the logits of a whole batch are never held."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.jamba import JambaLayer

CHUNK_TOKENS = 8192


def weighted_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights·(−log p(target)): hidden (N, d), head (v, d), targets (N,), weights (N,) -> scalar float32."""

    def chunk_loss(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return (F.cross_entropy(F.linear(x, head).float(), target, reduction="none") * weight).sum()

    pieces = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), weights.split(CHUNK_TOKENS), strict=True)
    return torch.stack([checkpoint(chunk_loss, *piece, use_reentrant=False) for piece in pieces]).sum()


def distillation(hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, targets: Tensor) -> Tensor:
    """Means over tokens of KL(teacher ‖ student) and of cross entropy: hidden, teacher (N, d) -> (2,) float32."""

    def chunk_loss(x: Tensor, other: Tensor, target: Tensor) -> Tensor:
        log_q = F.linear(x, head).float().log_softmax(-1)
        with torch.no_grad():
            log_p = F.linear(other, teacher_head).float().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        return torch.stack([kl, F.nll_loss(log_q, target, reduction="sum")])

    pieces = zip(hidden.split(CHUNK_TOKENS), teacher.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    return torch.stack([checkpoint(chunk_loss, *piece, use_reentrant=False) for piece in pieces]).sum(0) / len(targets)


def weighted_distillation(
    hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, targets: Tensor, weights: Tensor, hard: Tensor
) -> Tensor:
    """Sum of weights·(hard·(−log p(target)) + (1 − hard)·KL(teacher ‖ student)), (N,) or (N, d) -> scalar float32."""

    def chunk_loss(x: Tensor, other: Tensor, target: Tensor, weight: Tensor, share: Tensor) -> Tensor:
        log_q = F.linear(x, head).float().log_softmax(-1)
        with torch.no_grad():
            log_p = F.linear(other, teacher_head).float().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        return (weight * (share * F.nll_loss(log_q, target, reduction="none") + (1 - share) * kl)).sum()

    pieces = zip(*(x.split(CHUNK_TOKENS) for x in (hidden, teacher, targets, weights, hard)), strict=True)
    return torch.stack([checkpoint(chunk_loss, *piece, use_reentrant=False) for piece in pieces]).sum()


def attention_to(layer: JambaLayer, x: Tensor, queries: Tensor) -> Tensor:
    """How much an attention layer looks where it should: the mean over queries of −log of its best head's share.

    x (b, t, d) is the layer's input, queries (b, m, 4) float32: place of the query, first and end of the keys it should
    look at, weight (0: none). No positions. -> scalar float32.
    """
    at, first, end = (queries[..., i].long() for i in range(3))
    normed = layer.input_layernorm(x)
    attention = layer.self_attn
    keys = attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))
    asked = attention.q_proj(normed.gather(1, at[..., None].expand(-1, -1, x.shape[-1])))
    asked = asked.unflatten(-1, (keys.shape[2], -1, attention.head_dim))  # (b, m, g, h/g, p)
    scores = torch.einsum("bmghp,btgp->bmght", asked, keys).flatten(2, 3).float() * attention.head_dim**-0.5
    places = torch.arange(x.shape[1], device=x.device)
    future = places > at[..., None]  # (b, m, t)
    wanted = (places >= first[..., None]) & (places < end[..., None])
    scores = scores.masked_fill(future[:, :, None], float("-inf"))
    lost = scores.logsumexp(-1) - scores.masked_fill(~wanted[:, :, None], -1e4).logsumexp(-1)  # (b, m, h)
    weights = queries[..., 3]
    return (lost.amin(-1) * weights).sum() / weights.sum().clamp(min=1)

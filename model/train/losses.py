"""Training losses; those over the vocabulary run in chunks of tokens, so that the logits never exist as a whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.jamba import JambaLayer

try:
    from model.train import fused
except ImportError:  # a PyTorch without Triton
    fused = None

CHUNK_TOKENS = 8192


def vocabulary_loss(
    hidden: Tensor,
    head: Tensor,
    other: Tensor | None,
    other_head: Tensor | None,
    targets: Tensor,
    kl_weights: Tensor,
    ce_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ kl_weights·KL(other ‖ hidden) + ce_weights·(−log p(target)), and both terms per token, detached.

    hidden, other (N, d) before their heads (v, d); targets, weights (N,) -> scalar, (N,), (N,), float32. Without a
    teacher (`other` is None) the KL is 0.
    """
    if fused is not None and hidden.is_cuda:
        return fused.vocabulary_loss(hidden, head, other, other_head, targets, kl_weights, ce_weights, CHUNK_TOKENS)
    return vocabulary_loss_ref(hidden, head, other, other_head, targets, kl_weights, ce_weights)


def vocabulary_loss_ref(
    hidden: Tensor,
    head: Tensor,
    other: Tensor | None,
    other_head: Tensor | None,
    targets: Tensor,
    kl_weights: Tensor,
    ce_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition."""

    def chunk_loss(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        log_q = F.linear(x, head).float().log_softmax(-1)
        ce = F.nll_loss(log_q, target, reduction="none")
        if other is None:
            return torch.stack([torch.zeros_like(ce), ce])
        with torch.no_grad():
            log_p = F.linear(y, other_head).float().log_softmax(-1)
        return torch.stack([(log_p.exp() * (log_p - log_q)).sum(-1), ce])

    pieces = zip(*(x.split(CHUNK_TOKENS) for x in (hidden, hidden if other is None else other, targets)), strict=True)
    parts = [checkpoint(chunk_loss, *piece, use_reentrant=False) for piece in pieces]
    kl, ce = torch.cat(parts, dim=1)
    return (kl_weights * kl + ce_weights * ce).sum(), kl.detach(), ce.detach()


def relative_error(x: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Σ weights·log(1 + ‖x − target‖² / ‖target‖²) over tokens: x, target (N, d), weights (N,) -> scalar float32.

    Relative and logarithmic, because a few tokens have activations a thousand times larger and would dominate the sum.
    """
    target = target.float()
    return (((x.float() - target).square().sum(-1) / target.square().sum(-1)).log1p() * weights).sum()


def attention_to(layer: JambaLayer, x: Tensor, queries: Tensor) -> Tensor:
    """Loss that leads attention to given keys: mean over queries of −log of the best head's attention mass on them.

    x (b, t, d) is the layer's input; queries (b, m, 4) float32: index of the query, start and end of the keys that it
    should attend to, weight (0: unused). Without positional encoding. -> scalar float32.
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

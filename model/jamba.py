"""The network: embedding, layers of (attention or Mamba) + (MLP or experts), norm, head. Start at `Jamba.forward`.

Module and parameter names are the checkpoint's. Shape letters, here and everywhere in model/ (lower case because A, B,
C, D are the SSM's): b batch, t tokens of this call, s tokens already in the state, T tokens of this call over all
sequences, d hidden, e expand*d, n d_state, r dt_rank, w d_conv, h query heads, g KV heads, p head dim, f intermediate,
m experts, k experts a token, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from model import gpu_layers, gpu_segment
from model.attention import Attention
from model.batch import Batch
from model.config import JambaConfig
from model.cpu_decode import MAX_TOKENS, DecodeLayer, Trial, project
from model.gpu_decode import MAX_BATCH as MAX_GPU_BATCH
from model.gpu_decode import GpuDecoder, fits
from model.kernels import cpu, gpu, gpu_past
from model.kernels.rms_norm import RMSNorm
from model.mamba import MambaMixer
from model.moe import MLP, MoE
from model.state import HybridState, LentKv, StateLayout


class JambaLayer(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x)). In the published models the mixer is attention in one of
    eight layers and Mamba in the others; the feed-forward is an MLP or, in every second layer, a mixture of experts."""

    def __init__(self, config: JambaConfig, layer: int) -> None:
        super().__init__()
        attention_before = sum(map(config.is_attention, range(layer)))
        self.is_attention = config.is_attention(layer)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.is_attention:
            self.self_attn = Attention(config, index=attention_before)
        else:
            self.mamba = MambaMixer(config, index=layer - attention_before)
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = MoE(config) if config.is_moe(layer) else MLP(config)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(T, d) -> (T, d); advances the states of the batch."""
        mixer = self.self_attn if self.is_attention else self.mamba
        x = x + mixer(self.input_layernorm(x), batch)
        return x + self.feed_forward(self.pre_ff_layernorm(x))


class Jamba(nn.Module):
    """Embedding, layers, norm, head: `_run` is the whole network.

    Serving has fast paths through the same layers, and `forward_packed` chooses among them: a few tokens on a CPU
    (cpu_decode.py), a decode step (gpu_decode.py) or a short segment (gpu_segment.py) on a GPU. Long segments that must
    let other requests run in between: layered_prefill.py.
    """

    def __init__(self, config: JambaConfig) -> None:
        super().__init__()
        self.config = config
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(JambaLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # the fast paths, each built at first use; they hold addresses of the weights, see `_apply`
        self._decode: list[DecodeLayer] | None = None
        self._gpu_decode: GpuDecoder | Literal["unfit"] | None = None
        self._gpu_segments: gpu_segment.GpuSegments | None = None
        self._gpu_layers: gpu_layers.GpuLayers | None = None
        self.few_tokens = MAX_TOKENS  # most tokens for the CPU's fast path
        self.graphed_tokens = gpu_segment.MAX_TOKENS  # longest segment with CUDA graphs of exactly its length
        self.padded_tokens = 0  # longest segment that is padded to the length of a CUDA graph; 0: none
        self._collect_router_stats = False
        if not embedding.is_meta:  # arithmetic on the meta device imports torch._dynamo, which takes a second
            nn.init.normal_(embedding, std=0.02)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head share the embedding's parameter if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def state_layout(self) -> StateLayout:
        return StateLayout.of(self.config, self.embed_tokens.weight.dtype)

    def new_state(self, lent: LentKv | None = None) -> HybridState:
        """The empty state of one new sequence, on the device and in the dtype of the weights."""
        return HybridState(self.state_layout, self.embed_tokens.weight.device, lent)

    @property
    @torch.no_grad()
    def can_borrow(self) -> bool:
        """Whether a state may read its first KV from another state's memory: only GPU kernels read KV in two pieces."""
        return self.gpu_decoder(1) is not None and gpu_past.fits(self.embed_tokens.weight, self.config.head_dim)

    def forward(
        self,
        token_ids: Tensor,
        state: HybridState | Sequence[HybridState] | None = None,
        logits: Literal["all", "last"] = "all",
    ) -> Tensor:
        """token_ids (b, t) int64 -> logits (b, t, v), or (b, v) of the last tokens.

        Without `state` every sequence starts from an empty state and the result is differentiable. With b states, one
        per sequence, the states are advanced in place and no gradient is kept.
        """
        b, t = token_ids.shape
        if state is None:
            out = self._run(token_ids.flatten(), Batch.fresh(b, t, token_ids.device), logits)
        else:
            states = [state] if isinstance(state, HybridState) else state
            out = self.forward_packed(token_ids.flatten(), [t] * b, states, logits)
        return out.unflatten(0, (b, t)) if logits == "all" else out

    @torch.no_grad()
    def forward_packed(
        self,
        token_ids: Tensor,
        lengths: Sequence[int],
        states: Sequence[HybridState],
        logits: Literal["all", "last"] = "last",
    ) -> Tensor:
        """Sequences of any lengths end to end: token_ids (T,) -> logits (T, v), or (len(lengths), v) of the last ones.

        token_ids may stay on the CPU: a decode step on the GPU uploads them together with its other inputs.
        `states[i]` belongs to the i-th sequence and is advanced in place by `lengths[i]` tokens. Raises ValueError,
        before anything is changed, if lengths, states and token_ids do not match; after any other exception the states
        are unusable.
        """
        self._check_packed(token_ids, lengths, states)
        if max(lengths) == 1 and (decoder := self.gpu_decoder(len(states))):
            return decoder.step(token_ids, states)
        if len(states) == 1 and logits == "last" and (segments := self._short_segments(lengths[0])):
            return segments.run(token_ids, states[0])
        if token_ids.numel() <= self.few_tokens and self.can_try:
            trial = self._try(token_ids, Trial(lengths, states, token_ids.device, in_place=len(states) == 1), logits)
            trial.keep(lengths)
            return trial.logits
        device = self.embed_tokens.weight.device
        batch = Batch.of_states(lengths, states, device)
        out = self._run(token_ids.to(device), batch, logits)
        batch.commit()
        return out

    @property
    def can_try(self) -> bool:
        """Whether `try_tokens` can be used: with the C kernels on a CPU, unless router statistics are collected."""
        return cpu.supports(self.embed_tokens.weight.detach()) and not self.collect_router_stats

    @torch.no_grad()
    def try_tokens(self, token_ids: Tensor, lengths: Sequence[int], states: Sequence[HybridState]) -> Trial:
        """Like `forward_packed` with the logits of all tokens, but only `Trial.keep` advances the states.

        Logits, and the states after keeping any number of tokens, have the same bits as one call per token gives.
        Raises ValueError like `forward_packed`, for more than `MAX_TOKENS` tokens, and if not `can_try`.
        """
        self._check_packed(token_ids, lengths, states)
        if token_ids.numel() > MAX_TOKENS or not self.can_try:
            raise ValueError(f"{token_ids.numel()} tokens cannot be tried here; at most {MAX_TOKENS}, on a CPU")
        return self._try(token_ids, Trial(lengths, states, token_ids.device), "all")

    @property
    def collect_router_stats(self) -> bool:
        """Whether each MoE layer keeps the router statistics of its last call; set it before that call."""
        return self._collect_router_stats

    @collect_router_stats.setter
    def collect_router_stats(self, collect: bool) -> None:
        self._collect_router_stats = collect
        for moe in self._moe_layers():
            moe.collect_stats, moe.stats = collect, None

    def load_balancing_loss(self, alpha: float = 1.0) -> Tensor:
        """alpha * m * sum f_e P_e of the last forward, averaged over the MoE layers; alpha when perfectly balanced."""
        losses = [moe.stats.load_balancing_loss() for moe in self._moe_layers() if moe.stats]
        if not losses:
            raise RuntimeError("no router statistics: set collect_router_stats before the forward; needs experts")
        return alpha * torch.stack(losses).mean()

    def expert_utilisation(self) -> Tensor:
        """(MoE layers, m): share of the assignments each expert got in the last forward; rows sum to 1."""
        return torch.stack([moe.stats.share for moe in self._moe_layers() if moe.stats])

    def _run(self, token_ids: Tensor, batch: Batch, logits: Literal["all", "last"]) -> Tensor:
        """(T,) -> (T, v) or (b, v)"""
        x = self.embed_tokens(token_ids)
        for layer in self.layers:
            x = layer(x, batch)
        if logits == "last":
            x = x.index_select(0, batch.last_rows())
        return self.lm_head(self.final_layernorm(x))

    def _try(self, token_ids: Tensor, trial: Trial, logits: Literal["all", "last"]) -> Trial:
        x = self.embed_tokens(token_ids)
        for layer in self._decode_layers():
            x = layer(x, trial)
        if logits == "last":
            x = x.index_select(0, trial.batch.last_rows())
        trial.logits = project(self.lm_head, self.final_layernorm(x))
        return trial

    def _decode_layers(self) -> list[DecodeLayer]:
        """The same layers as fast paths for a few tokens on the CPU."""
        if self._decode is None:
            self._decode = [DecodeLayer(layer) for layer in self.layers]
        return self._decode

    def gpu_decoder(self, b: int) -> GpuDecoder | None:
        """The fast path that decodes b sequences on the GPU, or None if this model or its card cannot."""
        if b > MAX_GPU_BATCH or not gpu.supports(self.embed_tokens.weight) or self.collect_router_stats:
            return None
        if self._gpu_decode is None:
            self._gpu_decode = GpuDecoder(self) if fits(self) else "unfit"
        return None if self._gpu_decode == "unfit" else self._gpu_decode

    def _short_segments(self, t: int) -> gpu_segment.GpuSegments | None:
        """The fast path that computes t tokens of one sequence as CUDA graphs, or None if there is none."""
        if t > self.graphed_tokens or self.gpu_decoder(1) is None:
            return None
        if self._gpu_segments is None:
            self._gpu_segments = gpu_segment.GpuSegments(self)
        return self._gpu_segments if self._gpu_segments.takes(t) else None

    def padded_layers(self, t: int) -> gpu_layers.GpuLayers | None:
        """The fast path that computes t tokens, padded, as CUDA graphs of a few layers each; None if there is none."""
        if not self.graphed_tokens < t <= self.padded_tokens or self.gpu_decoder(1) is None:
            return None
        if self._gpu_layers is None:
            self._gpu_layers = gpu_layers.GpuLayers(self)
        return self._gpu_layers

    def forget_addresses(self) -> None:
        """Drop the fast paths because the weights are about to move; they are rebuilt at next use."""
        self._decode = self._gpu_decode = self._gpu_segments = self._gpu_layers = None

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """PyTorch calls this whenever weights are moved or cast."""
        self.forget_addresses()
        return super()._apply(*args, **kwargs)

    def _moe_layers(self) -> Iterator[MoE]:
        return (layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, MoE))

    def _check_packed(self, token_ids: Tensor, lengths: Sequence[int], states: Sequence[HybridState]) -> None:
        if len(lengths) != len(states) or len({id(state) for state in states}) != len(states):
            raise ValueError(f"{len(lengths)} sequences need as many different states, got {len(states)}")
        if min(lengths, default=0) < 1 or sum(lengths) != token_ids.numel():
            raise ValueError(f"lengths {list(lengths)} must be positive and sum to the {token_ids.numel()} tokens")
        layout = self.state_layout
        if any(state.layout != layout for state in states):
            raise ValueError("a state belongs to a model of another shape or dtype; make it with new_state()")

"""A few tokens of one sequence behind its past on the GPU, as CUDA graphs: what a question costs after a cache hit.

The modules' own kernels, captured once a length: launched one by one, some 800 of them take Python longer than they
take the card. Attention is left out, for its keys differ with every call; all between two of them is a graph.
Not here: a single token (gpu_decode.py), longer pieces (gpu_layers.py, the modules). Start at `GpuSegments.run`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.batch import Batch, Group
from model.gpu_graphs import GraphCapture
from model.kernels.gpu_linear import MAX_TOKENS, token_tiles
from model.state import HybridState

if TYPE_CHECKING:
    from model.jamba import Jamba, JambaLayer

LONGEST = 2 * MAX_TOKENS
_log = logging.getLogger(__name__)


class GpuSegments:
    """Made once of a model that `gpu_decode.fits`, whose weights stay where they are.

    Takes pieces of up to its `graphed_tokens`, at most LONGEST.
    """

    def __init__(self, model: Jamba) -> None:
        self._embedding, self._norm, self._head = model.embed_tokens, model.final_layernorm, model.lm_head
        self._stretches = _cut(list(model.layers))
        self._attentions = [stretch[-1] for stretch in self._stretches[:-1]]
        c, layout, device = model.config, model.state_layout, model.embed_tokens.weight.device

        def room(*shape: int) -> Tensor:
            return torch.empty(LONGEST, *shape, dtype=layout.kv_dtype, device=device)

        with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
            self._ids = torch.zeros(LONGEST, dtype=torch.int64, device=device)
            self._conv = torch.empty(layout.conv_shape, dtype=layout.conv_dtype, device=device)
            self._ssm = torch.empty(layout.ssm_shape, device=device)
            self._x, self._attended = room(c.hidden_size), room(c.hidden_size)
            self._q = room(c.num_attention_heads, c.head_dim)
            self._k, self._v = (room(c.num_key_value_heads, c.head_dim) for _ in range(2))
            self._logits = torch.empty(1, c.vocab_size, dtype=layout.kv_dtype, device=device)
        self._graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}  # of each length
        self._launched: set[int] = set()  # what `_kernels` gives, of lengths whose kernels are compiled and loaded
        self._capture = GraphCapture(device)
        self._usable, self._longest = True, model.graphed_tokens

    def takes(self, t: int) -> bool:
        return self._usable and 1 < t <= self._longest

    @torch.no_grad()
    def run(self, token_ids: Tensor, state: HybridState) -> Tensor:
        """Advance the state by token_ids (t,), on the CPU or the model's device -> logits (1, v) of the last one."""
        t, device = len(token_ids), self._ids.device
        state.reserve(state.num_tokens + t)
        graphs = self._graphs_of(t) if device.type == "cuda" else None
        batch = Batch((t,), (state,), (), device)
        self._ids[:t].copy_(token_ids)
        self._conv.copy_(state.conv), self._ssm.copy_(state.ssm)
        for i in range(len(self._stretches)):
            if i:
                own = self._attentions[i - 1].self_attn
                out = own.attend_states(self._q[:t], self._k[:t], self._v[:t], batch)
                self._attended[:t].copy_(out.flatten(-2))
            if graphs is None:
                self._launch(i, t)
            else:
                graphs[i].replay()
        self._launched.add(_kernels(t))
        state.conv.copy_(self._conv), state.ssm.copy_(self._ssm)
        state.num_tokens += t
        return self._logits.clone()

    def _graphs_of(self, t: int) -> list[torch.cuda.CUDAGraph] | None:
        """Those of this length; none before its kernels have run once."""
        if t not in self._graphs and _kernels(t) in self._launched:
            try:
                self._graphs[t] = [self._capture(partial(self._launch, i, t)) for i in range(len(self._stretches))]
            except RuntimeError:
                self._usable = False
                _log.warning("short segments cannot be captured; they run as modules, slower", exc_info=True)
        return self._graphs.get(t)

    def _launch(self, i: int, t: int) -> None:
        """Stretch i: what follows attention i - 1, up to the projections of attention i or to the logits."""
        group = Group(1, t, None, (), self._conv[:, None], self._ssm[:, None])
        batch = Batch((t,), (), (group,), self._ids.device)
        if i:
            before = self._attentions[i - 1]
            x = self._x[:t] + before.self_attn.o_proj(self._attended[:t])
            x = x + before.feed_forward(before.pre_ff_layernorm(x))
        else:
            x = self._embedding(self._ids[:t])
        last = i == len(self._attentions)
        for layer in self._stretches[i] if last else self._stretches[i][:-1]:
            x = layer(x, batch)
        if last:
            self._logits.copy_(self._head(self._norm(x[-1:])))
            return
        layer = self._attentions[i]
        self._x[:t].copy_(x)
        projected = layer.self_attn.project(layer.input_layernorm(x))
        for to, of in zip((self._q, self._k, self._v), projected, strict=True):
            to[:t].copy_(of)


def _kernels(t: int) -> int:
    """The same for lengths that run the same kernels."""
    return token_tiles(t) if t <= MAX_TOKENS else t


def _cut(layers: Sequence[JambaLayer]) -> list[list[JambaLayer]]:
    """The layers in stretches that end with an attention, but for the last."""
    stretches: list[list[JambaLayer]] = [[]]
    for layer in layers:
        stretches[-1].append(layer)
        if layer.is_attention:
            stretches.append([])
    return stretches

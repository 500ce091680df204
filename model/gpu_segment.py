"""Short segments on the GPU as CUDA graphs, such as a question after a cache hit.

The modules' own kernels, captured once per length: launching some 800 of them one by one takes Python longer than the
card needs to run them. Everything between two attentions is one graph.
Not here: a single token (gpu_decode.py), longer pieces (gpu_layers.py, the modules). Start at `GpuSegments.run`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.batch import Batch
from model.gpu_graphs import GraphCapture, GraphMemory
from model.kernels.gpu_linear import MAX_TOKENS, token_tiles
from model.state import HybridState

if TYPE_CHECKING:
    from model.jamba import Jamba, JambaLayer

LONGEST = 2 * MAX_TOKENS
_log = logging.getLogger(__name__)


class GpuSegments:
    """Built once for a model that `gpu_decode.fits`; its weights must not move.

    Takes segments of up to the model's `graphed_tokens`, at most LONGEST.
    """

    def __init__(self, model: Jamba) -> None:
        self._embedding, self._norm, self._head = model.embed_tokens, model.final_layernorm, model.lm_head
        self._stretches = _cut(list(model.layers))
        self._attentions = [stretch[-1] for stretch in self._stretches[:-1]]
        dtype, device = model.state_layout.kv_dtype, model.embed_tokens.weight.device
        self._memory = GraphMemory(model, LONGEST)
        with torch.inference_mode(False):  # as GraphMemory's
            self._ids = torch.zeros(LONGEST, dtype=torch.int64, device=device)
            self._logits = torch.empty(1, model.config.vocab_size, dtype=dtype, device=device)
        self._graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}  # by length
        self._launched: set[int] = set()  # results of `_kernels` for which kernels are compiled and loaded
        self._capture = GraphCapture(device)
        self._usable, self._longest = True, model.graphed_tokens

    def takes(self, t: int) -> bool:
        return self._usable and 1 < t <= self._longest

    @torch.no_grad()
    def run(self, token_ids: Tensor, state: HybridState) -> Tensor:
        """Advance the state by token_ids (t,), on the CPU or the model's device -> logits (1, v) of the last one."""
        t, device, memory = len(token_ids), self._ids.device, self._memory
        state.reserve(state.num_tokens + t)
        graphs = self._graphs_of(t) if device.type == "cuda" else None
        batch = Batch((t,), (state,), (), device)
        self._ids[:t].copy_(token_ids)
        memory.load(state)
        for i in range(len(self._stretches)):
            if i:
                own = self._attentions[i - 1].self_attn
                out = own.attend_states(memory.q[:t], memory.k[:t], memory.v[:t], batch)
                memory.attended[:t].copy_(out.flatten(-2))
            if graphs is None:
                self._launch(i, t)
            else:
                graphs[i].replay()
        self._launched.add(_kernels(t))
        memory.store(state)
        state.num_tokens += t
        return self._logits.clone()

    def _graphs_of(self, t: int) -> list[torch.cuda.CUDAGraph] | None:
        """The graphs of this length; None before its kernels have run once."""
        if t not in self._graphs and _kernels(t) in self._launched:
            try:
                self._graphs[t] = [self._capture(partial(self._launch, i, t)) for i in range(len(self._stretches))]
            except RuntimeError:
                self._usable = False
                _log.warning("short segments cannot be captured; they run as modules, slower", exc_info=True)
        return self._graphs.get(t)

    def _launch(self, i: int, t: int) -> None:
        """Stretch i: what follows attention i - 1, up to the projections of attention i or to the logits."""
        memory, batch = self._memory, self._memory.batch(t)
        x = memory.finish(self._attentions[i - 1], t) if i else self._embedding(self._ids[:t])
        last = i == len(self._attentions)
        for layer in self._stretches[i] if last else self._stretches[i][:-1]:
            x = layer(x, batch)
        if last:
            self._logits.copy_(self._head(self._norm(x[-1:])))
            return
        memory.x[:t].copy_(x)
        memory.project(self._attentions[i], x)


def _kernels(t: int) -> int:
    """A number that is equal for lengths that run the same kernels."""
    return token_tiles(t) if t <= MAX_TOKENS else t


def _cut(layers: Sequence[JambaLayer]) -> list[list[JambaLayer]]:
    """The layers in stretches, each of which ends with an attention layer, except the last."""
    stretches: list[list[JambaLayer]] = [[]]
    for layer in layers:
        stretches[-1].append(layer)
        if layer.is_attention:
            stretches.append([])
    return stretches

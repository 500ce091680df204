"""Prefill segments of some hundred to a few thousand tokens on the GPU, as CUDA graphs of a few layers each.

With so few tokens the host launches a layer's kernels no faster than the card runs them, and much slower if other
threads need the interpreter, which each launch releases. A graph has a fixed length, so segments are padded to a
multiple of ROWS with rows that do not change the state (batch.Padding). Fewer tokens: gpu_segment.py; more: the
modules. Start at `GpuLayers.compute`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.attention import Attention
from model.batch import Padding
from model.gpu_graphs import GraphCapture, GraphMemory
from model.state import HybridState

if TYPE_CHECKING:
    from model.jamba import Jamba, JambaLayer

ROWS = 256
LONGEST = 3072
LAYERS = 4  # about so many per graph: more mean fewer launches, but a longer wait for other answers' next tokens
_log = logging.getLogger(__name__)

_Span = tuple[tuple[int, bool], ...]  # (layer, whether only the part after its attention)
Attend = Callable[[Attention, Tensor, Tensor, Tensor], Generator[str, None, Tensor]]


class GpuLayers:
    """Built once for a model whose weights must not move and whose layers never synchronize (W8A8). For one segment at
    a time: starting another discards an unfinished one."""

    def __init__(self, model: Jamba) -> None:
        self._embedding, self._layers = model.embed_tokens, model.layers  # not the model, which holds this
        layout, device = model.state_layout, model.embed_tokens.weight.device
        self._memory = GraphMemory(model, LONGEST)
        with torch.inference_mode(False):  # as GraphMemory's
            self._places = torch.arange(LONGEST, device=device)[:, None]
            is_padding = torch.empty(LONGEST, 1, dtype=torch.bool, device=device)
            self._padding = Padding(is_padding, self._places[: layout.w - 1, 0].clone())
        self._capture = GraphCapture(device)
        self._spans = _spans(self._layers)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}  # by (rows, span)
        self._launched: set[int] = set()  # rows whose kernels are compiled and loaded
        self._usable = device.type == "cuda"

    def compute(self, token_ids: Tensor, state: HybridState, attend: Attend) -> Generator[str, None, Tensor]:
        """Advance conv and SSM of the state by token_ids (t,) -> x (t, d) after the last layer, valid until the next
        call. Yields the kind of each piece before it is computed. `attend(block, q, k, v)` computes the attention.
        """
        t, memory = len(token_ids), self._memory
        rows = -(-t // ROWS) * ROWS
        memory.load(state)
        memory.x[:t].copy_(self._embedding(token_ids))
        memory.x[t:rows].zero_(), memory.attended[t:rows].zero_()
        torch.ge(self._places, t, out=self._padding.rows)
        torch.add(self._places[: len(self._padding.last), 0], t - len(self._padding.last), out=self._padding.last)
        replayed = rows in self._launched
        for number, span in enumerate(self._spans):
            yield f"graph {number}"
            self._run(rows, number, replayed)
            if (block := self._attention_behind(span)) is not None:
                out = yield from attend(block, memory.q[:t], memory.k[:t], memory.v[:t])
                memory.attended[:t].copy_(out.flatten(-2))
        self._launched.add(rows)
        memory.store(state)
        return memory.x[:t]

    def run(self, token_ids: Tensor, state: HybridState) -> None:
        """All layers without attention, to compile and capture them."""

        def attend(block: Attention, q: Tensor, k: Tensor, v: Tensor) -> Generator[str, None, Tensor]:
            yield from ()
            return torch.zeros_like(q)

        for _ in self.compute(token_ids, state, attend):
            pass

    def _attention_behind(self, span: _Span) -> Attention | None:
        i, is_second = span[-1]
        return self._layers[i].self_attn if self._layers[i].is_attention and not is_second else None

    def _run(self, rows: int, number: int, replayed: bool) -> None:
        def launch() -> None:
            for part in self._spans[number]:
                self._launch(rows, *part)

        key = rows, number
        if replayed and self._usable and key not in self._graphs:
            try:
                self._graphs[key] = self._capture(launch)
            except RuntimeError:
                self._usable = False
                _log.warning("layers cannot be captured; they run as modules, slower", exc_info=True)
        graph = self._graphs.get(key)
        launch() if graph is None else graph.replay()

    def _launch(self, rows: int, i: int, is_second: bool) -> None:
        """One layer; of an attention layer either the part before its attention or the part after it."""
        layer, memory = self._layers[i], self._memory
        x = memory.x[:rows]
        if is_second:
            x.copy_(memory.finish(layer, rows))
        elif layer.is_attention:
            memory.project(layer, x)
        else:
            x.copy_(layer(x, memory.batch(rows, Padding(self._padding.rows[:rows], self._padding.last))))


def _spans(layers: Iterable[JambaLayer]) -> list[_Span]:
    """The layers of each graph; attention itself is between two graphs, so none continues past one."""
    spans: list[list[tuple[int, bool]]] = [[]]
    for i, layer in enumerate(layers):
        if len(spans[-1]) >= LAYERS and not layer.is_attention:
            spans.append([])
        spans[-1].append((i, False))
        if layer.is_attention:
            spans.append([(i, True)])
    return [tuple(span) for span in spans if span]

"""A prefill segment of some hundred to a few thousand tokens on the GPU, as CUDA graphs of a few layers each.

Of so few tokens the host launches a layer's kernels no faster than the card runs them, and much slower where other
threads want the interpreter, which each launch lets go. A graph is of one length: segments are padded to a multiple of
ROWS, by rows that leave the states as they are (batch.Padding). Attention is left out, for its keys differ with every
call. Fewer tokens: gpu_segment.py; more: the modules. Start at `GpuLayers.compute`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.attention import Attention
from model.batch import Batch, Group, Padding
from model.gpu_graphs import GraphCapture
from model.state import HybridState

if TYPE_CHECKING:
    from model.jamba import Jamba, JambaLayer

ROWS = 256
LONGEST = 3072
LAYERS = 4  # of a graph, about: the more, the fewer launches, and the longer the others' next tokens wait
_log = logging.getLogger(__name__)

_Span = tuple[tuple[int, bool], ...]  # layers, and whether of an attention's what lies behind it
Attend = Callable[[Attention, Tensor, Tensor, Tensor], Generator[str, None, Tensor]]


class GpuLayers:
    """Made once of a model whose weights stay where they are and whose layers wait for nothing (W8A8). For one segment
    at a time: what is under way when another begins is lost."""

    def __init__(self, model: Jamba) -> None:
        self._embedding, self._layers = model.embed_tokens, model.layers  # not the model, which holds this
        c, layout, device = model.config, model.state_layout, model.embed_tokens.weight.device

        def room(*shape: int) -> Tensor:
            return torch.zeros(LONGEST, *shape, dtype=layout.kv_dtype, device=device)

        with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
            self._conv = torch.empty(layout.conv_shape, dtype=layout.conv_dtype, device=device)
            self._ssm = torch.empty(layout.ssm_shape, device=device)
            self._x, self._attended = room(c.hidden_size), room(c.hidden_size)
            self._q = room(c.num_attention_heads, c.head_dim)
            self._k, self._v = (room(c.num_key_value_heads, c.head_dim) for _ in range(2))
            self._places = torch.arange(LONGEST, device=device)[:, None]
            is_padding = torch.empty(LONGEST, 1, dtype=torch.bool, device=device)
            self._padding = Padding(is_padding, self._places[: layout.w - 1, 0].clone())
        self._capture = GraphCapture(device)
        self._spans = _spans(self._layers)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}  # of rows and span
        self._launched: set[int] = set()  # rows whose kernels are compiled and loaded
        self._usable = device.type == "cuda"

    def compute(self, token_ids: Tensor, state: HybridState, attend: Attend) -> Generator[str, None, Tensor]:
        """Advance conv and SSM of the state by token_ids (t,) -> x (t, d) behind the last layer, until the next call.

        Yields the kind of each piece before it is computed. `attend(block, q, k, v)` gives what `Attention` attends to.
        """
        t = len(token_ids)
        rows = -(-t // ROWS) * ROWS
        self._conv.copy_(state.conv), self._ssm.copy_(state.ssm)
        self._x[:t].copy_(self._embedding(token_ids))
        self._x[t:rows].zero_(), self._attended[t:rows].zero_()
        torch.ge(self._places, t, out=self._padding.rows)
        torch.add(self._places[: len(self._padding.last), 0], t - len(self._padding.last), out=self._padding.last)
        replayed = rows in self._launched
        for number, span in enumerate(self._spans):
            yield f"graph {number}"
            self._run(rows, number, replayed)
            if (block := self._attention_behind(span)) is not None:
                out = yield from attend(block, self._q[:t], self._k[:t], self._v[:t])
                self._attended[:t].copy_(out.flatten(-2))
        self._launched.add(rows)
        state.conv.copy_(self._conv), state.ssm.copy_(self._ssm)
        return self._x[:t]

    def run(self, token_ids: Tensor, state: HybridState) -> None:
        """All layers, attending to nothing: to prepare them."""

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
        """A layer; one of attention up to its projections, or from what was attended to on."""
        layer, x = self._layers[i], self._x[:rows]
        if layer.is_attention and not is_second:
            projected = layer.self_attn.project(layer.input_layernorm(x))
            for to, of in zip((self._q, self._k, self._v), projected, strict=True):
                to[:rows].copy_(of)
            return
        padding = Padding(self._padding.rows[:rows], self._padding.last)
        group = Group(1, rows, None, (), self._conv[:, None], self._ssm[:, None], padding)
        if is_second:
            x = x + layer.self_attn.o_proj(self._attended[:rows])
            x = x + layer.feed_forward(layer.pre_ff_layernorm(x))
        else:
            x = layer(x, Batch((rows,), (), (group,), x.device))
        self._x[:rows].copy_(x)


def _spans(layers: Iterable[JambaLayer]) -> list[_Span]:
    """What one graph each computes; none goes beyond an attention, which stands between two."""
    spans: list[list[tuple[int, bool]]] = [[]]
    for i, layer in enumerate(layers):
        if len(spans[-1]) >= LAYERS and not layer.is_attention:
            spans.append([])
        spans[-1].append((i, False))
        if layer.is_attention:
            spans.append([(i, True)])
    return [tuple(span) for span in spans if span]

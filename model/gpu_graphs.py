"""Common parts of CUDA graphs of layers: capturing them, and the memory that they read and write."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.batch import Batch, Group, Padding
from model.state import HybridState

if TYPE_CHECKING:
    from model.jamba import Jamba, JambaLayer


class GraphCapture:
    """Captures graphs that never run at the same time and therefore share one pool of intermediate memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None  # they are captured on it

    def __call__(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what `launch` launches; its kernels must have run before. Raises RuntimeError if that fails."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            torch.cuda.current_blas_handle()  # a thread's first one can't be made during a capture
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            launch()
        return graph


class GraphMemory:
    """One sequence's conv and ssm, x between two graphs, and the inputs and outputs of attention.

    Attention itself is in no graph, because its keys differ in every call. Letters as in jamba.py; the model's dtype.
    """

    def __init__(self, model: Jamba, longest: int) -> None:
        """For segments of up to `longest` tokens."""
        c, layout, device = model.config, model.state_layout, model.embed_tokens.weight.device

        def room(*shape: int) -> Tensor:
            return torch.zeros(longest, *shape, dtype=layout.kv_dtype, device=device)

        with torch.inference_mode(False):  # an inference tensor could not be written outside inference mode
            self.conv = torch.empty(layout.conv_shape, dtype=layout.conv_dtype, device=device)
            self.ssm = torch.empty(layout.ssm_shape, device=device)
            self.x, self.attended = room(c.hidden_size), room(c.hidden_size)
            self.q = room(c.num_attention_heads, c.head_dim)
            self.k, self.v = (room(c.num_key_value_heads, c.head_dim) for _ in range(2))

    def load(self, state: HybridState) -> None:
        self.conv.copy_(state.conv), self.ssm.copy_(state.ssm)

    def store(self, state: HybridState) -> None:
        state.conv.copy_(self.conv), state.ssm.copy_(self.ssm)

    def batch(self, t: int, padding: Padding | None = None) -> Batch:
        """The `Batch` for Mamba layers of a call with t tokens, which advances `conv` and `ssm`."""
        group = Group(1, t, None, (), self.conv[:, None], self.ssm[:, None], padding)
        return Batch((t,), (), (group,), self.conv.device)

    def project(self, layer: JambaLayer, x: Tensor) -> None:
        """x (t, d) before an attention layer -> its q, k and v."""
        projected = layer.self_attn.project(layer.input_layernorm(x))
        for to, of in zip((self.q, self.k, self.v), projected, strict=True):
            to[: len(x)].copy_(of)

    def finish(self, layer: JambaLayer, t: int) -> Tensor:
        """x (t, d) after an attention layer, from `x` before it and the output of attention, `attended`."""
        x = self.x[:t] + layer.self_attn.o_proj(self.attended[:t])
        return x + layer.feed_forward(layer.pre_ff_layernorm(x))

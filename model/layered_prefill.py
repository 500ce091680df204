"""A long prefill segment computed piece by piece, so that decode steps of other requests can run in between.

A piece is a layer's mixer or feed-forward, a few layers as a CUDA graph (gpu_layers.py), or part of the queries of an
attention over many keys. The pieces, and so every bit of the result, depend only on the segment and its past, not on
what runs in between.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from model.attention import Attention, attend_past
from model.batch import Batch
from model.jamba import Jamba
from model.moe import MoE
from model.state import HybridState

MAX_SCORES = 1 << 29  # queries times keys of one piece: 18 ms of the 52B model's on an H100
_QUERY_UNIT = 256


class LayeredPrefill:
    """The forward pass of one sequence's next tokens (t,). Its state must not be used before `run` returns logits.

    `piece_s`: latest seconds per token of each kind of piece; kept from segment to segment.
    """

    def __init__(
        self, model: Jamba, token_ids: Tensor, state: HybridState, piece_s: dict[str, float] | None = None
    ) -> None:
        self._model, self._piece_s = model, {} if piece_s is None else piece_s
        self._batch = Batch.of_states([len(token_ids)], [state], token_ids.device)
        self._pieces = self._compute(token_ids)
        self._next: str | None = next(self._pieces)

    def run(self, seconds: float | None = None) -> Tensor | None:
        """Compute for about `seconds`, at least one piece; None: to the end. Returns logits (1, v) at the end.

        On a GPU as many pieces as should fit are launched back to back, without waiting in between.
        """
        start, watch, kinds, passed = time.perf_counter(), Stopwatch(self._batch.device), list[str](), 0.0
        while self._next is not None:
            kind, self._next = self._next, next(self._pieces, None)
            if seconds is None:
                continue
            watch.lap()
            kinds.append(kind)
            passed = max(passed + self._expected_s(kind), time.perf_counter() - start)
            if kind in self._piece_s and passed + self._expected_s(self._next) < seconds:
                continue
            for done, lap_s in zip(kinds, watch.read(), strict=True):
                self._piece_s[done] = lap_s / self._batch.lengths[0]
            kinds.clear()
            passed = time.perf_counter() - start
            if self._next is not None and passed + self._expected_s(self._next) >= seconds:
                return None
        self._batch.commit()
        return self._model.lm_head(self._model.final_layernorm(self._x[-1:]))

    def _expected_s(self, kind: str | None) -> float:
        return 0.0 if kind is None else self._piece_s.get(kind, 0.0) * self._batch.lengths[0]

    def _compute(self, token_ids: Tensor) -> Iterator[str]:
        """Yields the kind of each piece before it is computed."""
        if (padded := self._model.padded_layers(len(token_ids))) is not None:
            self._x = yield from padded.compute(token_ids, self._batch.states[0], self._attend)
            return
        self._x = self._model.embed_tokens(token_ids)
        for layer in self._model.layers:
            x, block = layer.input_layernorm(self._x), layer.feed_forward
            if layer.is_attention:
                attention = layer.self_attn
                q, k, v = attention.project(x)
                attended = yield from self._attend(attention, *attention.turn(q, k, self._batch), v)
                mixed = attention.o_proj(attended.flatten(-2))
            else:
                yield "mamba"
                mixed = layer.mamba(x, self._batch)
            self._x = self._x + mixed
            yield "experts" if isinstance(block, MoE) else "mlp"
            self._x = self._x + block(layer.pre_ff_layernorm(self._x))

    def _attend(self, block: Attention, q: Tensor, k: Tensor, v: Tensor) -> Generator[str, None, Tensor]:
        """Like `Attention.attend_states`."""
        (state,) = self._batch.states
        kv = state.append_kv(block.index, k, v)
        past, outputs = state.num_tokens, []
        most = max(MAX_SCORES // (past + len(q)) // _QUERY_UNIT, 1) * _QUERY_UNIT
        pieces = -(-len(q) // most)  # of about equal size: a short last one would need another kernel (gpu_past.py)
        rows = -(-len(q) // (pieces * _QUERY_UNIT)) * _QUERY_UNIT
        for own in q.split(rows):
            yield "attention"
            past += len(own)
            outputs.append(attend_past(own, kv.first(past)))
        return torch.cat(outputs)


class Stopwatch:
    """Measures how long pieces take on a device; on a GPU by its own events, so queued work counts when it runs."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks = [self._mark()]

    def lap(self) -> None:
        self._marks.append(self._mark())

    def read(self) -> list[float]:
        """Wait for the device; the seconds of each lap since the last time."""
        marks, self._marks = self._marks, self._marks[-1:]
        if self._on_gpu:
            marks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 if self._on_gpu else b - a for a, b in pairwise(marks)]

    def _mark(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

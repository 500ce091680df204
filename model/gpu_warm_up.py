"""Runs on a GPU what requests will run, so that no request waits for a kernel to compile or a graph to be captured.

It uses the public entry points of the network (jamba.py) and keeps no results. Start at `warm_up`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from model import gpu_layers
from model.gpu_decode import MAX_BATCH

if TYPE_CHECKING:
    from model.jamba import Jamba

# Lengths of segments that run as modules: few tokens, some, and many. Triton compiles one kernel for lengths that are
# multiples of 16 and another for those that are not, hence two of many.
_SEGMENT_TOKENS = (17, 200, 528, 517)
_PAST_TOKENS = 1280  # past before these segments


@torch.inference_mode()
def warm_up(model: Jamba, max_batch: int) -> Iterator[None]:
    """Decode steps of up to `max_batch` sequences, then segments of all lengths; a little between two yields.

    A request that comes earlier prepares what it needs itself. Does nothing on a CPU.
    """
    if (decoder := model.gpu_decoder(1)) is None:
        return

    def read_segment(t: int) -> None:
        """A segment without a past, after a past, and after a lent one."""
        state, ids = model.new_state(), torch.zeros(max(t, _PAST_TOKENS), dtype=torch.int64)
        model.forward_packed(ids[:t], [t], [state])
        model.forward_packed(ids[:_PAST_TOKENS], [_PAST_TOKENS], [state])
        other = model.new_state(state.lend(_PAST_TOKENS))
        state.copy_to(other)
        for own in (state, other):
            model.forward_packed(ids[:t], [t], [own])

    def read_short(t: int) -> None:
        model.forward_packed(torch.zeros(t, dtype=torch.int64), [t], [model.new_state()])

    def read_padded(t: int) -> None:
        model.padded_layers(t).run(torch.zeros(t, dtype=torch.int64, device=decoder.device), model.new_state())

    def decode(b: int, sharing: bool) -> None:
        decoder.step(torch.zeros(b, dtype=torch.int64), [model.new_state() for _ in range(b)], sharing)

    batches = range(1, min(max_batch, MAX_BATCH) + 1)
    steps: list[Callable[[], None]] = [partial(read_segment, t) for t in _SEGMENT_TOKENS]
    steps += [partial(decode, b, False) for b in batches]
    steps += [partial(read_short, t) for t in range(model.graphed_tokens, 1, -1)]
    steps += [partial(read_padded, t) for t in range(model.padded_tokens, model.graphed_tokens, -gpu_layers.ROWS)]
    steps += [partial(decode, b, True) for b in batches[1:]]
    for step in steps:
        for _ in range(2):  # the first of its shape compiles what the second captures
            step()
        yield

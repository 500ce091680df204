"""Memory budget for the states of running requests, so that every admitted request can be completed.

Waiting requests are handled in engine.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from model.jamba import Jamba
from model.state import HybridState, StateLayout

_SLACK = 1.25  # a prefill whose tokens favour one expert needs more workspace than the measured one
_LONGEST_TOKENS = 1 << 26
_SPARE_BYTES = 1 << 30  # for fragmentation and for the CUDA graphs of decode steps


class HoldsMemory(Protocol):
    """A state, or KV kept for lending."""

    @property
    def memory(self) -> Mapping[int, int]:
        """Address -> bytes, so that shared memory is counted once."""
        ...


class StateBudget:
    """`max_bytes` for the states of all running requests; None: no limit."""

    def __init__(self, layout: StateLayout, max_bytes: int | None = None) -> None:
        self._layout, self.max_bytes = layout, max_bytes

    @property
    def max_tokens(self) -> int | None:
        """Length of the longest sequence that fits by itself; 0 if none does, None without a limit."""
        if self.max_bytes is None:
            return None
        return bisect_right(range(1, _LONGEST_TOKENS), self.max_bytes, key=self._bytes_of)

    def has_room(self, num_tokens: int, others: Sequence[HoldsMemory]) -> bool:
        """Whether a state with its own KV for `num_tokens` fits in addition to the memory of `others`."""
        if self.max_bytes is None:
            return True
        held: dict[int, int] = {}
        for other in others:
            held |= other.memory
        return self._bytes_of(num_tokens) + sum(held.values()) <= self.max_bytes

    def _bytes_of(self, num_tokens: int) -> int:
        state = HybridState(self._layout, "meta")
        state.reserve(num_tokens)
        return state.nbytes


@torch.inference_mode()
def measure_state_bytes(model: Jamba, segment_tokens: int) -> int | None:
    """GPU memory available for states: free memory minus the workspace of a prefill segment, measured by running one.

    None on other devices. Also runs all other kernels once to compile them, so that no request waits for that.
    """
    device = model.embed_tokens.weight.device
    if device.type != "cuda":
        return None
    tokens = torch.randint(0, model.config.vocab_size, (segment_tokens,), device=device)
    state = model.new_state()
    state.reserve(segment_tokens)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model.forward_packed(tokens, [segment_tokens], [state]).sum().item()
    workspace = torch.cuda.max_memory_allocated(device) - before
    del state, tokens
    for t in (1, 8, 16, 32, 64):  # a decode step, and short segments in all shapes of linear.cu
        model.forward_packed(torch.zeros(t, dtype=torch.int64), [t], [model.new_state()])
    if (padded := model.padded_layers(model.padded_tokens)) is not None:
        for _ in range(2):  # the second time as CUDA graphs, whose memory is shared with shorter ones
            padded.run(torch.zeros(model.padded_tokens, dtype=torch.int64, device=device), model.new_state())
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, free - int(_SLACK * workspace) - _SPARE_BYTES)

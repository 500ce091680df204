"""How CUDA graphs are captured that take turns."""

from __future__ import annotations

from collections.abc import Callable

import torch


class GraphCapture:
    """Captures graphs that never run at once, and so share the memory for what is between their kernels."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: tuple[int, int] | None = None
        self._stream: torch.cuda.Stream | None = None  # they are captured on it

    def __call__(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """What `launch` launches, whose kernels must have run before. Raises RuntimeError if that can't be captured."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            torch.cuda.current_blas_handle()  # a thread's first one can't be made during a capture
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            launch()
        return graph

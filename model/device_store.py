"""The tiers of states kept as tensors: where the model runs, and in main memory that a GPU reads at full rate.

Nothing of them is encoded or checked. Who decides what is kept: prefix_cache.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.state_eviction import EvictionPolicy
from model.state_store import MemoryStateStore, StateItem


@dataclass(frozen=True, slots=True, eq=False)
class StateTensors:
    """A block or a snapshot as a store's value: as long as it has bytes. Each tensor has its own memory."""

    tensors: tuple[Tensor, ...]

    def __len__(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def pinned(self) -> StateTensors:
        """In page-locked main memory, where there is a GPU to read it; these themselves if they are there."""
        if not torch.cuda.is_available() or all(tensor.is_pinned() or not tensor.numel() for tensor in self.tensors):
            return self
        return StateTensors(tuple(_pin(tensor) for tensor in self.tensors))


class DeviceStateStore(MemoryStateStore):
    """Up to `max_bytes` of StateTensors on `device`, exceeded only while a put runs. On a CPU this is the host tier."""

    def __init__(
        self, max_bytes: int, device: torch.device | str = "cpu", policy: EvictionPolicy | None = None
    ) -> None:
        super().__init__(max_bytes, policy)
        self.device = torch.device(device)
        self.tier = "gpu" if self.device.type == "cuda" else "host"

    def make_room(self, nbytes: int) -> bool:
        """Give up values until that many bytes more fit; False, with nothing given up, if they never will."""
        with self._lock:
            if nbytes > self._max_bytes:
                return False
            self._shrink(self._max_bytes - nbytes)
            return True


class PinnedStateStore(MemoryStateStore):
    """Up to `max_bytes` of StateTensors in page-locked main memory: the host tier below a DeviceStateStore on a GPU."""

    def put_many(self, items: Sequence[StateItem]) -> None:
        super().put_many([item._replace(value=item.value.pinned()) for item in items])


def _pin(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)

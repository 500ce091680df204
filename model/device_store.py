"""The tiers that keep states as tensors: on the model's device, and in page-locked main memory for a GPU.

Values are neither encoded nor verified. What is stored is decided in prefix_cache.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.state_eviction import EvictionPolicy
from model.state_store import MemoryStateStore, StateItem

_LARGE = 1 << 20  # bytes; page-locking less takes less than a millisecond


@dataclass(frozen=True, slots=True, eq=False)
class StateTensors:
    """A block or snapshot as a store's value; its `len` is in bytes. Each tensor has its own memory."""

    tensors: tuple[Tensor, ...]

    def __len__(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def pinned(self) -> StateTensors:
        """A copy in page-locked main memory, if there is a GPU; the tensors themselves if they are there already."""
        if not torch.cuda.is_available() or all(tensor.is_pinned() or not tensor.numel() for tensor in self.tensors):
            return self
        return StateTensors(tuple(_pin(tensor) for tensor in self.tensors))


class DeviceStateStore(MemoryStateStore):
    """Up to `max_bytes` of StateTensors on `device`, exceeded only during a put. On a CPU this is the host tier."""

    def __init__(
        self, max_bytes: int, device: torch.device | str = "cpu", policy: EvictionPolicy | None = None
    ) -> None:
        super().__init__(max_bytes, policy)
        self.device = torch.device(device)
        self.tier = "gpu" if self.device.type == "cuda" else "host"


class PinnedStateStore(MemoryStateStore):
    """Up to `max_bytes` of StateTensors in page-locked main memory: the host tier below a DeviceStateStore on a GPU.

    Locking a GB takes a second, during which the process can do nothing else on the card. So the store holds no more
    than `reserve` has locked so far; without a GPU nothing is locked.
    """

    def __init__(self, max_bytes: int, policy: EvictionPolicy | None = None) -> None:
        self._locks = torch.cuda.is_available()
        super().__init__(0 if self._locks else max_bytes, policy)
        self._wanted_bytes = max_bytes
        self._spare: dict[int, list[Tensor]] = defaultdict(list)  # by size

    def reserve(self, sizes: Sequence[int]) -> bool:
        """Page-lock memory for tensors of these sizes, at most what is missing; False if nothing is missing."""
        missing = self._wanted_bytes - self._max_bytes
        if missing <= 0:
            return False
        buffers = [torch.empty(_rounded(size), dtype=torch.uint8, pin_memory=True) for size in sizes]
        with self._lock:
            for buffer in buffers:
                self._spare[len(buffer)].append(buffer)
            self._max_bytes += min(missing, sum(sizes))
        return True

    def put_many(self, items: Sequence[StateItem]) -> None:
        """Until all memory is locked, values for which there is none are dropped."""
        pinned = [item._replace(value=self._pinned(item.value)) for item in items]
        with self._lock:
            self._dropped += sum(item.value is None for item in pinned)
        super().put_many([item for item in pinned if item.value is not None])

    def close(self) -> None:
        super().close()
        self._spare.clear()

    def _pinned(self, value: StateTensors) -> StateTensors | None:
        if not self._locks:
            return value
        with self._lock:
            spares = [self._spare[_rounded(tensor.nbytes)] for tensor in value.tensors]
            if self._max_bytes < self._wanted_bytes and any(
                not spare and tensor.nbytes >= _LARGE for spare, tensor in zip(spares, value.tensors, strict=True)
            ):
                return None
            buffers = [spare.pop() if spare else None for spare in spares]
        return StateTensors(tuple(map(_pin, value.tensors, buffers)))


def _pin(tensor: Tensor, buffer: Tensor | None = None) -> Tensor:
    """A copy in `buffer`, or in a new page-locked buffer, which is reused when it has no more references."""
    if buffer is None:
        buffer = torch.empty(_rounded(tensor.nbytes), dtype=torch.uint8, pin_memory=True)
    return buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _rounded(nbytes: int) -> int:
    """Rounded up to the sizes in which PyTorch allocates locked memory: powers of two."""
    return 1 << max(nbytes - 1, 0).bit_length()

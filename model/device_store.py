"""The tiers of states kept as tensors: where the model runs, and in main memory that a GPU reads at full rate.

Nothing of them is encoded or checked. Here also what brings the values of the first tier to those below it. Who decides
what is kept: prefix_cache.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from model.state_codec import encode_value
from model.state_eviction import EvictionPolicy
from model.state_store import MemoryStateStore, StateItem, StateStore


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

    keeps_tensors = True

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

    keeps_tensors = True

    def put_many(self, items: Sequence[StateItem]) -> None:
        super().put_many([item._replace(value=item.value.pinned()) for item in items])


class EncodedStores:
    """Puts StateTensors into `stores`, for those that keep bytes encoded, once for all. Made to be written behind.

    On a GPU the copies have a stream of their own, so that the model's work does not queue up behind them. What was
    put is asked of and deleted from the stores themselves.
    """

    tier, keeps_tensors = "encoded", True

    def __init__(self, stores: Sequence[StateStore], layout: str) -> None:
        self._stores, self._layout = tuple(stores), layout
        self._stream: torch.cuda.Stream | None = None

    def contains_many(self, keys: Sequence[str], peek: bool = False) -> list[bool]:
        return [False] * len(keys)

    def get_many(self, keys: Sequence[str]) -> list[None]:
        return [None] * len(keys)

    def put_many(self, items: Sequence[StateItem]) -> None:
        with torch.inference_mode():
            for item in items:
                with self._copying_from(item.value.device):
                    item = item._replace(value=item.value.pinned())
                encoded = None
                for store in self._stores:
                    if not store.keeps_tensors:
                        encoded = encoded or encode_value(item.key, self._layout, item.value.tensors)
                    store.put_many([item if store.keeps_tensors else item._replace(value=encoded)])

    def delete(self, keys: Collection[str] = (), tags: Collection[str] = ()) -> None:
        pass

    def stats(self) -> dict[str, int]:
        return {"dropped": 0}

    def _copying_from(self, device: torch.device) -> AbstractContextManager[object]:
        if device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.default_stream(device))  # where the tensors were computed
        return torch.cuda.stream(self._stream)


def _pin(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)

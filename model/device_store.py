"""The tier of states kept as tensors where the model runs: nothing is encoded, checked or copied to the host.

Here also what brings its values to the tiers below, which keep bytes. Who decides what is kept: prefix_cache.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from model.state_codec import encode_value
from model.state_eviction import EvictionPolicy
from model.state_store import MemoryStateStore, StateStore


@dataclass(frozen=True, slots=True, eq=False)
class StateTensors:
    """A block or a snapshot as a store's value: as long as it has bytes. Each tensor has its own memory."""

    tensors: tuple[Tensor, ...]

    def __len__(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


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


class EncodedStores:
    """Puts StateTensors into `stores` as bytes, encoded once for all of them. Made to be written behind.

    On a GPU the copies have a stream of their own, so that the model's work does not queue up behind them. What was
    put is asked of and deleted from the stores themselves.
    """

    tier = "encoded"

    def __init__(self, stores: Sequence[StateStore], layout: str) -> None:
        self._stores, self._layout = tuple(stores), layout
        self._stream: torch.cuda.Stream | None = None

    def contains_many(self, keys: Sequence[str], peek: bool = False) -> list[bool]:
        return [False] * len(keys)

    def get_many(self, keys: Sequence[str]) -> list[None]:
        return [None] * len(keys)

    def put_many(self, items: Sequence) -> None:
        with torch.inference_mode():
            for item in items:
                with self._copying_from(item.value.tensors[0].device):
                    value = encode_value(item.key, self._layout, item.value.tensors)
                for store in self._stores:
                    store.put_many([item._replace(value=value)])

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

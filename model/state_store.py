"""Where states are kept: the contract of every tier, and the tier in memory.

A store knows keys, values and tags; not what a state is (state_codec.py), not which ones are worth keeping
(prefix_cache.py) or which go first when memory is full (state_eviction.py). A store never raises because of what it is
given or of a server it depends on: what it cannot give is a miss, what it cannot take is dropped, and `stats` counts
both. In memory: device_store.py. Redis: redis_store.py.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from model.state_eviction import Entry, EvictionPolicy, LeastValuable

if TYPE_CHECKING:
    from model.device_store import StateTensors

Buffer = bytes | bytearray | memoryview


class StateItem(NamedTuple):
    """`tags` are the documents the value was made from: `delete(tags=...)` finds it by any of them.

    The rest are hints for eviction: `after` is the key of the value without which this one is of no use,
    `saves_tokens` how many tokens need not be computed when this value is there, 0 if it saves none by itself, and
    `ends_prompt` whether nothing deeper was to be kept of the prompt it was made for.
    """

    key: str
    value: Buffer | StateTensors
    tags: frozenset[str] = frozenset()
    after: str = ""
    saves_tokens: int = 0
    ends_prompt: bool = False


class StateStore(Protocol):
    """Safe to call from several threads. Values must not be changed by whoever gets or puts them."""

    tier: str  # as answers name it: "gpu", "host", "redis"
    keeps_tensors: bool  # its values are StateTensors, else bytes

    def contains_many(self, keys: Sequence[str], peek: bool = False) -> list[bool]:
        """Which keys would probably be found now. They are a prompt's, deepest first; unless it is only a `peek`,
        that the prompt could use them counts for what is kept."""
        ...

    def get_many(self, keys: Sequence[str]) -> list[Buffer | StateTensors | None]:
        """The values; None for a miss."""
        ...

    def put_many(self, items: Sequence[StateItem]) -> None:
        """Keep the items, visible in this order."""
        ...

    def delete(self, keys: Collection[str] = (), tags: Collection[str] = ()) -> None:
        """Forget these keys and all keys with one of these tags, those still on their way in included."""
        ...

    def stats(self) -> dict[str, int]:
        """Counters and sizes; every implementation has at least `dropped`, the values it could not take, `read_bytes`
        and `written_bytes`, of those it gave and took."""
        ...


class MemoryStateStore:
    """Up to `max_bytes` of values in this process, exceeded only while a put runs; `policy` says which go first."""

    tier, keeps_tensors = "host", True

    def __init__(self, max_bytes: int, policy: EvictionPolicy | None = None) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._policy = policy or LeastValuable()
        self._items: dict[str, StateItem] = {}
        self._keys_of_tag: dict[str, set[str]] = {}
        self._evicted = self._dropped = self._read_bytes = self._written_bytes = 0
        self._lock = threading.Lock()

    def contains_many(self, keys: Sequence[str], peek: bool = False) -> list[bool]:
        with self._lock:
            if not peek:
                self._policy.ask(keys)
            return [key in self._items for key in keys]

    def get_many(self, keys: Sequence[str]) -> list[Buffer | StateTensors | None]:
        with self._lock:
            values = [item.value if (item := self._items.get(key)) else None for key in keys]
            self._read_bytes += sum(len(value) for value in values if value is not None)
            return values

    def put_many(self, items: Sequence[StateItem]) -> None:
        with self._lock:
            for item in items:
                self._add(item)
            self._shrink(self._max_bytes)

    def delete(self, keys: Collection[str] = (), tags: Collection[str] = ()) -> None:
        with self._lock:
            tagged = [key for tag in tags for key in self._keys_of_tag.get(tag, ())]
            for key in {*keys, *tagged}:
                self._remove(key)

    def stats(self) -> dict[str, int]:
        with self._lock:
            return {
                "items": len(self._items),
                "bytes": self._bytes,
                "max_bytes": self._max_bytes,
                "evicted": self._evicted,
                "dropped": self._dropped,
                "read_bytes": self._read_bytes,
                "written_bytes": self._written_bytes,
            }

    def close(self) -> None:
        self.delete(keys=list(self._items))

    def _shrink(self, max_bytes: int) -> None:
        while self._bytes > max_bytes:
            self._remove(self._policy.victim())
            self._evicted += 1

    def _add(self, item: StateItem) -> None:
        if len(item.value) > self._max_bytes:
            self._remove(item.key)
            self._dropped += 1
            return
        self._forget(item.key)
        self._items[item.key] = item
        self._bytes += len(item.value)
        self._written_bytes += len(item.value)
        self._policy.add(item.key, Entry(len(item.value), item.after, item.saves_tokens, item.ends_prompt))
        for tag in item.tags:
            self._keys_of_tag.setdefault(tag, set()).add(item.key)

    def _remove(self, key: str) -> None:
        if self._forget(key):
            self._policy.remove(key)

    def _forget(self, key: str) -> bool:
        """Take the value out, unknown to the policy; False if there was none."""
        if (item := self._items.pop(key, None)) is None:
            return False
        self._bytes -= len(item.value)
        for tag in item.tags:
            self._keys_of_tag[tag].discard(key)
            if not self._keys_of_tag[tag]:
                del self._keys_of_tag[tag]
        return True


def locate(stores: Sequence[StateStore], keys: Sequence[str], peek: bool) -> dict[str, int]:
    """key -> the place of the first store that has it; what no store has is absent. `peek`: that is no use of it."""
    where: dict[str, int] = {}
    for place, store in enumerate(stores):
        asked = [key for key in keys if key not in where]
        found = store.contains_many(asked, peek) if asked else []
        where.update({key: place for key, there in zip(asked, found, strict=True) if there})
    return where

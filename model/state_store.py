"""Storage of cached states: the contract of every tier, and the tier in memory.

A store knows keys, values and tags; not what a state is (state_codec.py), which ones are worth storing
(prefix_cache.py) or which are evicted first (state_eviction.py). A store never raises because of its input or of a
server it depends on: what it cannot return is a miss, what it cannot take is dropped, and `stats` counts both. In
memory: device_store.py. Redis: redis_store.py.
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
    """`tags` are the documents that the value was computed from: `delete(tags=...)` finds it by any of them.

    The rest are hints for eviction: `after` is the key of the value that this one needs, `saves_tokens` the number of
    tokens that need not be computed thanks to this value (0 if none by itself), `ends_prompt` whether it is the deepest
    value stored for its prompt.
    """

    key: str
    value: Buffer | StateTensors
    tags: frozenset[str] = frozenset()
    after: str = ""
    saves_tokens: int = 0
    ends_prompt: bool = False


class StateStore(Protocol):
    """Thread safe. Callers must not change values that they put or got."""

    tier: str  # as reported in answers: "gpu", "host", "redis"
    keeps_tensors: bool  # whether its values are StateTensors; otherwise bytes

    def contains_many(self, keys: Sequence[str], peek: bool = False) -> list[bool]:
        """Which keys would probably be found now. They belong to one prompt, deepest first; unless `peek`, this counts
        as a use of the keys for eviction."""
        ...

    def get_many(self, keys: Sequence[str]) -> list[Buffer | StateTensors | None]:
        """The values; None for a miss."""
        ...

    def put_many(self, items: Sequence[StateItem]) -> None:
        """Store the items; they become visible in this order."""
        ...

    def delete(self, keys: Collection[str] = (), tags: Collection[str] = ()) -> None:
        """Delete these keys and all keys with one of these tags, including those still being written."""
        ...

    def stats(self) -> dict[str, int]:
        """Counters and sizes; every implementation has at least `dropped` (values it could not take), `read_bytes` and
        `written_bytes`."""
        ...


class MemoryStateStore:
    """Up to `max_bytes` of values in this process, exceeded only during a put; `policy` decides what to evict."""

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

    def make_room(self, nbytes: int) -> bool:
        """Evict values until that many more bytes fit; False, with nothing evicted, if they never will."""
        with self._lock:
            if nbytes > self._max_bytes:
                return False
            self._shrink(self._max_bytes - nbytes)
            return True

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
        """Remove the value without telling the policy; False if there was none."""
        if (item := self._items.pop(key, None)) is None:
            return False
        self._bytes -= len(item.value)
        for tag in item.tags:
            self._keys_of_tag[tag].discard(key)
            if not self._keys_of_tag[tag]:
                del self._keys_of_tag[tag]
        return True


def locate(stores: Sequence[StateStore], keys: Sequence[str], peek: bool) -> dict[str, int]:
    """key -> index of the first store that has it; absent if none has. `peek`: does not count as a use."""
    where: dict[str, int] = {}
    for place, store in enumerate(stores):
        asked = [key for key in keys if key not in where]
        found = store.contains_many(asked, peek) if asked else []
        where.update({key: place for key, there in zip(asked, found, strict=True) if there})
    return where

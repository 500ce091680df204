"""Where states are kept: the contract of every tier, the tier in memory, and writing behind.

A store knows keys, values and tags; not what a state is (state_codec.py), not which ones are worth keeping
(prefix_cache.py) or which go first when memory is full (state_eviction.py). A store never raises because of what it is
given or of a server it depends on: what it cannot give is a miss, what it cannot take is dropped, and `stats` counts
both. Values are bytes, those of device_store.py tensors. Redis: redis_store.py.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from model.state_eviction import Entry, EvictionPolicy, LeastValuable

if TYPE_CHECKING:
    from model.device_store import StateTensors

Buffer = bytes | bytearray | memoryview
_WRITE_BATCH_BYTES = 16 << 20
_log = logging.getLogger(__name__)


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
        """Counters and sizes; every implementation has at least `dropped`, the values it could not take."""
        ...


class MemoryStateStore:
    """Up to `max_bytes` of values in this process, exceeded only while a put runs; `policy` says which go first."""

    tier, keeps_tensors = "host", False

    def __init__(self, max_bytes: int, policy: EvictionPolicy | None = None) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._policy = policy or LeastValuable()
        self._items: dict[str, StateItem] = {}
        self._keys_of_tag: dict[str, set[str]] = {}
        self._evicted = self._dropped = 0
        self._lock = threading.Lock()

    def contains_many(self, keys: Sequence[str], peek: bool = False) -> list[bool]:
        with self._lock:
            if not peek:
                self._policy.ask(keys)
            return [key in self._items for key in keys]

    def get_many(self, keys: Sequence[str]) -> list[Buffer | StateTensors | None]:
        with self._lock:
            return [item.value if (item := self._items.get(key)) else None for key in keys]

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


class WriteBehindStore:
    """Puts into `store` on a thread of its own, so that whoever puts never waits; gets go straight through.

    At most `max_pending_bytes` wait; what comes on top is dropped. A delete also takes what waits, and returns only
    when nothing that it covers can still arrive.
    """

    def __init__(self, store: StateStore, max_pending_bytes: int = 256 << 20) -> None:
        self.tier, self.keeps_tensors = store.tier, store.keeps_tensors
        self._store, self._max_pending_bytes = store, max_pending_bytes
        self._pending: deque[StateItem] = deque()
        self._writing: tuple[StateItem, ...] = ()
        self._pending_bytes = self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"write-behind-{store.tier}", daemon=True)
        self._thread.start()

    def contains_many(self, keys: Sequence[str], peek: bool = False) -> list[bool]:
        return self._store.contains_many(keys, peek)

    def get_many(self, keys: Sequence[str]) -> list[Buffer | StateTensors | None]:
        return self._store.get_many(keys)

    def put_many(self, items: Sequence[StateItem]) -> None:
        with self._changed:
            for item in items:
                if self._closed or self._pending_bytes + len(item.value) > self._max_pending_bytes:
                    self._dropped += 1
                    continue
                self._pending.append(item)
                self._pending_bytes += len(item.value)
            self._changed.notify_all()

    def delete(self, keys: Collection[str] = (), tags: Collection[str] = ()) -> None:
        wanted_keys, wanted_tags = frozenset(keys), frozenset(tags)

        def covers(item: StateItem) -> bool:
            return item.key in wanted_keys or not wanted_tags.isdisjoint(item.tags)

        with self._changed:
            self._pending = deque(item for item in self._pending if not covers(item))
            self._pending_bytes = sum(len(item.value) for item in self._pending)
            batch = self._writing
            if any(covers(item) for item in batch):
                self._changed.wait_for(lambda: self._writing is not batch)
            self._changed.notify_all()
        self._store.delete(keys, tags)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything put so far is written or dropped; False if that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending and not self._writing, timeout_s)

    def stats(self) -> dict[str, int]:
        stats = self._store.stats()
        with self._changed:
            return {**stats, "dropped": stats["dropped"] + self._dropped, "pending_bytes": self._pending_bytes}

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what waits, for at most `timeout_s`, and end the thread. The store underneath stays open."""
        self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._dropped += len(self._pending)
            self._pending.clear()
            self._pending_bytes = 0
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while batch := self._next_batch():
            failed = 0
            try:
                self._store.put_many(batch)
            except Exception:
                _log.exception("the %s store failed to take %d states; they are dropped", self.tier, len(batch))
                failed = len(batch)
            with self._changed:
                self._dropped += failed
                self._writing = ()
                self._changed.notify_all()

    def _next_batch(self) -> tuple[StateItem, ...]:
        """Wait for work; at least one item and at most about _WRITE_BATCH_BYTES. Nothing once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closed)
            batch, size = [], 0
            while self._pending and (not batch or size + len(self._pending[0].value) <= _WRITE_BATCH_BYTES):
                batch.append(self._pending.popleft())
                size += len(batch[-1].value)
            self._pending_bytes -= size
            self._writing = tuple(batch)
            return self._writing
